"""Autoencoders against an adversary, trained."""

import torch

from helpers.training import exact, small, trainer
from ldm.autoencoder.kl import KL
from ldm.autoencoder.vq import VQ
from ldm.loss.adversary import Hinge, PatchGAN
from ldm.training.optimizer.rate import Constant
from ldm.training.stage.adversary import Adversary
from ldm.training.stage.augment import Augment
from ldm.training.stage.autoencoding import Autoencoding

SIZE = {"channels": 2, "width": 8, "mult": (1, 2), "res_blocks": 1, "groups": 4}


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def adam(params):
    return torch.optim.Adam(params, lr=1e-3, betas=(0.5, 0.9))


def opponent(start=0, optimizer=adam, rate=None, **settings):
    return Adversary(PatchGAN(8, 1, 4), Hinge(), optimizer, rate or Constant(), start, **settings)


def stage_of(kind=KL, start=0, optimizer=adam, against=True, seed=0, **settings):
    """A tiny autoencoder with an adversary, that starts the same everywhere."""
    torch.manual_seed(seed)
    net = kind(**SIZE) if kind is KL else VQ(**SIZE, codes=16, dead=0.1)
    adversary = opponent(start, optimizer) if against else None
    stage = {"optimizer": optimizer, "rate": Constant(), "seed": 0, "batch": 8}
    return Autoencoding(net, None, 0.0, kl_weight=1e-3, adversary=adversary, augment=Augment(mirror=0.5), **stage, **settings)


def train_both(emoji_root, folder, **settings):
    """Four steps of a KL and of a VQ autoencoder against an adversary; -> tensors by name, on rank 0.

    In float64; the KL's gradients are clipped, the VQ's keep their length.
    """
    told = {}
    for kind, length in ((KL, 1.0), (VQ, None)):
        stage, data = exact(stage_of(kind, start=1, optimizer=sgd), small(emoji_root))
        made = trainer(folder, 4, enable_checkpointing=False, gradient_clip_val=length, **settings)
        made.fit(stage, data)
        stage.finish(data)
        told |= {f"{kind.__name__}.{name}": value for name, value in stage.state_dict().items()}
    return told if made.is_global_zero else {}
