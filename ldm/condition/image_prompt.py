"""A picture as a prompt: tokens of what a CLIP sees in it, behind the text's (https://arxiv.org/abs/2308.06721, section 3.2)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from ldm.condition._files import numbers, read_centred
from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.tower.clip import MEAN, STD, blank_image_tower, embed_image, is_plain, load_clip, settings
from ldm.types import Batch, Cond, Draw, Widths

Colours = tuple[Sequence[float], Sequence[float]]


class ImagePrompt(Condition):
    """A picture -> as many tokens as its kind makes, and, last, one that holds the strength in each of its numbers.

    Args:
        width: of a token, as the network attends to it.
        key: the field of the picture, in training the sample's own where the data do not name it; its strength is the field
            `<key>_strength`, a number for each.
        model, pretrained: the image tower, open_clip's name with a tag or a local file, or `local-dir:FOLDER`.
        tower: in their place open_clip's model_cfg, `embed_dim` and `vision_cfg`, of a tower whose weights come from elsewhere.
        kind: `linear`, several tokens of the picture's embedding; `resampler`, as many as it asks for of the tokens of the last
            block but one (Plus); `mlp`, each of these tokens (full face).
        tokens: how many, of `linear` and `resampler`.
        inner, depth: how wide and how deep a `resampler` is.
        strength: where the request does not say one.
        rate: above 0, so that the null condition is told no picture.

    Raises:
        Refusal: the tower is no plain transformer.
    """

    frozen = unreached = ("image_tower",)

    def __init__(
        self,
        width: int,
        key: str,
        model: str | None = None,
        pretrained: str | None = None,
        tower: Mapping[str, Any] | None = None,
        kind: Literal["linear", "resampler", "mlp"] = "linear",
        tokens: int = 4,
        inner: int = 768,
        depth: int = 4,
        strength: float = 1.0,
        rate: float = 0.05,
    ) -> None:
        super().__init__()
        self.key, self.rate, self.kind, self.strength = (key, f"{key}_strength"), rate, kind, strength
        self.widths = Widths(tokens=width)
        self.image_tower, self.colours = _tower(model, pretrained, tower)
        patches, seen = self.image_tower.positional_embedding.shape
        self.side = self.image_tower.image_size[0]
        makes = {
            "linear": lambda: Linear(self.image_tower.output_dim, width, tokens),
            "resampler": lambda: Resampler(seen, width, tokens, inner, depth),
            "mlp": lambda: nn.Sequential(nn.Linear(seen, seen), nn.GELU(), nn.Linear(seen, width), nn.LayerNorm(width)),
        }
        self.project = makes[kind]()
        self.count = 1 + (patches if kind == "mlp" else tokens)

    def forward(self, value: Sequence[Tensor], drop: Tensor) -> Cond:
        """value: (B, 3, h, w) in [-1, 1], and strengths (B) -> tokens: (B, L + 1, D). drop: (B) bool; dropped is what is seen:
        an embedding of zeros, or, of tokens, a picture of the mean colour."""
        picture, strength = (x.to(next(self.project.parameters()), non_blocking=True) for x in value)
        told = (~drop).to(picture, non_blocking=True)
        with torch.no_grad():
            if self.kind == "linear":
                seen = embed_image(self.image_tower, self._normal(picture))[1] * told[:, None]
            else:
                seen = embed_image(self.image_tower, self._normal(picture) * told[:, None, None, None])[0]
        tokens = self.project(seen)
        return Cond(tokens=torch.cat((tokens, strength[:, None, None].expand(-1, 1, tokens.shape[2])), dim=1))

    def _normal(self, picture: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] -> (B, 3, side, side), as the tower was trained."""
        if picture.shape[2:] != (self.side, self.side):
            picture = interpolate(picture, (self.side, self.side), mode="bicubic", antialias=True)
        mean, std = (picture.new_tensor(numbers)[:, None, None] for numbers in self.colours)
        return (picture / 2 + 0.5 - mean) / std

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """The usual strength, where none is said; in training the sample's own picture, where the data name no other."""
        (picture, strength), made = self.key, {}
        if picture not in batch and "image" in batch:
            made[picture] = batch["image"]
        if strength not in batch and (picture in batch or made):
            made[strength] = torch.full((len({**made, **batch}[picture]),), self.strength)
        return made

    def check(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Refuses a request without a picture."""
        if self.key[0] not in values:
            raise Refusal(f"ask.{self.key[0]}=FILE must be said: {self.key[0]} is an IP-Adapter, which is told a picture.")

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Files of pictures, or folders of them -> (N, 3, side, side) in [-1, 1], the middle of each, whatever the size of what
        is drawn; or strengths, numbers -> (N)."""
        return read_centred(field, values, self.side) if field == self.key[0] else numbers(field, values)

    def input(self, field: str) -> Input:
        """A picture, and a number: how strongly it is followed."""
        return Input("picture") if field == self.key[0] else Input("number", low=0, high=2, usual=self.strength)

    def show(self, value: Sequence[Tensor]) -> Tensor:
        """value: as in `forward` -> the pictures."""
        return value[0]


def _tower(model: str | None, pretrained: str | None, config: Mapping[str, Any] | None) -> tuple[nn.Module, Colours]:
    """The image tower, frozen, and the mean and deviation of the colours that it was trained on."""
    if config is not None:
        return blank_image_tower(config), (MEAN, STD)
    if model is None:
        raise Refusal("adapter.ip_adapter.prompt.model: an image tower must be named, as open_clip or local-dir:FOLDER has it.")
    tower = load_clip(model, pretrained, "adapter.ip_adapter.prompt").visual
    if not is_plain(tower):
        raise Refusal(
            f"adapter.ip_adapter.prompt.model={model} sees by a {type(tower).__name__}; a plain transformer was wanted."
        )
    told = settings(tower)
    return tower, (told["mean"], told["std"])


class Linear(nn.Module):
    """One embedding -> several tokens."""

    def __init__(self, seen: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self.proj, self.norm = tokens, nn.Linear(seen, tokens * width), nn.LayerNorm(width)

    def forward(self, seen: Tensor) -> Tensor:
        """(B, E) -> (B, L, D)."""
        return self.norm(self.proj(seen).unflatten(1, (self.tokens, -1)))


class Resampler(nn.Module):
    """Learnt tokens that attend to a picture's, and to each other (https://arxiv.org/abs/2204.14198, figure 5).

    Args:
        seen: S, features of each of the picture's tokens.
        width: D, of what is said.
        tokens: L, how many are said.
        inner: features of the learnt tokens, a multiple of 64.
        depth: layers.
    """

    def __init__(self, seen: int, width: int, tokens: int, inner: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, inner) / inner**0.5)
        self.proj_in, self.proj_out, self.norm_out = nn.Linear(seen, inner), nn.Linear(inner, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Perceiver(inner) for _ in range(depth))

    def forward(self, seen: Tensor) -> Tensor:
        """(B, N, S) -> (B, L, D)."""
        seen, latents = self.proj_in(seen), self.latents.expand(len(seen), -1, -1)
        for layer in self.layers:
            latents = layer(seen, latents)
        return self.norm_out(self.proj_out(latents))


class Perceiver(nn.Module):
    """Attention to a picture's tokens and one's own, in heads 64 wide, and a feed-forward; no biases but the norms'."""

    WIDTH = 64

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm_seen, self.norm = nn.LayerNorm(inner), nn.LayerNorm(inner)
        self.q, self.kv = nn.Linear(inner, inner, bias=False), nn.Linear(inner, 2 * inner, bias=False)
        self.out = nn.Linear(inner, inner, bias=False)
        wide, narrow = nn.Linear(inner, 4 * inner, bias=False), nn.Linear(4 * inner, inner, bias=False)
        self.feed = nn.Sequential(nn.LayerNorm(inner), wide, nn.GELU(), narrow)

    def forward(self, seen: Tensor, latents: Tensor) -> Tensor:
        """seen: (B, N, C), latents: (B, L, C) -> (B, L, C)."""
        own = self.norm(latents)
        told = self.kv(torch.cat((self.norm_seen(seen), own), dim=1)).chunk(2, dim=2)
        q, k, v = (z.unflatten(-1, (-1, self.WIDTH)).transpose(1, 2) for z in (self.q(own), *told))
        latents = latents + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return latents + self.feed(latents)
