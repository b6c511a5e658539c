"""The picture that a text says what to make of: InstructPix2Pix (https://arxiv.org/abs/2211.09800, section 3.2)."""

from ldm.condition.picture import Picture
from ldm.types import Autoencoder


class Edit(Picture):
    """A picture's latents, as maps beside the noisy ones; zeros where it is dropped.

    Dropped by one random number with the text, so that either is alone, and both are together: with the text's rate of 0.1 and
    these, 5 % each, as published.

    Args:
        autoencoder: the model's, which encodes the picture.
        key: the field of the picture.
        rate: how often it is dropped.
        drop_from: where in the number its share begins; the text's begins at 0.
        stands_for: the text's name among the conditions.
    """

    def __init__(
        self, autoencoder: Autoencoder, key: str = "source", rate: float = 0.1, drop_from: float = 0.05, stands_for: str = "text"
    ) -> None:
        super().__init__(autoencoder, "encoded", key, rate)
        self.drop_from, self.stands_for = drop_from, stands_for
