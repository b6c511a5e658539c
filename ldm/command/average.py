"""Averages a run's weights over any length:  ldm average RUN OUT --std 0.07"""

from ldm.training.average import main

__all__ = ["main"]
