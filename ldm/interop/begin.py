"""Fine-tuning: a module takes over what it can from a model in any layout, and says what it took."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import NotFound, Refusal
from ldm.files.folder import load_tensors
from ldm.interop.bundle import filled
from ldm.interop.convert import read
from ldm.interop.find import networks
from ldm.interop.part._towers import CLIP_FILES

UNSEEN = ("heads", "rotary", "tokens", "axes")  # how a transformer attends, which no tensor shows
NAMED = 8  # of the tensors that were not taken


def weights_for(
    part: str, source: str, prediction: str | None = None, recipe: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The tensors in `source`, a folder or file in any layout, for a stage's `model`, `autoencoder` or `clip`.

    `prediction` (Noise, Velocity, Flow) is what the model to be trained says, for weights that do not show what they say, and
    `recipe` that of which it is made.

    Raises:
        NotFound: nothing is there. Refusal: it holds no such part, or see `check_unseen`.
    """
    if part == "clip":
        path = Path(source) / CLIP_FILES[1]
        if not path.is_file():
            raise NotFound(f"model.init={source}: there is no {CLIP_FILES[1]}; a CLIP begins from the folder of another.")
        return load_tensors(path)
    bundle, _ = read(source, prediction)
    if part == "autoencoder":
        if part not in bundle.parts:
            raise Refusal(f"model.init={source} holds no autoencoder.")
        return bundle.parts[part].weights
    if bundle.recipe is None:
        raise Refusal(f"model.init={source} is an autoencoder alone; a latent diffusion model begins from a whole one.")
    check_unseen(recipe or {}, bundle.recipe, source)
    return bundle.weights


def check_unseen(here: Mapping[str, Any], there: Mapping[str, Any], source: str) -> None:
    """Compares how the backbones of two recipes attend, where they are of one class.

    Raises:
        Refusal: their attention differs in what no tensor shows, such as its heads or its positions.
    """
    nodes = [recipe.get("backbone", {}) for recipe in (here, there)]
    targets = {node.get("_target_") for node in nodes}
    made = next((network.made for network in networks() if {network.target} == targets), None)
    if made is None:
        return
    own, theirs = (filled(made, node) for node in nodes)
    for name in UNSEEN:
        one, other = (list(s[name]) if isinstance(s.get(name), tuple) else s.get(name) for s in (own, theirs))
        if None not in (one, other) and one != other:
            raise Refusal(
                f"model.init={source} is another network: its backbone.{name} is {other}, and {one} here. Choose the backbone it "
                "was trained with."
            )


def check_still(still: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raises Refusal where tensors that come from elsewhere, and stay, are others in the source."""
    other = [name for name, x in still.items() if name in weights and not torch.equal(x.cpu(), weights[name].to(x.dtype))]
    if other:
        raise Refusal(
            f"model.init={source} has another {other[0]}, which is frozen: its weights learned beside its own alone. For an "
            f"autoencoder's encoder: autoencoder.weights={source}."
        )


@torch.no_grad()
def begin(module: nn.Module, weights: Mapping[str, Tensor], source: str, frozen: Sequence[str] = ()) -> str:
    """Copies what fits into the module's weights -> the list of what was taken, what is new and what was left.

    `frozen` parts come from elsewhere. A convolution with more input channels than its source starts with zeros there, and
    so draws as its source did. Fixed positions for another size stay. What a condition brings may differ (another number of
    classes); a backbone or autoencoder that differs is refused.

    Raises:
        Refusal: another network, or nothing in common.
    """
    still = {n: x for n, x in module.state_dict().items() if any(n.startswith(f"{part}.") for part in frozen)}
    check_still(still, weights, source)
    own = {n: x for n, x in module.state_dict().items() if n not in still}
    weights = {n: x for n, x in weights.items() if n not in still}
    taken, grown, other, laid = [], [], [], []
    for name in sorted(own.keys() & weights.keys()):
        here, there = own[name], weights[name]
        if here.shape == there.shape:
            taken.append(name)
        elif here.ndim == 4 and here.shape[1] > there.shape[1] and here[:, : there.shape[1]].shape == there.shape:
            grown.append(name)
        elif name.endswith("backbone.position"):
            laid.append(name)
        else:
            other.append(f"{name}: {tuple(there.shape)} there, {tuple(here.shape)} here")
    wrong = [line for line in other if not line.startswith("conditioner.")]
    places = [n for n in own.keys() ^ weights.keys() if n.endswith("backbone.position")]
    wrong += [f"{n}: fixed positions {'there' if n in weights else 'here'} alone (backbone.fixed)" for n in places]
    if wrong or not taken:
        few = "; ".join(wrong[:3]) or f"none of its {len(weights)} tensors is one of these {len(own)}"
        raise Refusal(f"model.init={source} is another network: {few}. Choose the backbone it was trained with.")
    for name in taken:
        own[name].copy_(weights[name])
    for name in grown:
        own[name].zero_()[:, : weights[name].shape[1]].copy_(weights[name])
    new = sorted(own.keys() - weights.keys())
    left = sorted(weights.keys() - own.keys())
    lines = [f"model.init={source}: {len(taken)} tensors taken, {len(grown)} grown, {len(new)} new, {len(left + other)} left"]
    for name in grown:
        lines += [f"  grown  {name}: {weights[name].shape[1]} of {own[name].shape[1]} input channels, the others zero"]
    lines += [f"  stays  {name}: {len(own[name])} places, {len(weights[name])} there" for name in laid]
    lines += [f"  new    {name}" for name in _few(new)]
    lines += [f"  left   {name}" for name in _few(left + other)]
    return "\n".join(lines)


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= NAMED else [*names[:NAMED], f"... and {len(names) - NAMED} more"]
