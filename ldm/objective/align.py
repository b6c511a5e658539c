"""Hidden states that resemble a frozen network's: REPA (https://arxiv.org/abs/2410.06940), around any objective.

loss = of + align_weight * align,    align = - mean over patches of cos(projector(hidden), teacher)      (equation 8)
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from ldm.errors import Refusal
from ldm.objective._around import Around
from ldm.objective._ear import Ear, as_map, block_of
from ldm.objective.dmd import DMD
from ldm.objective.preference import Preference
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Draw, InTraining, Objective


class Teacher(Protocol):
    """A frozen network that tells what is where in a picture: extractors of timm and open_clip."""

    def patches(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) in [-1, 1] -> (B, D, h, w), without gradients."""


class Align(Around):
    """Another objective, and hidden states of the backbone that, projected, point where the teacher's features of the picture do.

    The projector is trained with the model and serves for nothing else: it is neither averaged nor exported. The teacher is
    in no checkpoint. Where the two see another number of patches, the teacher's are resized.

    Args:
        teacher: makes the frozen network.
        width: features of the hidden states: `backbone.width`, times `backbone.mult` at that level of a U-Net.
        layer: whose hidden states: 1 is the first of the backbone's blocks. The gradient of `align` reaches those up to it.
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
        width: int,
        layer: int = 8,
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
        self.projector = nn.Conv2d(width, outward, 3, padding=1) if projector == "convolution" else mlp(width, hidden, outward)
        self.ear = Ear()

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
        self.ear.put(block_of(model.denoiser.backbone, self.layer))
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
    if isinstance(of, DMD):
        raise Refusal(
            "objective=align around dmd: its network sees what it draws from noise itself, and never the batch's pictures, of "
            "which the teacher would tell. Align the model that it begins from, or use objective@objective.of=latent_consistency."
        )
    if isinstance(of, Preference):
        raise Refusal("objective=align around preference: its network sees two pictures of each request, and the teacher one.")


def mlp(inward: int, hidden: int, outward: int) -> nn.Module:
    """Three layers with SiLU, of each patch alone: (B, inward, h, w) -> (B, outward, h, w)."""
    first, second, third = nn.Conv2d(inward, hidden, 1), nn.Conv2d(hidden, hidden, 1), nn.Conv2d(hidden, outward, 1)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
