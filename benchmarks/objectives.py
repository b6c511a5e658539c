"""What objectives do for the emoji model at equal processor time:  python -m benchmarks.objectives unet|dit|steps [--seconds 40]

`unet` and `dit` train experiment=emoji/text and emoji/dit_text plainly and with one addition each, from the quickstart's
autoencoder and CLIP, every run for as many steps as fit into the seconds of one core that are given. `steps` trains models
that draw in 1, 2 and 4 steps, from data alone or from the quickstart's model, which stands beside them with 20 steps. What
has been trained or measured is kept in runs/objectives and not done again; the table is printed last.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from ldm.files.folder import write_json

HOME, BASE = Path("runs/objectives"), "runs/quickstart/diffusion"
ALIGN = ["objective.layer=4", "objective.width=64", "objective.hidden=256"]
ALIGN_DIT = ["objective.layer=2", "objective.width=128", "objective.hidden=256"]
ROUTE = ["objective.first=1", "objective.last=-1"]
FLOW_MAP = ["model.span=64", "level=data_time"]
DISTILLED = [f"model.init={BASE}"]
ROWS = {
    "unet": {
        "plain": ["experiment=emoji/text"],
        "align": ["experiment=emoji/text", "objective=align", *ALIGN],
        "contrastive": ["experiment=emoji/text", "objective=contrastive"],
        "coupled noise": ["experiment=emoji/text", "objective/noise=coupled"],
        "align, contrastive": ["experiment=emoji/text", "objective=align", *ALIGN, "objective@objective.of=contrastive"],
    },
    "dit": {
        "plain": ["experiment=emoji/dit_text"],
        "align": ["experiment=emoji/dit_text", "objective=align", *ALIGN_DIT],
        "route": ["experiment=emoji/dit_text", "objective=route", *ROUTE],
        "masked": ["experiment=emoji/dit_text", "objective=masked"],
    },
    "steps": {
        "mean_flow": ["experiment=emoji/text", "objective=mean_flow", *FLOW_MAP],
        "shortcut": ["experiment=emoji/text", "objective=shortcut", *FLOW_MAP],
        "consistency": [
            "experiment=emoji/text",
            "objective=consistency",
            "level=data_time",
            "schedule=cosine",
            "prediction=velocity",
        ],
        "dmd": ["experiment=emoji/text", "objective=dmd", *DISTILLED],
        "latent_consistency": ["experiment=emoji/text", "objective=latent_consistency", "objective/distance=huber", *DISTILLED],
    },
}
SAMPLER = {"mean_flow": "flow_map", "shortcut": "flow_map"}
FIGURES = ["text_match_top1", "fd_clip", "vendi"]
METRICS = [
    "metric=[text_match,frechet_clip,vendi]",
    "extractor@metric.vendi.extractor=clip",
    "metric.vendi.weights=null",
    "count=256",
]


def command(*words):
    """Runs `ldm WORDS` on one core; -> seconds of processor it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ldm", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def trained(words, folder, steps, seed=0):
    short = [f"trainer.max_steps={steps}", "callback.drawings.every=100000", "logger=[]", "trainer.val_check_interval=100000"]
    return command("train", *words, f"folder={folder}", f"seed={seed}", *short)


def cost(words, folder):
    """-> seconds of processor that a step takes: the least of two differences of 60 steps and 20."""
    return min(trained(words, f"{folder}-{i}b", 60) - trained(words, f"{folder}-{i}a", 20) for i in range(2)) / 40


def measured(model, out, *words):
    command("evaluate", f"model={model}", f"out={out}", *METRICS, *words)
    found = json.loads((Path(out) / "metrics.json").read_text())
    return {name: found[name]["value"] for name in FIGURES}


class Kept:
    """Figures by name, written after each."""

    def __init__(self, path):
        self.path = path
        self.found = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, name, make):
        if name not in self.found:
            self.found[name] = make()
            write_json(self.found, self.path)
        return self.found[name]


def settings(table, name, steps):
    """-> how the models of a row are drawn from, in so many steps."""
    sampler = SAMPLER.get(name, "consistency") if table == "steps" else "dpmpp"
    return [f"sampler={sampler}", f"sampler.steps={steps}", *(["guidance=none"] if table == "steps" else [])]


def figures(table, seeds, seconds):
    """-> of each row: its steps, and the figures by seed and steps of drawing."""
    kept, found = Kept(HOME / f"{table}.json"), {}
    for name, words in ROWS[table].items():
        folder = HOME / table / name.replace(", ", "-").replace(" ", "-")
        step = kept.get(f"{name}: seconds a step", lambda: cost(words, folder))  # noqa: B023
        count = int(seconds / step)
        for seed in seeds:
            run = f"{folder}-{seed}-{count}"
            kept.get(f"{run}: seconds", lambda: trained(words, run, count, seed))  # noqa: B023
            for drawing in (1, 2, 4) if table == "steps" else (20,):
                ask = settings(table, name, drawing)
                one = kept.get(f"{run}: {drawing}", lambda: measured(run, f"{run}-{drawing}", *ask))  # noqa: B023
                found.setdefault((name, count, drawing), []).append(one)
    if table == "steps":
        base = kept.get("teacher", lambda: measured(BASE, HOME / "teacher", "sampler.steps=20"))
        found["the teacher", 800, 20] = [base]
    return found


def cell(numbers):
    spread = f" ± {statistics.stdev(numbers) / len(numbers) ** 0.5:.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=40.0, help="of one core, for the steps of each run")
    asked = parser.parse_args()
    found = figures(asked.table, asked.seeds, asked.seconds)
    print(f"| objective | steps trained | steps drawn | {' | '.join(FIGURES)} |\n|{'---|' * (3 + len(FIGURES))}")
    for (name, steps, drawing), runs in found.items():
        cells = [cell([run[figure] for run in runs]) for figure in FIGURES]
        print(f"| {name} | {steps} | {drawing} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
