"""What training asks of its parts beyond types.py: an autoencoder that can be trained, a codebook, a running average."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ldm.types import Autoencoder, Draw, Moments


class Trainable(Autoencoder, Protocol):
    """An autoencoder, a torch module, whose latents are whitened by statistics that are measured once it is trained."""

    mean: Tensor  # (C), buffers: of sampled latents over the training set
    std: Tensor  # (C)
    count: Tensor  # (), int64, the pictures that they were measured on; 0 before
    last_layer: nn.Parameter  # whose gradient balances an adversary

    def posterior(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> moments of the network's own latents (B, C, H, W), not whitened."""

    def bottleneck(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, f * H, f * W) in [-1, 1] -> what `reconstruct` is given, and terms of the loss, () each, by name."""

    def reconstruct(self, z: Tensor) -> Tensor:
        """(B, C, H, W), the network's own latents -> (B, 3, f * H, f * W)."""


@runtime_checkable
class Quantised(Protocol):
    """A trainable autoencoder with a codebook that follows what it encodes; also asked of an object, so methods alone."""

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the nearest codes (B, C, H, W) and their numbers (B, H, W)."""

    def codes(self) -> int:
        """How many there are."""

    def update(self, step: int, reduce: Callable[[Tensor], Tensor], rank: int = 0, world: int = 1) -> None:
        """Once a training step: moves the codes to what was encoded since the last one; `reduce` sums over the ranks."""

    def moving(self) -> Iterable[Tensor]:
        """The tensors that `update` changes."""

    def forget(self) -> None:
        """What was encoded since the last update is not learned from."""


class AdversarialLoss(Protocol):
    """What a discriminator and the autoencoder minimise; logits are (B, 1, h, w), one for each patch of a picture."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits of real and of fake pictures -> (), what the discriminator minimises."""

    def generator(self, fake: Tensor) -> Tensor:
        """Logits of fake pictures -> (), what the autoencoder minimises."""


@runtime_checkable
class Average(Protocol):
    """A callback that keeps a running average of what is trained, and gives it as `average` in its `state_dict`."""

    average: dict[str, Tensor]  # by the stage's names
    in_place: bool  # whether the weights are the average now

    def swap_in(self, module: Any) -> None:
        """Puts the average in the weights' place; keeps them."""

    def swap_out(self, module: Any) -> None:
        """Puts the weights back."""


def averages_in(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights that a checkpoint's callbacks left, by the stage's names; empty where none kept any."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    averages = [state["average"] for state in states if isinstance(state.get("average"), dict)]
    return {name: x for average in averages for name, x in average.items()}
