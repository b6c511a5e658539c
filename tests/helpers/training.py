"""Small stages of each kind, small data, their trainer, and how weights are compared."""

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.adapt import attach
from ldm.adapter.controlnet import ControlNet
from ldm.adapter.lora import LoRA
from ldm.autoencoder.identity import Identity
from ldm.autoencoder.kl import KL
from ldm.backbone.unet import UNet
from ldm.condition.hint import Hint
from ldm.condition.label import Label
from ldm.conditioner import Conditioner
from ldm.data.shards import Shards
from ldm.denoiser import Denoiser, LogRatio
from ldm.model import LatentModel
from ldm.objective.contrastive import Contrastive
from ldm.objective.noise import Coupled
from ldm.objective.regression import Regression
from ldm.objective.time import LogitNormal
from ldm.prediction import Flow
from ldm.schedule import Linear
from ldm.training.callback.checkpoint import WholeCheckpointIO
from ldm.training.callback.ema import EMA
from ldm.training.feed import feed
from ldm.training.optimizer.muon import Muon
from ldm.training.optimizer.rate import Constant
from ldm.training.stage.augment import Augment
from ldm.training.stage.autoencoding import Autoencoding
from ldm.training.stage.contrast import Contrast
from ldm.training.stage.diffusion import Diffusion


def adam(params):
    return torch.optim.Adam(params, lr=1e-2)


def diffusion(seed=0, batch=8):
    """A class-conditional pixel diffusion of 8 x 8 pictures, tiny."""
    torch.manual_seed(seed)
    conditioner = Conditioner({"label": Label(9, 8, rate=0.2)})
    net = UNet(3, conditioner.widths, width=8, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    model = LatentModel(Identity(), conditioner, Denoiser(net, Linear(), Flow(), LogRatio()))
    stage = Diffusion(model=model, objective=Regression(LogitNormal()), optimizer=adam, rate=Constant(), seed=0, batch=batch)
    stage.frozen, stage.recipe = ("model.autoencoder",), {"a": 1}
    return stage


def teacher():
    """A finished model."""
    return diffusion().model.eval().requires_grad_(False)


def small(emoji_root, batch=8, size=8):
    from ldm.data.emoji import Emoji

    fields = {"image": "jpg", "label": "cls"}
    return Emoji(root=emoji_root, groups=["Activities"], val_fraction=0.2, batch=batch, fields=fields, size=size)


def exact(stage, data):
    """Both in float64: what sums up in another order is then the same to some 1e-13, also behind an adaptive optimizer."""
    transfer = data.on_after_batch_transfer

    def double(batch, i=0):
        batch = transfer(batch, i)
        return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}

    data.on_after_batch_transfer = double
    return stage.double(), data


def assert_same(found, wanted):
    """Tensors by name, from `exact` runs: half the digits of float64 agree, counted from each tensor's largest number.

    What was rounded to float32 agrees to two bits, and what is counted, exactly.
    """
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        share = {torch.float64: 2**-26, torch.float32: 2**-22}.get(value.dtype, 0)
        apart, largest = ((x.double().abs().max().item() if x.numel() else 0.0) for x in (found[name] - value, value))
        assert found[name].dtype == value.dtype and apart <= share * largest + 1e-15, f"{name}: {apart} of {largest}"


def trainer(folder, steps, **kwargs):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "plugins": [WholeCheckpointIO()],
        "enable_checkpointing": "callbacks" in kwargs,
    }
    return Trainer(**{**settings, **kwargs})


class Trainer(pl.Trainer):
    """Lightning's, which takes data of ours as `ldm.training.run.fit` hands them on."""

    def fit(self, stage, data=None, *loaders, **kwargs):
        super().fit(stage, feed(data) if isinstance(data, Shards) else data, *loaders, **kwargs)

    def validate(self, stage, data, **kwargs):
        super().validate(stage, feed(data), **kwargs)


def train(emoji_root, folder, legs, batch=8, **kwargs):
    """Trains in legs, each a new process as far as the objects know; -> the last stage and its average."""
    checkpoint = None
    for steps in legs:
        stage, ema = diffusion(seed=steps, batch=batch) if checkpoint else diffusion(batch=batch), EMA(0.9)
        run = trainer(folder, steps, callbacks=[ema], enable_checkpointing=False, gradient_clip_val=1.0, **kwargs)
        run.fit(stage, small(emoji_root, batch), ckpt_path=checkpoint, weights_only=True)
        checkpoint = folder / f"{len(legs)}-{steps}.ckpt"
        run.save_checkpoint(checkpoint, weights_only=False)
    return stage.state_dict(), ema.average


def contrast(clip):
    """A CLIP that starts the same everywhere."""
    torch.manual_seed(0)
    settings = {"rate": Constant(), "seed": 0, "batch": 8}
    return Contrast(clip, optimizer=lambda params: torch.optim.SGD(params, lr=0.05), **settings)


def autoencoder_stage():
    """A KL autoencoder that starts the same everywhere, without a perceptual loss."""
    torch.manual_seed(0)
    kl = KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4)
    settings = {"optimizer": Muon, "rate": Constant(), "seed": 0, "batch": 8}
    return Autoencoding(kl, None, perceptual_weight=0.0, kl_weight=1e-3, augment=Augment(mirror=0.5), **settings)


def train_all(emoji_root, folder, clip, **kwargs):
    """Three steps of each stage, and the statistics of an autoencoder; -> tensors by name, on rank 0."""
    told = {}
    coupled = diffusion()
    coupled.objective = Contrastive(noise=Coupled())
    stages = {"diffusion": diffusion(), "coupled": coupled, "contrast": contrast(clip), "autoencoding": autoencoder_stage()}
    for name, stage in stages.items():
        stage, data = exact(stage, captioned(emoji_root) if name == "contrast" else small(emoji_root))
        run = trainer(folder, 3, enable_checkpointing=False, **kwargs)
        run.fit(stage, data)
        if name == "autoencoding":
            stage.finish(data)
        told |= {f"{name}.{k}": v for k, v in stage.state_dict().items()}
    return told if run.is_global_zero else {}


def train_adapters(emoji_root, folder, **kwargs):
    """Three steps of a LoRA, and of a ControlNet that already speaks; -> tensors by name, on rank 0."""
    trained = {}
    for name, adapter in (("lora", LoRA(rank=2, targets="all")), ("controlnet", ControlNet(Hint, name="edges"))):
        stage, data = exact(diffusion(), small(emoji_root))
        attach(stage.model, {name: adapter}, {})
        for parameter in filter(lambda p: p.requires_grad, stage.double().parameters()):
            nn.init.normal_(parameter, std=0.1)
        data.fields = {**data.fields, "edges": "jpg"}
        run = trainer(folder, 3, enable_checkpointing=False, **kwargs)
        run.fit(stage, data)
        trained |= {f"{name}.{k}": v for k, v in stage.state_dict().items()}
    return trained if run.is_global_zero else {}


def captioned(emoji_root, batch=8):
    from ldm.data.emoji import Emoji

    return Emoji(root=emoji_root, groups=["Activities"], val_fraction=0.2, batch=batch)
