"""From one layout to another, through our own; the layout of a source is recognised, never guessed from its name."""

import json
from pathlib import Path

from ldm.folder import write_text
from ldm.interop import bundle as ours
from ldm.interop import compvis, diffusers
from ldm.interop.bundle import Bundle
from ldm.interop.card import card

HUB = "hf://"
LAYOUTS = ("ldm", "diffusers", "compvis")


def read(source: str, prediction: str | None = None) -> tuple[Bundle, str]:
    """hf://org/name, a folder, or a file -> the model apart, and the layout that it came in.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is in no layout that is known, or not whole.
    """
    path = download(source) if source.startswith(HUB) else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}.")
    if path.is_file():
        return compvis.read_file(path, prediction), "compvis"
    if (path / "model_index.json").is_file():
        return diffusers.read_folder(path), "diffusers"
    config = path / "config.json"
    told = json.loads(config.read_text()) if config.is_file() else {}
    if "_target_" in told:
        return ours.read_folder(path), "ldm"
    if "_class_name" in told:
        return diffusers.read_folder(path), "diffusers"
    inside = sorted(f.name for f in path.iterdir())[:5]
    raise ValueError(
        f"{path} is in no layout that is known: neither a model exported here (config.json, model.safetensors) nor a folder of "
        f"diffusers (model_index.json). It holds {inside}. A single file is named itself."
    )


def write(bundle: Bundle, target: Path, layout: str, licence: str = "unknown", source: str = "") -> None:
    """Writes a model into a folder, with a model card, or for compvis into a .safetensors file.

    Raises:
        ValueError: the layout has no place for something in it.
    """
    if layout == "compvis":
        if target.suffix != ".safetensors":
            raise ValueError(f"{target}: a model in CompVis' layout is one file; name it FILE.safetensors.")
        compvis.write_file(bundle, target)
        return
    (ours if layout == "ldm" else diffusers).write_folder(bundle, target)
    write_text(card(bundle, layout, licence, source), target / "README.md")


def download(source: str) -> Path:
    """hf://org/name -> the folder of its snapshot; weights and settings only, and never code.

    Raises:
        ValueError: the name is no org/name.
    """
    from huggingface_hub import snapshot_download

    name = source.removeprefix(HUB)
    if name.count("/") != 1:
        raise ValueError(f"{source}: name a repository of the Hugging Face hub as {HUB}org/name.")
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.yaml"]))


def describe(bundle: Bundle) -> str:
    """What was recognised, in a few lines."""
    lines = []
    if bundle.recipe is not None:
        s, count = bundle.settings(), sum(x.numel() for x in bundle.backbone().values())
        heads = f"{s['heads']} heads" if s["head_width"] is None else f"{s['head_width']}-wide heads"
        lines.append(f"U-Net        {count:,} parameters: width {s['width']}, mult {s['mult']}, depth {s['depth']}, {heads}")
        lines.append(f"conditions   {', '.join(bundle.recipe['condition']) or 'none'}")
        kinds = [bundle.recipe[name]["_target_"].split(".")[-1] for name in ("schedule", "prediction")]
        lines.append(f"says         {kinds[1]} on {kinds[0]}")
    for place, part in bundle.parts.items():
        kind, count = "text tower" if part.tower else "autoencoder", sum(x.numel() for x in part.weights.values())
        lines.append(f"{kind:12s} {count:,} numbers ({place})")
    return "\n".join(lines)
