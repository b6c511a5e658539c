"""Refusals: what a person can mend. A command shows one as a single line; any other exception keeps its traceback.

Imports nothing, so that every room may raise them.
"""

TOO_LARGE = (  # of an autoencoder that runs in float16
    "its numbers are too large for the precision it runs in. Take one that fits into 16 bits, for Stable Diffusion XL "
    "madebyollin/sdxl-vae-fp16-fix"
)


class Refusal(ValueError):
    """Says what was found, what was wanted, and what to change."""


class NotFound(Refusal, FileNotFoundError):
    """A file or folder that was named, or is needed, is not there."""


class NotWritten(Refusal, OSError):
    """Something could not be saved; what stood there before still stands."""


class AlreadyThere(Refusal, FileExistsError):
    """What was to be written stands there already, and is not overwritten."""


class Unreachable(Refusal, ConnectionError):
    """A server, a hub or another process does not answer."""
