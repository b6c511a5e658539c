"""The coordinate check of a training's words:  python train.py experiment=... parametrization=mup coordinates='[64,128,256]'"""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.build import allowed, build, build_stage
from ldm.errors import Refusal
from ldm.files.folder import write_json, write_text
from ldm.report.page import curves, page, table
from ldm.training.coordinates import coordinates, slopes

STEADY = 0.2  # an exponent of the width that is taken for none


def check(config: DictConfig, folder: Path) -> dict[str, float]:
    """Trains for a few steps at each width, writes FOLDER/coordinates.html and .json -> each block's exponent of the width."""
    widths = list(config.coordinates)
    if len(widths) < 2 or not all(isinstance(width, int) and width > 0 for width in widths):
        raise Refusal(f"coordinates={widths}: wanted two widths of the backbone or more, such as '[64,128,256]'.")
    data = build(config.data, allowed(config))
    data.prepare_data()
    data.setup("fit")
    batch = data.on_after_batch_transfer(next(iter(data.ordered("train", batch=min(config.data.batch, 32)))), 0)
    sizes = {}
    for width in widths:
        torch.manual_seed(config.seed)
        stage = build_stage(of_width(config, width), begins=False).train()
        sizes[width] = coordinates(stage, stage.latent_model().denoiser.backbone, batch)
    by_block = slopes(sizes)
    write_json({"sizes": sizes, "exponents": by_block}, folder / "coordinates.json")
    write_text(as_page(sizes, by_block), folder / "coordinates.html")
    return by_block


def of_width(config: DictConfig, width: int) -> DictConfig:
    """The config with a backbone of that width, whose heads stay as wide as they are where it has `heads` and no head_width."""
    changed = config.copy()
    backbone = changed.backbone
    if backbone.get("heads") is not None and backbone.get("head_width") is None:
        heads = backbone.heads * width / backbone.width
        if heads % 1:
            raise Refusal(
                f"coordinates: at width {width} there are {heads:g} heads as wide as now ({backbone.heads} of width "
                f"{backbone.width}); choose multiples of {backbone.width // backbone.heads}."
            )
        OmegaConf.update(changed, "backbone.heads", int(heads))
    OmegaConf.update(changed, "backbone.width", width)
    return changed


def said(by_block: dict[str, float], folder: Path) -> str:
    """What is printed."""
    worst = max(by_block, key=lambda name: abs(by_block[name]))
    verdict = "hold" if abs(by_block[worst]) < STEADY else "do not hold"
    lines = [f"{name:12s} width^{slope:+.2f}" for name, slope in by_block.items()]
    lines.append(f"Sizes {verdict} over the widths, most at {worst}, width^{by_block[worst]:+.2f}: {folder / 'coordinates.html'}")
    return "\n".join(lines)


def as_page(sizes: dict[int, dict[str, list[float]]], by_block: dict[str, float]) -> str:
    """Sizes by width, a line each block, at the start and after the last step."""
    widths, sections = sorted(sizes), []
    for title, step in (("Hidden states at the start", 0), ("How far the steps have moved them", -1)):
        series = {name: ([float(w) for w in widths], [sizes[w][name][step] for w in widths]) for name in by_block}
        shown = {name: line for name, line in series.items() if all(line[1])}
        sections.append((title, curves(shown, "width of the backbone", "mean absolute value", log_y=True)))
    rows = [[name, f"{slope:+.3f}", *(f"{sizes[w][name][-1]:.3g}" for w in widths)] for name, slope in by_block.items()]
    sections.append(("Exponents of the width", table(["", "exponent", *map(str, widths)], rows)))
    lead = "Where a setting is to hold at every width, neither hidden states nor how far a step moves them may grow with it."
    return page("Coordinate check", lead, sections)
