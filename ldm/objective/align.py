"""Hidden states that resemble a frozen network's: REPA (https://arxiv.org/abs/2410.06940), around any objective.

loss = of + align_weight * align,    align = - mean over patches of cos(projector(hidden), teacher)      (equation 8)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from ldm.errors import Refusal
from ldm.objective._around import Around, within
from ldm.objective._ear import Ear, as_map, block_of, features_of
from ldm.objective.dmd import DMD
from ldm.objective.preference import Preference
from ldm.objective.regression import Regression
from ldm.types import Backbone, Batch, Cond, Draw, InTraining, Objective, Widths


class Teacher(Protocol):
    """A frozen network that tells what is where in a picture: extractors of timm and open_clip."""

    def patches(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> (B, D, h, w), without gradients."""


class Align(Around):
    """Another objective, and hidden states of the backbone that, projected, point where the teacher's features of the picture do.

    The projector is trained with the model and serves for nothing else: it is neither averaged nor exported. The teacher is
    in no checkpoint. Where the two see another number of patches, the teacher's are resized.

    Args:
        teacher: makes the frozen network; `weights`, where given, are the argument of that name.
        width: features of the hidden states; None: what the model that it meets has there.
        layer: whose hidden states: 1 is the first of the backbone's blocks; None: 8, or of fewer blocks the middle one. The
            gradient of `align` reaches those up to it.
        align_weight: of the alignment; 0 leaves it out.
        until: the step from which on it is left out (https://arxiv.org/abs/2505.16792); None: never.
        projector: `mlp` has three layers, as in the paper; `convolution` is one of 3 x 3 (iREPA, https://arxiv.org/abs/2512.10794).
        hidden: features within the `mlp`.
        weights: of the teacher, handed to what makes it; None: its own default.
        of: makes the other objective.
        **parts: time, weight, noise and distance, of the other objective.

    Raises:
        Refusal: there is no such block, or its hidden states have another width; the batch has no pictures, or `of` sees others.
    """

    def __init__(
        self,
        teacher: Callable[..., Teacher],
        width: int | None = None,
        layer: int | None = None,
        align_weight: float = 0.5,
        until: int | None = None,
        projector: Literal["mlp", "convolution"] = "mlp",
        hidden: int = 2048,
        weights: str | None = None,
        of: Callable[..., Objective] = Regression,
        **parts: Any,
    ) -> None:
        super().__init__(of, **parts)
        self.teacher = teacher() if weights is None else teacher(weights=weights)
        self.width, self.layer, self.align_weight, self.until = width, layer, align_weight, until
        outward = self.teacher.patches(torch.zeros(1, 3, 32, 32)).shape[1]
        check_sees_the_batch(self.of)
        convolution = partial(nn.Conv2d, out_channels=outward, kernel_size=3, padding=1)
        self.make = convolution if projector == "convolution" else partial(mlp, hidden=hidden, outward=outward)
        self.projector = nn.Identity() if width is None else self.make(width)
        self.ear = Ear()

    def meet(self, model: Any) -> bool:
        """Makes the projector for the model's hidden states, where no width is said; -> as the other objective."""
        if self.width is None:
            denoiser, channels = model.denoiser, model.autoencoder.channels
            widths = model.conditioner.widths + Widths(vector=denoiser.span)
            self.width = features_of(denoiser.backbone, self.layer_of(denoiser.backbone), channels, widths)
            self.projector = self.make(self.width)
        return super().meet(model)

    def layer_of(self, backbone: Backbone) -> int:
        """Which block of the backbone is compared, which is settled when that is first known."""
        count = len(list(backbone.blocks))
        self.layer = self.layer or (8 if count >= 8 else (count + 1) // 2)
        return self.layer

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents of batch's `image` -> what `of` says, with `align` in [-1, 1] in its loss."""
        if self.align_weight == 0 or (self.until is not None and draw.step >= self.until):
            losses = self.of(model, batch, x, cond, draw)
            idle = sum(0 * p.sum() for p in self.projector.parameters())  # several processes wait for every weight's gradient
            return {**losses, "loss": losses["loss"] + idle}
        if "image" not in batch:
            raise Refusal(
                f"objective=align compares with what a teacher sees in the pictures, and the batch has {sorted(batch)}: encode "
                "on the way (data=shards), as latents made ahead of time have no `image`."
            )
        self.ear.put(block_of(model.denoiser.backbone, self.layer_of(model.denoiser.backbone)))
        losses = self.of(model, batch, x, cond, draw)
        align = self.alignment(as_map(self.ear.take(), x, model.denoiser.backbone), self.teacher.patches(batch["image"]))
        return {**losses, "loss": losses["loss"] + self.align_weight * align, "align": align}

    def alignment(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """hidden: (B, C, h, w), wanted: (B, D, h', w') -> (), the mean of -cos over patches."""
        if hidden.shape[1] != self.width:
            raise Refusal(
                f"Block {self.layer} of the backbone says {hidden.shape[1]} features a patch: objective.width={hidden.shape[1]} "
                f"(found {self.width})."
            )
        if wanted.shape[2:] != hidden.shape[2:]:
            wanted = interpolate(wanted.float(), hidden.shape[2:], mode="bilinear", antialias=True)
        said = self.projector(hidden)
        return -cosine_similarity(said.float(), wanted.float(), dim=1).mean()


def check_sees_the_batch(of: Objective) -> None:
    """Raises Refusal around an objective whose network does not see the batch's pictures, one a sample."""
    inside = list(within(of))
    if any(isinstance(one, DMD) for one in inside):
        raise Refusal(
            "objective=align around dmd: its network sees what it draws from noise itself, and never the batch's pictures, of "
            "which the teacher would tell. Align the model that it begins from, or use objective@objective.of=latent_consistency."
        )
    if any(isinstance(one, Preference) for one in inside):
        raise Refusal("objective=align around preference: its network sees two pictures of each request, and the teacher one.")


def mlp(inward: int, hidden: int, outward: int) -> nn.Module:
    """Three layers with SiLU, of each patch alone: (B, inward, h, w) -> (B, outward, h, w)."""
    first, second, third = nn.Conv2d(inward, hidden, 1), nn.Conv2d(hidden, hidden, 1), nn.Conv2d(hidden, outward, 1)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
