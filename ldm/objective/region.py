"""A loss that counts where a picture says so, such as on a person before any background (`masked_loss` of kohya's scripts).

E weight(t) mean over places of region distance(output - target)
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from ldm.errors import Refusal
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Draw, InTraining


class Region(Regression):
    """Regression, each place of which counts as much as the field `mask` is white there; the parts are as in regression.

    The field is a picture of the same size, or a label map, of which 0 counts nothing. A mask that is black in most places makes
    the loss, and its gradient, so much smaller.
    """

    def __init__(self, mask: str = "mask", **parts: Any) -> None:
        super().__init__(**parts)
        self.mask = mask

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": ()}."""
        return {"loss": self.each(model.denoiser, x, cond, draw, self.region(batch, x))[0].mean()}

    def region(self, batch: Batch, x: Tensor) -> Tensor:
        """The batch's masks, (B, 3, h, w) in [-1, 1] or labels (B, h, w) -> (B, 1, H, W) in [0, 1], by area.

        Raises:
            Refusal: the batch has none.
        """
        if (mask := batch.get(self.mask)) is None:
            raise Refusal(
                f"objective=region reads the field '{self.mask}', where the loss counts, and there is only {sorted(batch)}: "
                f"+data.fields.{self.mask}=mask.png names the member of each sample that is white there."
            )
        white = (mask > 0).to(x)[:, None] if mask.ndim == 3 else mask.to(x).mean(1, keepdim=True) / 2 + 0.5
        return interpolate(white, x.shape[2:], mode="area")
