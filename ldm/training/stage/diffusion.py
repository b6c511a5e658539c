"""Stage 3: trains a denoiser of whitened latents, told by its conditions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.errors import TOO_LARGE, Refusal
from ldm.files.base import difference
from ldm.files.folder import save_model, with_parts
from ldm.model import LatentModel
from ldm.training.base import CAPTIONS, Stage
from ldm.training.callback.ema import average_of
from ldm.training.callback.levels import LEVELS, curve, level_errors
from ldm.training.feed import data_of
from ldm.training.optimizer.groups import parameter_groups
from ldm.training.optimizer.mup import MuP, check_optimizer
from ldm.training.parallel.sharded import whole
from ldm.training.resume import differences, keep_settings, line
from ldm.training.stage.beside import add_gradients, step_beside
from ldm.types import Batch, Cond, Critical, DataModule, Draw, Freezes, Meets, Moments, Objective

EVERY = 100  # batches whose latents are looked at
INTERVALS = 64  # of the times of validation: sample i is in interval i modulo 64


class Diffusion(Stage):
    """An objective over latents, encoded from `image` on the way, or read from the shards as `moments` (precompute.py)."""

    compiled, apart = ("model.denoiser.backbone",), ("objective",)

    def __init__(self, model: LatentModel, objective: Objective, parametrization: MuP | None = None, **stage: Any) -> None:
        super().__init__(**stage)
        self.parametrization = parametrization
        if parametrization is not None:
            parametrization.start(model)
        check_objective(objective)
        self.model, self.objective = model, objective
        self.weights: dict[str, Tensor] = {}
        self.average: Callable[[], LatentModel] = lambda: self.model
        self.asks = isinstance(objective, Meets) and objective.meet(model)
        for part in objective.frozen if isinstance(objective, Freezes) else ():
            objective.get_submodule(part).eval().requires_grad_(False)
            self.frozen += (f"objective.{part}",)
        self.critic = self._critic()
        self.resumed: dict[str, Any] | None = None
        self.encoded = 0  # batches in training
        self.told_of_cut: set[str] = set()

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """batch: image (B, 3, h, w) or moments (B, 2C, H, W), and the conditions' fields -> what the objective says."""
        return self.judged(batch, *self.given(batch, draw), draw)

    def judged(self, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents of the batch, cond: its condition -> what the objective says.

        Raises:
            Refusal: it says a loss for a second network, and names no modules that are to learn from it.
        """
        average = self.average if self.training else lambda: self.model  # which validation puts in the model's place itself
        learns = self.training and torch.is_grad_enabled()
        for p in self.critic:
            p.requires_grad_(learns)
        losses = self.objective(Trained(self.model, average), batch, x, cond, draw)
        if "critic" in losses and not self.critic:
            raise Refusal(
                f"{type(self.objective).__name__} gives the loss of a second network (critic), and does not say which it is: "
                "name its modules as `critic = (...)`, or add the loss to `loss`."
            )
        if "critic" in losses and learns:
            add_gradients(losses["critic"], self.critic, self.trainer)
        for p in self.critic:
            p.requires_grad_(False)  # which the gradient of `loss` only passes through
        return losses

    def _critic(self) -> list[nn.Parameter]:
        """The weights that the objective's `critic` trains; the main optimizer and averages do not see them."""
        names = self.objective.critic if isinstance(self.objective, Critical) else ()
        weights = [p for name in names for p in self.objective.get_submodule(name).parameters() if p.requires_grad]
        if weights:
            self.beside = self.optimizer(parameter_groups((str(i), p) for i, p in enumerate(weights)))
            self.beside.register_load_state_dict_pre_hook(keep_settings)
            self.rates = [group["lr"] for group in self.beside.param_groups]
        for p in weights:
            p.requires_grad_(False)
        return weights

    def scales(self) -> Mapping[str, float]:
        """By name, what a parametrization by width multiplies rates by."""
        return {} if self.parametrization is None else self.parametrization.scales(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        """As any stage's, of the kind that a parametrization is for."""
        configured = super().configure_optimizers()
        if self.parametrization is not None:
            check_optimizer(configured["optimizer"])
        return configured

    def forget(self) -> None:
        """The critic's gradients."""
        for p in self.critic:
            p.grad = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Beside the main update, the critic's."""
        if self.critic:
            step_beside(self.beside, self.rates, self.rate, self.trainer, self.spoilt)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The critic's optimizer goes with the weights."""
        super().on_save_checkpoint(checkpoint)
        if self.critic:
            checkpoint["critic"] = self.beside.state_dict()

    def on_train_start(self) -> None:
        """From here on there is an average, made at most once; the critic's optimizer goes on where it stopped.

        Raises:
            Refusal: a word is to be learned that no caption holds.
        """
        check_words(self.model, data_of(self.trainer))
        self.average = cache(partial(average_of, self.trainer, self, "model"))
        if self.critic and self.device_mesh is not None:
            raise Refusal("trainer=fsdp shares out the model's weights and not those of a critic: use trainer=ddp.")
        if self.critic and self.resumed is not None:
            self.beside.load_state_dict(self.resumed)

    def train(self, mode: bool = True) -> "Diffusion":
        """As in torch, but what is frozen stays in evaluation mode."""
        super().train(mode)
        frozen = set(self.frozen)
        for name, module in self.named_modules():
            if name in frozen:
                module.eval()
        return self

    def given(self, batch: Batch, draw: Draw) -> tuple[Tensor, Cond]:
        """batch -> sampled latents: (B, C, H, W), and the condition, dropped now and then in training.

        In training an objective that asks for conditions itself is given an empty one.
        """
        moments = self.moments(batch)
        x = moments.sample(draw.normal("posterior", moments.mean.shape[1:]))
        if self.training and self.asks:
            return x, Cond()
        return x, self.model.conditioner(batch, draw=draw if self.training else None)

    def on_train_batch_end(self, *_: Any) -> None:
        """Says once how many captions are cut."""
        self._tell_of_cut(CAPTIONS)

    def on_train_end(self) -> None:
        """A training of few captions says it now."""
        self._tell_of_cut(1)

    def _tell_of_cut(self, least: int) -> None:
        for name, embedder in self.model.conditioner.embedders.items() if self.global_rank == 0 else ():
            cut = embedder.cut
            if cut is not None and cut.cut and cut.seen >= least and name not in self.told_of_cut:
                self.told_of_cut.add(name)
                print(f"condition.{name}: {cut}", flush=True)

    def on_validation_epoch_start(self) -> None:
        """Begins the curve of errors."""
        self.level_sums = torch.zeros(2, len(LEVELS), device=self.device)

    def validation_step(self, batch: Batch, _: int) -> None:
        """The objective's losses and the error by noise level, at times and noise that belong to the sample.

        So they are the same at every validation, whatever the run's seed, batch size or number of devices.
        """
        draw = Draw(0, batch["position"], INTERVALS, self.trainer.global_step)
        x, cond = self.given(batch, draw)
        losses = self.judged(batch, x, cond, draw)
        self.log_dict({f"val/{k}": v for k, v in losses.items()}, batch_size=len(x), sync_dist=True)
        self.level_sums += level_errors(self.model.denoiser, x, cond, draw)

    def on_validation_epoch_end(self) -> None:
        """Logs the curve as val/error and val/error/log_snr_+2 and so on."""
        self.log_dict(curve(self.level_sums), sync_dist=True)

    @torch.no_grad()
    def moments(self, batch: Batch) -> Moments:
        """batch: image or moments -> whitened moments of (B, C, H, W)."""
        if "moments" in batch:
            mean, std = batch["moments"].float().chunk(2, dim=1)
            return Moments(mean, std)
        moments = self.model.autoencoder.encode(batch["image"])
        if self.training and not moments.mean.is_meta:
            if self.encoded % EVERY == 0:  # a look makes the host wait for the device
                check_finite(moments, batch["image"])
            self.encoded += 1
        return moments

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint whose conditions, schedule, prediction or level, or whose base, are others.

        Raises:
            Refusal: names both.
        """
        before, now = (recipe.get("base") or {} for recipe in (checkpoint["recipe"], self.recipe))
        if bool(before) != bool(now) or difference(before, now):
            raise Refusal(
                f"The checkpoint's adapters were trained on {before or 'no base'}; model.init has {now or 'no base'} now. Name "
                "the base they were trained on, or begin another run: run_id=NAME (or resume=never)."
            )
        self.resumed = checkpoint.get("critic")
        saved, ours = (list((recipe.get("condition") or {}).keys()) for recipe in (checkpoint["recipe"], self.recipe))
        if saved != ours:
            raise Refusal(
                f"The checkpoint was trained with the conditions {saved}, this run has {ours}: condition=[{','.join(saved)}] "
                "goes on with it; resume=never or another run_id begins anew."
            )
        read = [
            {name: recipe.get(name) for name in ("schedule", "prediction", "level")}
            for recipe in (checkpoint["recipe"], self.recipe)
        ]
        if others := list(differences((read[0], read[0]), (read[1], read[1]))):
            raise Refusal(
                f"The network in the checkpoint learned with another {'; '.join(map(line, others))}. Give the run what it had, "
                "with training=finetune the same model.init, or begin another run: run_id=NAME."
            )
        super().on_load_checkpoint(checkpoint)

    def parts(self) -> list[nn.Module]:
        """The backbone, and those conditions and objectives that are trained."""
        others = [*self.model.conditioner.embedders.values(), self.objective]
        trained = [m for m in others if isinstance(m, nn.Module) and any(p.requires_grad for p in m.parameters())]
        return [self.model.denoiser.backbone, *trained]

    def finish(self, data: DataModule) -> None:
        """Gathers what is exported."""
        trained = self.without_frozen(self.model.state_dict(), "model.")
        self.weights = {name: whole(weight, self.global_rank == 0) for name, weight in trained.items()}

    def export(self, folder: Path) -> None:
        """Writes the model and, as sub-folders, the frozen models it needs: the folder stands on its own."""
        if not self.weights:
            self.finish(None)
        save_model(self.weights, with_parts(self.recipe, folder), folder)


@dataclass(frozen=True)
class Trained:
    """What an objective is given: a model under training and, made when it is asked for, its average."""

    model: LatentModel
    averaged: Callable[[], LatentModel]

    @property
    def denoiser(self) -> nn.Module:
        """The model's."""
        return self.model.denoiser

    @property
    def conditioner(self) -> nn.Module:
        """The model's."""
        return self.model.conditioner

    @property
    def average(self) -> LatentModel:
        """The model with averaged weights; the model itself before training and in validation, where it is that."""
        return self.averaged()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> the autoencoder's moments."""
        return self.model.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> the autoencoder's pictures, with gradients."""
        return self.model.autoencoder.decode(latents)

    def condition(self, request: Batch, only: Sequence[str] | None = None) -> Cond:
        """As the model's."""
        return self.model.condition(request, only)


def check_objective(objective: Objective) -> None:
    """Raises ValueError where an objective cannot be called as (model, batch, x, cond, draw)."""
    call = objective.forward if isinstance(objective, nn.Module) else objective
    try:
        signature(call).bind(*[None] * 5)
    except TypeError as error:
        raise Refusal(
            f"objective={type(objective).__name__} takes {signature(call)}; an objective is called with (model, batch, x, cond, "
            "draw), where model.denoiser is what was once the first argument."
        ) from error


def check_words(model: LatentModel, data: DataModule) -> None:
    """Raises ValueError where a text tower is to learn a word that no caption holds."""
    words = {word for embedder in model.conditioner.embedders.values() for word in embedder.taught}
    captions = [caption.lower() for caption in data.train_set.captions()] if words else []
    for word in sorted(words):
        if not any(word.lower() in caption for caption in captions):
            raise Refusal(
                f"none of the {len(captions)} captions holds {word} (data=dreambooth: data.prompt), which is to be learned."
            )


def check_finite(moments: Moments, images: Tensor) -> None:
    """Refuses latents that are not finite though the pictures, (B, 3, h, w), are: in 16 bits numbers end at 65504.

    Raises:
        Refusal: names what to change.
    """
    good = moments.mean.isfinite().all() & moments.std.isfinite().all()
    if not good and images.isfinite().all():
        raise Refusal(
            f"The frozen autoencoder's latents are not finite: {TOO_LARGE} (autoencoder.path=FOLDER), train with "
            "trainer.precision=bf16-mixed or 32-true, or make latents ahead of time (precompute.py)."
        )
