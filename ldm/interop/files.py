"""The weights of one part in a folder of diffusers, by our names."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ldm.errors import Refusal
from ldm.files.pieces import best_in
from ldm.interop.tie import Shapes, Tie, bring, renamer, taken
from ldm.interop.weights import check_numbers, open_weights


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
    path = best_in(folder, stem)
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
