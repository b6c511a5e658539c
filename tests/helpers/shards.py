"""A model that writes down what it has seen, and its training."""

import json
import os
import time

import pytorch_lightning as pl
import torch

from ldm.data.shards import Shards
from ldm.training.callback.checkpoint import WholeCheckpointIO, checkpoint_callback
from ldm.training.feed import feed
from ldm.training.saved import newest
from ldm.types import Draw


class Tiny(pl.LightningModule):
    """A line through noisy, sometimes noiseless pixels, in float64; writes down all it is shown."""

    def __init__(self, file):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.file = torch.nn.Linear(12, 1, dtype=torch.float64), file

    def training_step(self, batch, _):
        draw = Draw(1, batch["position"], 8)
        noise, drop = draw.normal("noise", (12,)), draw.uniform("drop")
        levels = batch["image"].add(1).mul(127.5).round().flatten(1).tolist()
        for row in zip(batch["position"].tolist(), batch["key"], levels, noise[:, 0].tolist(), drop.tolist()):
            print(json.dumps([self.global_step, *row]), file=self.file, flush=True)
        return (self.net((batch["image"].flatten(1) + noise * (drop > 0.1)[:, None]).double()) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(shards, out, steps, devices=1, accumulate=1, workers=0):
    """Goes on from the newest checkpoint below `out`; -> the weights at the end."""
    (out / "seen").mkdir(parents=True, exist_ok=True)
    data = Shards(shards, fields={"image": "jpg"}, size=2, batch=8, crop="random", flip=0.5, window=1, workers=workers)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[checkpoint_callback(str(out / "checkpoints"), every=2)],
        plugins=[WholeCheckpointIO()],
        default_root_dir=out,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Tiny((out / "seen" / f"{time.time_ns()}-{os.getpid()}").open("w"))
    found = newest(out / "checkpoints")
    trainer.fit(module, feed(data), ckpt_path=None if found is None else str(found), weights_only=True)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), out / "end.pt")
