"""Measures a model:  python evaluate.py model=runs/quickstart/diffusion metric=[text_match,reconstruction] count=128 out=DIR"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.command_line import command


def evaluate(config: DictConfig) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Writes OUT/metrics.json, the protocol beside the numbers; -> numbers, pictures judged, and the metrics that judged."""
    import torch

    from ldm.build import allowed, build, load_model
    from ldm.folder import write_json
    from ldm.training.evaluate import evaluate as measure

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model = load_model(config.model, allowed(config)).to(device)
    parts = (config.data, config.metric, config.sampler, config.guidance)
    data, metrics, sampler, guidance = (build(node, allowed(config)) for node in parts)
    data.prepare_data()
    data.setup()
    numbers, pictures = measure(model, data, metrics, sampler, guidance, config.count, config.seed, config.batch)
    protocol = {"shards": data.train_set.index.fingerprint(), **OmegaConf.to_container(config, resolve=True)}
    write_json({**numbers, "protocol": protocol}, Path(config.out) / "metrics.json")
    for name, value in numbers.items():
        print(f"{name:28s} {value:.4f}")
    print(f"The numbers and their protocol are in {config.out}/metrics.json")
    return numbers, pictures, metrics


if __name__ == "__main__":
    command("evaluate")(evaluate)()
