"""Pictures, samples and tar members, and a Lightning module that records what it is fed."""

import gzip
import io

import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.training.feed import feed

COUNT = 10
ODD = """a=b, [c] {d} 'e' "f" $g (h) é"""  # a folder's name with all signs that mean something to Hydra, shells and globs


def picture(form="JPEG", mode="RGB", size=(16, 16), colour=None, **options):
    """The bytes of a picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour if colour is not None else 0).save(file, form, **options)
    return file.getvalue()


def samples(count=COUNT, **members):
    """Red pictures that grow darker, with captions."""
    for i in range(count):
        jpg = picture(colour=(250 - 20 * i, 0, 0), quality=95)
        yield {"__key__": f"{i:09d}", "jpg": jpg, "txt": f"red {i}", "cls": i, "json": record(i), **members}


def record(i):
    """What img2dataset says of a picture, in part."""
    hashed = f"{i % 7 + 1}" * 64
    return {"key": f"{i:09d}", "original_width": 64, "original_height": 16, "aesthetic": i, "sha256": hashed, "note": "x"}


def damages(data, header):
    """Ways to spoil a tar of which a sample's first header lies at `header`."""
    zeros, ones = bytes(512), b"\xff" * 512
    return {
        "cut inside data": data[: header + 600],
        "cut inside a header": data[: header + 100],
        "cut at a member": data[:header],
        "header of 0xff": data[:header] + ones + data[header + 512 :],
        "header zeroed": data[:header] + zeros + data[header + 512 :],
        "two zero blocks in the middle": data[:header] + zeros + zeros + data[header:],
        "no end mark": data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512),
        "ends early, cleanly": data[:header] + bytes(10240),
        "empty file": b"",
        "error page": b"<html><body>503 Service Unavailable</body></html>" * 40,
        "gzip": gzip.compress(data),
    }


class Recorder(pl.LightningModule):
    """Notes which positions it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen += list(zip(batch["position"].tolist(), batch["key"], strict=True))
        return self.weight.sum() * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["position"].tolist()

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches  # schedules ask for it, and so build the loader early
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, path, max_steps, accumulate=1, resume=None, callbacks=()):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        val_check_interval=accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **quiet,
    )
    model = Recorder()
    trainer.fit(model, feed(data), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(path)
    return model
