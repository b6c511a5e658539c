"""Measures a model:  python evaluate.py model=runs/quickstart/diffusion metric=[text_match,reconstruction] count=128 out=DIR"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.command_line import command


def evaluate(config: DictConfig) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Writes OUT/metrics.json, the protocol beside each number; -> numbers, pictures judged, and the metrics that judged."""
    from ldm.build import allowed, build
    from ldm.evaluation.protocol import entries
    from ldm.evaluation.ranks import rank, start
    from ldm.evaluation.run import measure
    from ldm.folder import write_json
    from ldm.subject import Subject

    start()
    config = OmegaConf.to_container(config, resolve=True)
    out = place(config)
    metrics = build(config["metric"], allowed(config))
    subject = Subject(config, out)
    numbers, corrupt = measure(metrics, subject.pictures, subject.real, out / "rows", Path(config["cache"]), config["batch"])
    told = entries(numbers, metrics, subject.used, subject.settings, subject.what, corrupt)
    if rank() == 0:
        write_json(told, out / "metrics.json")
        for name, entry in told.items():
            error = "" if entry["error"] is None else f" ± {entry['error']:.4f}"
            print(f"{name:28s} {entry['value']:.4f}{error}")
            if "note" in entry:
                print(f"    {entry['note']}")
        print(f"The numbers, each with its protocol, are in {out}/metrics.json")
    kept = {kind: source.pictures() for kind, source in subject.used.items() if hasattr(source, "pictures")}
    return {name: entry["value"] for name, entry in told.items()}, kept, metrics


def place(config: Mapping[str, Any]) -> Path:
    """Where the results go, OUT or a folder beside what is measured."""
    if config["out"] is not None:
        return Path(config["out"])
    if config["images"] is not None:
        return Path(f"{config['images'].rstrip('/')}-evaluation")
    model = Path(config["model"] or "runs")
    return model.with_name(f"{model.stem}-evaluation") if model.suffix == ".ckpt" else model / "evaluation"


if __name__ == "__main__":
    command("evaluate")(evaluate)()
