"""The whole road in minutes:  python quickstart.py [MINUTES]

Trains a CLIP, an autoencoder and a diffusion model on the emoji, draws, measures, and writes runs/quickstart/report.html.
Run again after an interruption, it goes on from the last finished stage.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.compose import compose_config
from ldm.files.folder import write_json
from ldm.files.table import once_a_minute
from ldm.run_id import VOLATILE

HOME = Path("runs/quickstart")
USUAL = 8  # minutes that the steps below are meant for, on two CPU cores
EXPERIMENTS = {"clip": "emoji/clip", "autoencoder": "emoji/autoencoder", "diffusion": "emoji/text"}
STEPS = {"clip": 120, "autoencoder": 750, "diffusion": 800}
SHORT = 2000  # steps of an autoencoder to which turned, upended and recoloured pictures cost more than they bring
THREADS = "callback@always=[preempt,guard,threads]"
PROMPTS = [
    "blue apple",
    "green fox",
    "red car",
    "yellow fish",
    "purple flower",
    "fox and apple",
    "cat face with crown",
    "clock on tree",
]
Timer = Callable[[str, Callable[[], Any]], Any]


def run(minutes: float) -> None:
    """Every stage in its turn; the three trainings' lengths grow with `minutes`."""
    import torch

    torch.set_num_threads(1)  # networks this small lose much by a second thread on a busy machine; training finds out
    steps = {stage: round(count * minutes / USUAL) for stage, count in STEPS.items()}
    set_aside({"minutes": minutes, "steps": steps, "recipes": [recipe_name(e) for e in EXPERIMENTS.values()]})
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        mark = HOME / f"{name}.seconds"
        if mark.is_file():
            print(f"== {name}: finished before", flush=True)
            seconds[name] = float(mark.read_text())
            return None
        print(f"== {name}", flush=True)
        start = time.time()
        result = work()
        seconds[name] = round(time.time() - start, 1)
        if name in ("data", "clip", "autoencoder", "latents", "diffusion"):
            mark.write_text(str(seconds[name]))
        return result

    train_all(timed, steps)
    numbers, shown = judge(timed)
    seconds["total"] = round(sum(seconds.values()), 1)
    metrics = {**numbers, "seconds": seconds, "minutes": minutes, "steps": steps, **surroundings()}
    write_json(metrics, HOME / "metrics.json")
    from ldm.report.quickstart import write_report

    write_report(HOME, metrics, shown)
    print(f"Took {seconds['total']:,.0f} s; every number is in {HOME / 'metrics.json'}. Look at it: {HOME / 'report.html'}")


def recipe_name(experiment: str) -> str:
    """The experiment's name and 8 hex digits of its config."""
    config = OmegaConf.to_container(compose_config("train", [f"experiment={experiment}", "resume=never"]), resolve=False)
    recipe = json.dumps({k: v for k, v in config.items() if k not in VOLATILE}, sort_keys=True)
    return f"{config['name']}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"


def set_aside(plan: dict[str, Any]) -> None:
    """Keeps a quickstart of another length or recipe: its folder is renamed, not overwritten or mixed with this one."""
    path = HOME / "plan.json"
    if path.is_file() and (before := json.loads(path.read_text())) != plan:
        aside = HOME.with_name(f"quickstart-{before['minutes']:g}-minutes-{int(path.stat().st_mtime)}")
        HOME.rename(aside)
        print(f"The quickstart that was made by another plan ({before['minutes']:g} minutes) is kept in {aside}")
    write_json(plan, path)


def train_all(timed: Timer, steps: dict[str, int]) -> None:
    """data -> clip -> autoencoder -> latents -> diffusion."""
    timed("data", prepare)
    for stage in ("clip", "autoencoder"):
        timed(stage, lambda stage=stage: train_one(stage, steps[stage], []))
    timed("latents", precompute_all)
    timed("diffusion", lambda: train_one("diffusion", steps["diffusion"], ["data=latents"]))


def prepare() -> None:
    """Writes the emoji shards."""
    from ldm.build import build

    build(compose_config("train").data).prepare_data()


def train_one(stage: str, steps: int, overrides: list[str]) -> None:
    """One stage into runs/quickstart/<stage>, validated, saved and shown at half of it and at its end."""
    from ldm.command.train import train

    often = max(steps // 2, 1)
    lengths = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={often}", f"callback.checkpoint.every={often}"]
    preview = {"autoencoder": "callback.reconstructions.every", "diffusion": "callback.drawings.every"}
    lengths += [f"{preview[stage]}={often}"] if stage in preview else []
    if stage == "autoencoder" and steps <= SHORT:
        lengths += [f"training.augment.{change}=0" for change in ("upend", "turn", "recolour")]
    arguments = [
        f"experiment={EXPERIMENTS[stage]}",
        f"run_id=quickstart/{stage}",
        *overrides,
        *lengths,
        THREADS,
        "callback.bar.summary=false",
    ]
    print("python train.py", *arguments, flush=True)
    train(compose_config("train", arguments, used=True))


def product_speed() -> float:
    """GFLOP/s of one core in products of float32 matrices, the best of a few: what the seconds are to be read beside."""
    import torch

    threads, seconds, matrix = torch.get_num_threads(), [], torch.rand(1024, 1024)
    torch.set_num_threads(1)
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return round(2 * 1024**3 / min(seconds) / 1e9, 1)


def precompute_all() -> None:
    """The latents of all pictures, once."""
    import shutil

    from ldm.command.precompute import precompute

    shutil.rmtree(HOME / "latents", ignore_errors=True)
    precompute(compose_config("precompute", [f"model={HOME}/autoencoder", f"out={HOME}/latents"]))


def judge(timed: Timer) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures and draws; -> the numbers, and the pictures for the report."""
    import torch

    from ldm.build import build
    from ldm.command.evaluate import evaluate
    from ldm.command.sample import sample
    from ldm.training.callback.evaluate import chosen

    model = f"model={HOME}/diffusion"
    config = compose_config("evaluate", [model, f"out={HOME}/evaluation"])
    numbers, pictures, metrics = timed("evaluate", lambda: evaluate(config))
    prompts = compose_config("sample", [model, f"out={HOME}/samples", "prompt=[" + ",".join(PROMPTS) + "]"])
    samples = timed("sample", lambda: sample(prompts))
    data = build(compose_config("train").data)
    rows = chosen(data, config.count)
    requests = data.on_after_batch_transfer(data.rows("train", rows), 0)
    held_out = data.on_after_batch_transfer(data.rows("val", range(len(data.val_set))), 0)["image"]
    shown = {
        "held_out": held_out,
        "reconstructed": pictures["reconstruction"],
        "captions": requests["caption"],
        "real": requests["image"],
        "drawn": pictures["drawing"],
        "matched": metrics["text_match"].matched.tolist(),
        "prompts": PROMPTS,
        "samples": samples,
    }
    return numbers, {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in shown.items()}


def surroundings() -> dict[str, Any]:
    """Hardware, versions and sizes, for the record."""
    import torch
    from safetensors import safe_open

    from ldm.files.process import cores

    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    files = {"clip": "open_clip_model", "autoencoder": "model", "diffusion": "model"}
    parameters = {}
    for stage, name in files.items():
        with safe_open(HOME / stage / f"{name}.safetensors", "pt") as weights:
            parameters[stage] = sum(torch.Size(weights.get_slice(key).get_shape()).numel() for key in weights.keys())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {"cpu": cpu, "cores": cores(), "gflops_per_core": product_speed(), "gpu": gpu, "torch": torch.__version__}
    return {"hardware": hardware, "parameters": parameters, "commit": commit}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="ldm quickstart", description=__doc__.splitlines()[0])
    once_a_minute()
    parser.add_argument("minutes", type=float, nargs="?", default=USUAL, help="about how long it may take on two CPU cores")
    run(parser.parse_args().minutes)
