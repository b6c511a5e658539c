"""Measures as training goes on (to come)."""

from ldm.evaluation.pictures import chosen  # noqa: F401
