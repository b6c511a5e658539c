"""Models for the page, small and untrained, and the session behind it."""

import io
from pathlib import Path

import torch
from PIL import Image

from ldm.build import build
from ldm.command.draw import session_of
from ldm.compose import compose_config
from ldm.files.folder import save_model

SIZE = 8
LABELS = ["Animals & Nature", "Food, Drink", "Flags"]
CONDITIONS = {
    "text": {"_target_": "ldm.condition.transcript.Transcript", "width": 16, "depth": 1, "heads": 2},
    "label": {"_target_": "ldm.condition.label.Label", "classes": LABELS, "width": 16},
    "boxes": {"_target_": "ldm.condition.layout.Layout", "classes": 4, "width": 16, "depth": 1, "heads": 2},
    "map": {"_target_": "ldm.condition.semantic.Semantic", "_partial_": True, "classes": 4},
    "hole": {"_target_": "ldm.condition.inpaint.Inpaint", "_partial_": True},
    "depth": {"_target_": "ldm.condition.picture.Picture", "_partial_": True, "how": "pooled"},
    "score": {"_target_": "ldm.condition.number.Number", "fields": {"score": 5.0}, "width": 16},
}
USUAL = {
    "resolution": [SIZE, SIZE],
    "sampler": {"_target_": "ldm.sampler.euler_ancestral.EulerAncestral", "steps": 3},
    "guidance": {"_target_": "ldm.guidance.cfg.CFG", "scale": 2.0},
}


def save_small(folder, conditions, seed=0):
    """A pixel model with some of CONDITIONS, at rest; -> its folder."""
    recipe = {
        "_target_": "ldm.build.assemble",
        "autoencoder": {"_target_": "ldm.autoencoder.identity.Identity"},
        "condition": {name: CONDITIONS[name] for name in conditions},
        "backbone": {"_target_": "ldm.backbone.mlp.MLP", "_partial_": True, "size": SIZE, "width": 32},
        "schedule": {"_target_": "ldm.schedule.Linear"},
        "prediction": {"_target_": "ldm.prediction.Flow"},
        "level": {"_target_": "ldm.denoiser.LogRatio"},
    }
    torch.manual_seed(seed)
    save_model(build(recipe).state_dict(), {**recipe, "usual": USUAL}, folder)
    return folder


def session(models, out, **settings):
    """The session of `ldm draw`, its models read."""
    words = [f"{name}={value}" for name, value in settings.items()]
    listed = f"[{','.join(map(str, models))}]" if isinstance(models, list) else models
    made = session_of(compose_config("draw", [f"model={listed}", f"out={out}", "device=cpu", *words]))
    made.load()
    return made


def drawn(made, said, given=None):
    """Draws -> what the page was told: notes, steps, drawings."""
    events = []
    made.draw(said, given or {}, events.append, lambda: False)
    return events


def picture(mode="RGB", size=(SIZE, SIZE), colour=(200, 30, 30), form="PNG"):
    """The bytes of a file."""
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, form)
    return stream.getvalue()


def half_mask():
    """White on the left."""
    image, stream = Image.new("RGB", (SIZE, SIZE)), io.BytesIO()
    image.paste((255, 255, 255), (0, 0, SIZE // 2, SIZE))
    image.save(stream, "PNG")
    return stream.getvalue()


def labels(values):
    """Labels as the page paints them, red + 256 green: rows of integers -> the bytes of a BMP."""
    image, stream = Image.new("RGB", (len(values[0]), len(values))), io.BytesIO()
    image.putdata([(value % 256, value // 256, 0) for row in values for value in row])
    image.save(stream, "BMP")
    return stream.getvalue()


def bytes_of(drawing, out):
    """The files of a drawing's pictures."""
    return [(Path(out) / drawing["folder"] / name).read_bytes() for name in drawing["pictures"]]
