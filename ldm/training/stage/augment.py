"""More pictures than there are: changes after which a picture is still a picture for an autoencoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.types import Draw


@dataclass(frozen=True)
class Augment:
    """Each change happens to its share of the pictures, from 0 to 1.

    mirror: left for right.  upend: top for bottom.  turn: rows for columns, of square pictures.
    recolour: another order of red, green and blue.
    """

    mirror: float = 0.0
    upend: float = 0.0
    turn: float = 0.0
    recolour: float = 0.0

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """(B, 3, h, w) -> (B, 3, h, w).

        Raises:
            Refusal: `turn` and pictures that are not square.
        """
        height, width = images.shape[2:]
        if self.turn and height != width:
            raise Refusal(f"Pictures of {height}x{width} pixels cannot be turned; set training.augment.turn=0.")
        changes = {
            "mirror": lambda x: x.flip(3),
            "upend": lambda x: x.flip(2),
            "turn": lambda x: x.transpose(2, 3),
            "recolour": lambda x: self._recoloured(x, draw),
        }
        for name, change in changes.items():
            if share := getattr(self, name):
                chosen = draw.uniform(f"augment/{name}") < share
                images = torch.where(chosen[:, None, None, None].to(images.device, non_blocking=True), change(images), images)
        return images

    @staticmethod
    def _recoloured(images: Tensor, draw: Draw) -> Tensor:
        order = draw.uniform("augment/order", (3,)).argsort(1).to(images.device, non_blocking=True)
        return images.gather(1, order[:, :, None, None].expand_as(images))
