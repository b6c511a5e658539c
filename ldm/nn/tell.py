"""How the noise level's embedding e enters a residual block of a U-Net, by h <- norm(h + W e) or h <- (1 + s) norm(h) + b."""

from torch import Tensor, nn


class Shift(nn.Module):
    """norm(h + W e): the embedding shifts the features, which are normalised after it (DDPM, Stable Diffusion)."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.told, self.norm = nn.Linear(width, channels), nn.GroupNorm(groups, channels)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: (B, C, H, W), embedding: (B, E) -> (B, C, H, W)."""
        return self.norm(h + self.told(embedding)[:, :, None, None])


class ScaleShift(nn.Module):
    """(1 + s) norm(h) + b: the embedding scales and shifts the normalised features (AdaGN, https://arxiv.org/abs/2105.05233)."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.told, self.norm = nn.Linear(width, 2 * channels), nn.GroupNorm(groups, channels)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: (B, C, H, W), embedding: (B, E) -> (B, C, H, W)."""
        scale, shift = self.told(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.norm(h) * (1 + scale) + shift
