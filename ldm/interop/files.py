"""The weights of one part in a folder of diffusers: whole, split over files, or a variant."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ldm.errors import Refusal
from ldm.interop.tie import Shapes, Tie, bring, renamer, taken
from ldm.interop.weights import check_numbers, open_weights

VARIANTS = ("", "fp32", "fp16", "bf16")  # of the files of a part, the first that is there; then any other, such as non_ema


def take_part(
    folder: Path,
    ties: Mapping[str, Tie],
    shapes: Shapes,
    stem: str = "diffusion_pytorch_model",
    left: tuple[str, ...] = (),
    today: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """The tensors of one part, whole or split over files, by our names; nothing else may be missing or left.

    Args:
        folder: where the part lies.
        ties: our names -> how each is made of theirs.
        shapes: what ours must be.
        stem: the file's name without its endings.
        left: theirs that are not read.
        today: an older name -> what it is called now.
    """
    path = _file(folder, stem)
    weights = {today(name): x for name, x in open_weights(path).items()}
    try:
        ours = bring(ties, weights, shapes)
    except ValueError as error:
        raise Refusal(f"{path}: {error}") from error
    over = sorted(set(weights) - taken(ties) - {*left})
    if over:
        raise Refusal(f"{path} holds {len(over)} tensors that are none of this model's, such as {', '.join(over[:3])}.")
    check_numbers(ours, path)
    return ours


OLD = renamer({"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"})


def today(name: str) -> str:
    """What a layer of plain attention, in an autoencoder or a U-Net without tokens, is called that early versions named."""
    return OLD(name) if ".attentions." in name else name


def _file(folder: Path, stem: str) -> Path:
    """The weights of a part, of the best variant, or the index of their pieces."""
    pattern = re.compile(rf"(?:{stem}|pytorch_model)(?:\.([\w]+))?\.(safetensors|bin)(?:\.index(?:\.([\w]+))?\.json)?")
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if name := pattern.fullmatch(path.name):
            kind = name[1] or name[3] or ""
            found.append((VARIANTS.index(kind) if kind in VARIANTS else len(VARIANTS), name[2] != "safetensors", path))
    return min(found)[2] if found else folder / f"{stem}.safetensors"
