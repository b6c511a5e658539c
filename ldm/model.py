"""The artefact: what is trained, saved and sampled from. Knows nothing of losses, data or trainers."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ldm.conditioner import Conditioner
from ldm.denoiser import Denoiser
from ldm.types import Autoencoder, Batch, Cond


class LatentModel(nn.Module):
    """An autoencoder, frozen; a conditioner; a denoiser of the autoencoder's latents.

    trained: the names of what is trained where that is adapters alone, and all else is frozen; None of a model that is trained
    as a whole. adapters: those that were put to work on it, as plain values (source, strength, sha256). whole: the sources of
    those that are there or are not, at strength 1 or 0.
    """

    def __init__(self, autoencoder: Autoencoder, conditioner: Conditioner, denoiser: Denoiser) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.conditioner = conditioner
        self.denoiser = denoiser
        self.trained: frozenset[str] | None = None
        self.adapters: tuple[dict[str, Any], ...] = ()
        self.whole: tuple[str, ...] = ()

    def condition(self, request: Batch, only: Sequence[str] | None = None) -> Cond:
        """request: fields, B of each -> its condition.

        `only` keeps the conditions it names and drops the others, or tells them their negative; `()` is the null condition.
        """
        return self.conditioner(request, only=only)

    def train(self, mode: bool = True) -> "LatentModel":
        """As in torch, but what is frozen stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        for embedder in self.conditioner.embedders.values():
            for part in embedder.frozen:
                embedder.get_submodule(part).eval()
        return self
