"""What the three training stages share: optimizer, randomness by position, and what a checkpoint holds."""

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldm.errors import Refusal
from ldm.files.folder import FORMAT
from ldm.files.lightning import are_logs_due, scaler_of
from ldm.files.process import met
from ldm.files.weights import weights_hash
from ldm.model import LatentModel
from ldm.training.optimizer.groups import parameter_groups
from ldm.training.parallel.layout import lay_out, lay_state_out
from ldm.training.parallel.sharded import shard
from ldm.training.resume import Rates, keep_settings
from ldm.types import Batch, DataModule, Draw

CAPTIONS = 1000  # after so many it is said how many a text tower cuts


class Stage(pl.LightningModule):
    """One stage of training. A subclass says its losses and what it exports.

    `recipe`, set by build.py, is the plain config that builds the exported model again.

    Args:
        optimizer: makes it from groups of weights.
        rate: update, from 0 -> what every group's learning rate is multiplied by.
        seed: of all random numbers.
        batch: samples of the global batch.
        frozen: the parts that a checkpoint leaves out, because they come from elsewhere.
        groups: what the optimizer does otherwise for some weights (groups.py).
    """

    trains: str = "model"  # the part that is exported: weights and settings of it can be taken from elsewhere (model.init)
    compiled: tuple[str, ...] = ()  # the networks that take the time: what callbacks compile, or recompute
    began: str | None = None  # sha256 of the finished model that fine-tuning began from
    content: dict[str, str] | None = None  # sha256 of each frozen part, once it is known
    apart: tuple[str, ...] = ()  # what is trained but serves training alone: no averages of it are kept

    def __init__(
        self,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        rate: Callable[[int], float],
        seed: int,
        batch: int,
        frozen: Iterable[str] = (),
        groups: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.recipe: Mapping[str, Any]
        self.spoilt: Tensor | None = None  # () bool, whether the update under way is left out; guard.py says it
        self.norm: Tensor | None = None  # (), the length of its gradient before it is clipped, where guard.py measured it
        self.optimizer, self.rate, self.seed, self.batch = optimizer, rate, seed, batch
        self.recipe, self.frozen, self.groups = {}, tuple(frozen), groups

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Scalars to log, among them `loss`."""
        raise NotImplementedError

    def latent_model(self) -> LatentModel | None:
        """The latent model among this stage's own modules; None where another part is trained."""
        return next((module for module in self.children() if isinstance(module, LatentModel)), None)

    def forget(self) -> None:
        """Undoes what `losses` leaves behind in training, where it was asked for to be measured only."""

    def finish(self, data: DataModule) -> None:
        """Measures what the exported model needs, once, after training, on every rank."""

    def export(self, folder: Path) -> None:
        """Writes the trained model into a folder, on rank 0."""
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        """The networks that are trained, for trainer=fsdp to share out; each must be run by calling it.

        Raises:
            Refusal: this stage has none such.
        """
        raise Refusal(
            f"trainer=fsdp shares out the weights of a diffusion model; what {type(self).__name__} trains fits on one device: "
            "use trainer=ddp."
        )

    def configure_model(self) -> None:
        """Lays weights out as the device likes them, or shares them out over the ranks where the trainer's strategy wants it."""
        if self.device_mesh is None:
            laid = {*self.compiled, *self.frozen}
            lay_out((module for name, module in self.named_modules() if name in laid), self.trainer.strategy.root_device)
            return
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        shard(self.parts(), self.device_mesh["data_parallel"])
        left = [name for name, p in self.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if left:
            raise Refusal(f"trainer=fsdp: {left[0]} is trained but in none of {type(self).__name__}.parts(); use trainer=ddp.")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves all but the integers of each sample, (B): position, labels and sizes are read here, and whoever asks a device
        for a number waits for all that it has yet to do.
        """
        here = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim == 1 and not v.is_floating_point()}
        moved = super().transfer_batch_to_device({k: v for k, v in batch.items() if k not in here}, device, dataloader_idx)
        return {**moved, **here}

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """One update of the main optimizer."""
        losses = self.losses(batch, Draw(self.seed, batch["position"], self.batch, self.trainer.global_step))
        if self.is_logged():
            self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, batch_size=len(batch["position"]))
        return losses["loss"]

    def is_logged(self) -> bool:
        """Whether the loggers want this step's numbers: to give Lightning those of the others costs half a millisecond each."""
        return are_logs_due(self.trainer)

    def validation_step(self, batch: Batch, _: int) -> None:
        """Losses at random numbers that are the same at every validation, whatever the run's seed."""
        losses = self.losses(batch, Draw(0, batch["position"], self.batch, self.trainer.global_step))
        self.log_dict({f"val/{k}": v for k, v in losses.items()}, batch_size=len(batch["position"]), sync_dist=True)

    def scales(self) -> Mapping[str, float]:
        """By name, what the rates of weights are multiplied by, beside what `groups` say."""
        return {}

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over what is trained, its rate told step by step."""
        optimizer = self.optimizer(parameter_groups(self.named_parameters(), self.groups, self.scales()))
        optimizer.register_load_state_dict_pre_hook(keep_settings)
        optimizer.register_load_state_dict_post_hook(lay_state_out)
        scales = [group.get("scale", 1.0) for group in optimizer.param_groups]
        rates = [lambda step, scale=scale: scale * self.rate(step) for scale in scales]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Rates(optimizer, rates), "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips as the trainer says. Lightning refuses that to fused optimizers under autocast, since these unscale fp16's
        gradients in their own step; torch lets it be done before.
        """
        scaler = scaler_of(self.trainer)
        if gradient_clip_val and scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        clip(self.trainer, optimizer, self.norm)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint holds: everything but the frozen parts."""
        return self.without_frozen(super().state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a checkpoint; nothing but the frozen parts may be missing.

        Raises:
            Refusal: the checkpoint is of another model; names what differs.
        """
        state = self.state_dict()
        wrong = [f"{k}: missing" for k in state.keys() - state_dict.keys()]
        wrong += [f"{k}: not of this model" for k in state_dict.keys() - state.keys()]
        wrong += [
            f"{k}: {tuple(state_dict[k].shape)} instead of {tuple(state[k].shape)}"
            for k in state.keys() & state_dict.keys()
            if state[k].shape != state_dict[k].shape
        ]
        if wrong:
            few = "; ".join(sorted(wrong)[:5])
            raise Refusal(
                f"This checkpoint is of another model ({len(wrong)} entries differ): {few}. Use the config it was trained with "
                "(config.yaml beside it), resume=never, or another run_id."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the model's recipe, and the format's number, beside its weights: plain containers only."""
        checkpoint["format"] = FORMAT
        checkpoint["recipe"] = dict(self.recipe)
        checkpoint["frozen"] = self.frozen_content()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the frozen parts, which come from elsewhere, with those that the checkpoint was trained with.

        Raises:
            Refusal: one is another now; names each.
        """
        before = checkpoint.get("frozen", {})  # of an earlier version that kept none, nothing is known
        if other := [part for part, now in self.frozen_content().items() if before.get(part, now) != now]:
            raise Refusal(
                f"The frozen {', '.join(other)}, read from elsewhere, is not what the checkpoint was trained with: its files "
                "have changed. Put back what was there, or begin another run: run_id=NAME, from these weights with model.init=..."
            )

    def frozen_content(self) -> dict[str, str]:
        """Frozen part -> sha256 of its weights, found once. Of a base that adapters are trained on the recipe has it."""
        if self.content is None:
            modules = {} if self.recipe.get("base") else dict(self.named_modules())
            there = [part for part in self.frozen if part in modules and modules[part].state_dict()]
            self.content = {part: weights_hash(modules[part]) for part in there}
        return self.content

    def without_frozen(self, state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """A state dict, whose names begin here with `prefix`, without what comes from elsewhere."""
        frozen = set(self.frozen)
        begins = {k: accumulate(f"{prefix}{k}".split("."), "{}.{}".format) for k in state}
        return {k: v for k, v in state.items() if not any(begin in frozen for begin in begins[k])}


def reduce_sum(value: Tensor) -> Tensor:
    """Sums a tensor over all ranks; itself where there is one."""
    if met():
        torch.distributed.all_reduce(value)
    return value


def clip(trainer: pl.Trainer, optimizer: Optimizer, norm: Tensor | None = None) -> None:
    """Clips gradients, unscaled before, by what the trainer says. norm: (), the length of all of them, where it is known."""
    how = pl.utilities.GradClipAlgorithmType(trainer.gradient_clip_algorithm or "norm")
    most = trainer.gradient_clip_val or 0.0
    if norm is None or not most or how != pl.utilities.GradClipAlgorithmType.NORM:
        Precision.clip_gradients(trainer.precision_plugin, optimizer, most, how)
        return
    torch.nn.utils.clip_grads_with_norm_((p for group in optimizer.param_groups for p in group["params"]), most, norm)
