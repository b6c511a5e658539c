"""What each row of benchmarks/lab.py does, in a process of its own; what it has found it writes down after each round."""

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from argparse import Namespace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from torch.nn.functional import l1_loss

from benchmarks import sampling, steps
from benchmarks.autoencoder import peer_of
from benchmarks.lab import CACHE, CACHES, ROOT, write
from benchmarks.latents import write_untrained
from benchmarks.options import prepare
from benchmarks.race import race
from ldm.autoencoder.kl import KL, kl_divergence

PARTS = {"SD1.5": 20, "SD2": 16, "SDXL": 16, "DiT-XL/2": 18}  # what a width is divided by on a CPU
COMPILED = 25  # seconds of a row that its start takes


class Lab:
    """How a row is run: where, for how long, and where its numbers go."""

    def __init__(self, name, seconds, dry, out):
        self.name, self.dry, self.out = name, dry, out
        self.device = "cpu" if dry else "cuda"
        self.minutes = max(seconds - COMPILED, 1) / 60
        self.facts = {"torch": torch.__version__}

    def settings(self, network="SD2", **more):
        """What the benchmarks of networks are told; shrunken and not compiled on a CPU."""
        usual = {"device": self.device, "dtype": "float32", "rounds": 1 if self.dry else 40, "minutes": self.minutes, "part": 1}
        usual |= {"compile": not self.dry, "mode": "default", "bf16": True, "tell": None}
        return Namespace(**{**usual, **more, **({"part": PARTS[network], "batch": 1} if self.dry else {})})

    def keep(self, **facts):
        """Writes down what is known so far."""
        self.facts |= facts
        write(self.out / f"{self.name}.part.json", self.facts)

    def told(self, unit, of, result):
        """Takes a race's result so far; `of` maps seconds of a run of ours to the number of that unit."""
        low, high = min(result.ratios), max(result.ratios)
        self.keep(
            ratio=median(result.ratios),
            low=low,
            high=high,
            rounds=len(result.ratios),
            ours=median(result.ours),
            peer=median(result.theirs),
            apart=result.apart,
            memory=result.memory,
            first=result.first,
            numbers={unit: of(median(result.ours))},
        )


def run(name, seconds, dry, out, begin):
    """Runs a row, with what an earlier call compiled."""
    lab, file = Lab(name, seconds, dry, out), f"{name}.cache"
    if not dry:
        kept = next((path for path in (out / file, begin / file) if path.is_file()), None)
        if kept is not None:
            torch.compiler.load_cache_artifacts(zlib.decompress(kept.read_bytes()))
    WORK[name](lab)
    if not dry and (made := torch.compiler.save_cache_artifacts()) is not None:
        small = zlib.compress(made[0], 9)
        room = (out / file).is_file() or len(list(out.glob("*.cache"))) < CACHES
        print(f"compiled: {len(small) / 2**20:.1f} MiB", flush=True)
        if len(small) <= CACHE and room:
            (out / file).write_bytes(small)


def train_step(network, size, batch, lab, mode="default"):
    """A training step of a network beside diffusers'."""
    asked = lab.settings(network, batch=batch, mode=mode)
    asked.tell = partial(lab.told, "images/s", lambda seconds: asked.batch / seconds)
    steps.measure(network, 8 if lab.dry and network != "DiT-XL/2" else size, asked)


def draw(network, count, lab):
    """A picture beside diffusers'."""
    asked = lab.settings(network, batch=1, steps=2 if lab.dry else count, mode="reduce-overhead")
    asked.network, asked.dtype = network, "float32" if lab.dry else "bfloat16"
    asked.tell = partial(lab.told, "seconds", lambda seconds: seconds)
    sampling.measure("ddim", 8 if lab.dry else {"SD1.5": 64, "SDXL": 128}[network], asked)


# ---- the autoencoder


def autoencoder(lab):
    """-> KL-f8 and diffusers' with its weights."""
    shape = {"width": 8 if lab.dry else 128, "mult": (1, 2) if lab.dry else (1, 2, 4, 4), "groups": 4 if lab.dry else 32}
    torch.manual_seed(0)
    net = KL(**shape).eval()
    peer = peer_of(net, res_blocks=2, **shape)
    return net.to(lab.device), peer.to(lab.device)


def one_way(way, lab):
    """Encodes or decodes, in bfloat16."""
    net, peer = autoencoder(lab)
    side, asked = 16 if lab.dry else 512, lab.settings(batch=8)
    batch = asked.batch
    x = (
        torch.rand(batch, 3, side, side) * 2 - 1
        if way == "encode"
        else torch.randn(batch, 4, side // net.factor, side // net.factor)
    )
    x = x.to(lab.device, torch.float32 if lab.dry else torch.bfloat16)
    net, peer = net.to(x), peer.to(x)
    most = prepare(Namespace(**{**vars(asked), "compile": False}), net, peer)
    inner = (net.encoder, peer.encoder) if way == "encode" else (net.decoder, peer.decoder)
    for module in inner if asked.compile else ():
        module.to(memory_format=torch.channels_last).compile(dynamic=False)
    if way == "encode":
        works = (lambda: (net.encode(x).mean,), lambda: (peer.encode(x).latent_dist.mean,))
    else:
        works = (lambda: (net.decode(x),), lambda: (peer.decode(x).sample,))
    with torch.no_grad():
        tell = partial(lab.told, "images/s", lambda seconds: batch / seconds)
        race(*works, asked.rounds, asked.minutes, lab.device, most, tell)


def autoencoder_step(lab):
    """Both halves, L1 and the KL, gradients, AdamW; bfloat16 by autocast."""
    net, peer = autoencoder(lab)
    side, asked = 16 if lab.dry else 256, lab.settings(batch=8)
    x = (torch.rand(asked.batch, 3, side, side) * 2 - 1).to(lab.device)
    noise = torch.randn(asked.batch, 4, side // net.factor, side // net.factor, device=lab.device)
    prepare(Namespace(**{**vars(asked), "compile": False}), net, peer)
    for module in (net.encoder, net.decoder, peer.encoder, peer.decoder) if asked.compile else ():
        module.to(memory_format=torch.channels_last).compile(dynamic=False)

    def ours():
        moments = net.posterior(x)
        return net.reconstruct(moments.sample(noise)), moments.mean, moments.std

    def theirs():
        told = peer.encode(x).latent_dist
        return peer.decode(told.mean + told.std * noise).sample, told.mean, told.std

    def step(module, passes, **how):
        weights = list(module.parameters())
        optimizer = torch.optim.AdamW(weights, lr=1e-4, **how)

        def once():
            with torch.autocast(lab.device, torch.bfloat16):
                output, mean, std = passes()
            loss = l1_loss(output.float(), x) + 1e-6 * kl_divergence(mean, std)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return (loss.detach()[None],)

        return once

    tell = partial(lab.told, "images/s", lambda seconds: asked.batch / seconds)
    race(step(net, ours, fused=True), step(peer, theirs), asked.rounds, asked.minutes, lab.device, 5e-2, tell)


# ---- the small recipe, by train.py


class Clock(pl.Callback):
    """Seconds from the start of training to the end of steps; the device is waited for where one is noted."""

    def __init__(self, first, last):
        self.at, self.begun, self.seconds = (1, 10, first, last), 0.0, {}

    def on_train_start(self, *_):
        """Training begins."""
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer, *_):
        """Notes some steps."""
        if trainer.global_step in self.at:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[trainer.global_step] = time.perf_counter() - self.begun


def words(lab, runs, callbacks, last):
    """The command's words, with an untrained CLIP and autoencoder in `runs`."""
    shared = [f"runs={runs}", f"data.root={runs}/data"]
    write_untrained(Path(runs) / "quickstart", shared)
    length = [f"trainer.max_steps={last}", "trainer.val_check_interval=1000000", "run_id=lab", "logger=[csv]"]
    trainer = [] if lab.dry else ["trainer=gpu"]
    return ["experiment=emoji/text", *trainer, *shared, *length, "condition.text.whiten=false", f"callback=[{callbacks}]"]


def emoji(callbacks, lab):
    """`train.py experiment=emoji/text`, from the process' start on."""
    from ldm.command import train
    from ldm.compose import compose_config

    imported = time.time() - float(os.environ.get("LAB_STARTED", time.time()))
    first, last = (12, 14) if lab.dry else (100, 1100)
    clock, make = Clock(first, last), train._trainer
    train._trainer = lambda config, callbacks, **more: make(config, callbacks=[*callbacks, clock], **more)
    with tempfile.TemporaryDirectory() as runs:
        config = compose_config("train", words(lab, runs, callbacks, last))
        start = time.perf_counter()
        train.train(config)
    found = clock.seconds
    begun = imported + clock.begun - start + found[1]
    numbers = {"steps/s": (last - first) / (found[last] - found[first]), "s to the 10th step": found[10]}
    lab.keep(numbers=numbers | {"s from the process's start to the end of the first step": begun})


def loop(lab):
    """The same steps in a bare loop: losses, gradients, clipping, optimizer, average."""
    from ldm.build import build, build_stage
    from ldm.compose import compose_config
    from ldm.data.batch.ahead import ahead
    from ldm.types import Draw

    first, last = (2, 4) if lab.dry else (100, 1100)
    with tempfile.TemporaryDirectory() as runs:
        config = compose_config("train", words(lab, runs, "checkpoint,ema,bar", last))
        stage, data = build_stage(config).train().to(lab.device), build(config.data)
        data.prepare_data()
        optimizer = stage.configure_optimizers()["optimizer"]
        weights = [p for p in stage.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in weights]
        host = Namespace(strategy=Namespace(root_device=torch.device(lab.device)), lightning_module=stage)
        for i, batch in enumerate(islice(ahead(data.train_dataloader(), host), last)):
            if i == first:
                begun = now()
            batch = data.on_after_batch_transfer(batch)
            with torch.autocast(lab.device, torch.bfloat16, enabled=not lab.dry):
                loss = stage.losses(batch, Draw(0, batch["position"], config.data.batch, i))["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(average, [p.detach() for p in weights], 0.02)
        lab.keep(numbers={"steps/s": (last - first) / (now() - begun)})


def now():
    """Seconds, once the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def quickstart(lab):
    """The whole road, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "quickstart.py"), *(["0.1"] if lab.dry else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        start = time.time()
        subprocess.run(command, cwd=folder, env=environment, check=True)
        told = json.loads((Path(folder) / "runs" / "quickstart" / "metrics.json").read_text())
        lab.keep(numbers={"seconds": time.time() - start, **{f"s {name}": value for name, value in told["seconds"].items()}})


WORK = {
    "emoji": partial(emoji, "checkpoint,ema,bar"),
    "emoji-graph": partial(emoji, "checkpoint,ema,bar,graph"),
    "loop": loop,
    "quickstart": quickstart,
    "sd2-512": partial(train_step, "SD2", 64, 32),
    "sd2-256": partial(train_step, "SD2", 32, 128),
    "dit-xl-2": partial(train_step, "DiT-XL/2", 32, 64),
    "dit-xl-2-graphs": partial(train_step, "DiT-XL/2", 32, 64, mode="reduce-overhead"),
    "sdxl-1024": partial(train_step, "SDXL", 128, 4),
    "kl-encode": partial(one_way, "encode"),
    "kl-decode": partial(one_way, "decode"),
    "kl-step": autoencoder_step,
    "sd1.5-draw": partial(draw, "SD1.5", 50),
    "sdxl-draw": partial(draw, "SDXL", 30),
}
