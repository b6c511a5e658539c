"""How a noise level enters a residual block of a U-Net."""

from torch import Tensor, nn


class Shift(nn.Module):
    """The noise level moves the features, which are normalised after it."""

    def __init__(self, channels: int, told: int, groups: int) -> None:
        super().__init__()
        self.told, self.norm = nn.Linear(told, channels), nn.GroupNorm(groups, channels)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        """h: (B, C, H, W), told: (B, E) -> (B, C, H, W)."""
        return self.norm(h + self.told(told)[:, :, None, None])


class ScaleShift(nn.Module):
    """The noise level scales and moves the normalised features (https://arxiv.org/abs/2105.05233, AdaGN)."""

    def __init__(self, channels: int, told: int, groups: int) -> None:
        super().__init__()
        self.told, self.norm = nn.Linear(told, 2 * channels), nn.GroupNorm(groups, channels)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        """h: (B, C, H, W), told: (B, E) -> (B, C, H, W)."""
        scale, shift = self.told(told)[:, :, None, None].chunk(2, dim=1)
        return self.norm(h) * (1 + scale) + shift
