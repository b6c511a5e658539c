"""Stage 3: trains a denoiser of whitened latents, told by its conditions."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.folder import save_model, with_parts
from ldm.model import LatentModel
from ldm.training.stage import Stage
from ldm.types import Batch, Draw, Moments, Objective


class Diffusion(Stage):
    """An objective over latents, encoded from `image` on the way, or read from the shards as `moments` (precompute.py)."""

    def __init__(self, model: LatentModel, objective: Objective, **stage: Any) -> None:
        super().__init__(**stage)
        self.model, self.objective = model, objective

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """batch: image (B, 3, h, w) or moments (B, 2C, H, W), and the conditions' fields -> what the objective says."""
        moments = self.moments(batch)
        x = moments.sample(draw.normal("posterior", moments.mean.shape[1:]))
        cond = self.model.conditioner(batch, draw=draw if self.training else None)
        return self.objective(self.model.denoiser, x, cond, draw)

    @torch.no_grad()
    def moments(self, batch: Batch) -> Moments:
        """batch: image or moments -> whitened moments of (B, C, H, W)."""
        if "moments" in batch:
            mean, std = batch["moments"].float().chunk(2, dim=1)
            return Moments(mean, std)
        return self.model.autoencoder.encode(batch["image"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint whose conditions are others.

        Raises:
            ValueError: names both models' conditions.
        """
        theirs, ours = (list((recipe.get("condition") or {}).keys()) for recipe in (checkpoint["recipe"], self.recipe))
        if theirs != ours:
            raise ValueError(
                f"The checkpoint was trained with the conditions {theirs}, this run has {ours}: condition=[{','.join(theirs)}] "
                "goes on with it; resume=never or another run_id begins anew."
            )

    def export(self, folder: Path) -> None:
        """Writes the model and, as sub-folders, the frozen models it needs: the folder stands on its own."""
        weights = {k: v for k, v in self.model.state_dict().items() if not self._is_frozen(f"model.{k}")}
        save_model(weights, with_parts(self.recipe, folder), folder)
