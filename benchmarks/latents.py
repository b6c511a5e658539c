"""What a training step costs on pictures, on latents, and on latents and embeddings:  python -m benchmarks.latents

The emoji's diffusion (experiment=emoji/text) with an untrained autoencoder and CLIP of their recipes: reading, encoding, loss,
backward pass. One process, one thread, process time, medians of interleaved rounds of 10 steps.
"""

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from ldm.build import build, build_stage
from ldm.command.precompute import precompute
from ldm.compose import compose_config
from ldm.types import Draw

TEXT = ["condition.text.layers=[0,-1]", "condition.text.pooled=true", "condition.text.whiten=false"]
CACHED = ["condition=[cached_text]"]
PARTS = [f"+data.fields.caption_{part}=text.{part}.npy" for part in ("tokens", "mask", "vector")]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        home, shared = Path(runs) / "quickstart", [f"runs={runs}", f"data.root={runs}/data"]
        write_untrained(home, shared)
        options = [f"model={home}/autoencoder", f"out={home}/latents", *shared, "condition=[text]", *TEXT, "half=true"]
        precompute(compose_config("precompute", options))
        latents = ["data=latents", f"runs={runs}", "autoencoder=cached"]
        ways = {
            "pictures and captions": [*shared, *TEXT],
            "latents and captions": [*latents, *TEXT],
            "latents and embeddings": [*latents, *CACHED, *PARTS],
        }
        race({name: steps(compose_config("train", ["experiment=emoji/text", *way])) for name, way in ways.items()}, rounds)


def write_untrained(home, shared):
    """Into the folder `home`, the CLIP and the autoencoder of the emoji's recipes; `shared` are settings of all commands."""
    for name in ("clip", "autoencoder"):
        stage = build_stage(compose_config("train", [f"experiment=emoji/{name}", *shared]))
        if name == "autoencoder":
            stage.autoencoder.count += 1  # as if its latents had been measured
        stage.export(home / name)


def steps(config):
    """Endless training steps."""
    stage, data = build_stage(config).train(), build(config.data)
    data.prepare_data()
    for batch in data.train_dataloader():
        batch = data.on_after_batch_transfer(batch)
        stage.losses(batch, Draw(0, batch["position"], config.data.batch))["loss"].backward()
        yield


def race(runs, rounds):
    """Goes 10 steps with each, one after the other, `rounds` times."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            list(islice(run, 10))
            seconds[name].append((time.process_time() - start) / 10)
    first = statistics.median(next(iter(seconds.values()))[1:])
    for name, times in seconds.items():
        each = statistics.median(times[1:])
        print(f"{name:24s} {each * 1e3:7.0f} ms a step  {first / each:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
