"""A small model at rest, and how it is fine-tuned on emoji."""

import torch
from torch import nn

from ldm.build import build
from ldm.compose import compose_config
from ldm.files.content import file_content
from ldm.files.folder import save_model, with_parts

UNET = {"_target_": "ldm.backbone.unet.UNet", "_partial_": True, "width": 8, "mult": [1, 2], "res_blocks": 1, "depth": [1, 0]}
UNET |= {"heads": 2, "groups": 4}
X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.8])


def at_rest(folder, condition, backbone=UNET):
    """A model of 3 x 8 x 8 pictures with random weights that leave no branch silent, exported; -> its folder."""
    torch.manual_seed(0)
    recipe = {"_target_": "ldm.build.assemble", "autoencoder": {"_target_": "ldm.autoencoder.identity.Identity"}}
    recipe |= {"condition": condition, "backbone": backbone, "schedule": {"_target_": "ldm.schedule.Linear"}}
    recipe |= {"prediction": {"_target_": "ldm.prediction.Flow"}, "level": {"_target_": "ldm.denoiser.LogRatio"}}
    model = build(recipe)
    for p in model.denoiser.parameters():
        nn.init.normal_(p, std=0.1 if p.ndim < 2 else p[0].numel() ** -0.5)
    save_model({n: x for n, x in model.state_dict().items() if ".tower." not in n}, with_parts(recipe, folder), folder)
    return str(folder)


def text_of(clip_folder, **settings):
    """The condition of a local CLIP's text tower."""
    return {"_target_": "ldm.condition.text.Text", "model": f"local-dir:{clip_folder}", **settings}


def said(model, captions):
    """What a model's denoiser says at two noise levels, told two captions."""
    return model.denoiser(X, T, model.condition({"caption": captions}))


def sha(folder):
    """What adapters know their base by."""
    return file_content(f"{folder}/model.safetensors")


def command(base, folder, *more):
    """The config of a short fine-tuning on the CPU."""
    words = ["training=finetune", f"model.init={base}", "data.size=8", "data.batch=8", "data.workers=0", "logger=[]"]
    words += ["callback=[checkpoint]", f"folder={folder}", "callback.checkpoint.every=2", "trainer.accelerator=cpu"]
    return compose_config("train", [*words, "rate=constant", "trainer.val_check_interval=null", *more])
