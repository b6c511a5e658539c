"""Drawing on a device of little memory: text towers and autoencoder lie on the CPU, and visit the device when called."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.model import LatentModel
from ldm.types import Autoencoder, Moments


class Visiting(nn.Module):
    """An autoencoder around an autoencoder, which is moved to `device` for each call, and back to the CPU behind it."""

    def __init__(self, autoencoder: Autoencoder, device: torch.device | str) -> None:
        super().__init__()
        self.autoencoder, self.device = autoencoder, device
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> whitened moments of (B, C, H, W)."""
        return self._visit(lambda: self.autoencoder.encode(images))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, f * H, f * W), about [-1, 1]."""
        return self._visit(lambda: self.autoencoder.decode(latents))

    def _visit(self, call: Callable[[], Any]) -> Any:
        self.autoencoder.to(self.device)
        try:
            return call()
        finally:
            self.autoencoder.to("cpu")


def offload(model: LatentModel, device: torch.device | str) -> LatentModel:
    """Puts the network on a device, where it stays; the conditions and the autoencoder visit it, in place -> the same model."""

    def come(conditioner: nn.Module, inputs: Any) -> None:
        conditioner.to(device)

    def leave(conditioner: nn.Module, inputs: Any, output: Any) -> None:
        conditioner.to("cpu")

    model.to("cpu").denoiser.to(device)
    model.autoencoder = Visiting(model.autoencoder, device)
    model.conditioner.register_forward_pre_hook(come)
    model.conditioner.register_forward_hook(leave)
    return model
