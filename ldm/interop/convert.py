"""From one layout to another, through our own; the layout of a source is recognised, never guessed from its name."""

from pathlib import Path

from ldm.errors import NotFound, Refusal
from ldm.files.folder import write_text
from ldm.interop.bundle import Bundle, Part
from ldm.interop.card import card
from ldm.interop.conditions import LABEL, lacks_null
from ldm.interop.find import layouts, network_of, parts
from ldm.interop.hub import here
from ldm.interop.part.bert import read_words
from ldm.interop.statistics import published_statistics

LAYOUTS = [word for layout in layouts() for word in layout.words()]


def read(source: str, prediction: str | None = None) -> tuple[Bundle, str]:
    """hf://org/name, a folder, or a file -> the model apart, and the layout that it came in.

    Raises:
        NotFound: nothing is there. Refusal: it is in no layout that is known, or not whole.
    """
    path = here(source)
    if not path.exists():
        raise NotFound(f"There is nothing at {path}.")
    try:
        return _read(path, prediction)
    except Refusal as error:
        if str(path) in str(error):
            raise
        raise Refusal(f"{path}: {error}") from error


def read_part(source: str, prediction: str | None = None) -> Part:
    """The autoencoder in a source, alone or a whole model's.

    Raises:
        Refusal: it holds none.
    """
    parts = read(source, prediction)[0].parts
    if "autoencoder" not in parts:
        raise Refusal(f"{source} holds no autoencoder. Name one, or a whole model, by --autoencoder FOLDER_OR_FILE.")
    return parts["autoencoder"]


def add_autoencoder(bundle: Bundle, source: str, prediction: str | None = None) -> None:
    """Gives a network the autoencoder in a source; where that says no scale factor, it is the one of the network's family."""
    part = read_part(source, prediction)
    if part.scale is not None:
        scale = part.scale if "codebook" in part.weights else bundle.scale or part.scale
        part.weights |= published_statistics(part.settings()["channels"], scale, bundle.shift if bundle.scale else 0.0)
        bundle.assumed.append(
            f"scale: {scale}, of {'this family' if bundle.scale else 'Stable Diffusion 1'}; {source} does not say it"
        )
    bundle.parts["autoencoder"] = part


def add_words(bundle: Bundle, folder: Path) -> None:
    """Gives a model the tokenizer, or the words, in a folder."""
    if not any(part.add_words(bundle, folder) for part in parts()):
        bundle.words = read_words(folder)


def check(bundle: Bundle, source: str, prediction: str | None) -> None:
    """Raises ValueError where the parts of a model are of different models, or it says something else than is told."""
    if bundle.recipe is None:
        return
    says = bundle.recipe["prediction"]["_target_"].split(".")[-1]
    if prediction is not None and says != prediction:
        raise Refusal(f"{source} says {says.lower()} by itself; leave --prediction {prediction.lower()} out.")
    network = network_of(bundle)
    stage, channels, wanted = bundle.parts.get("autoencoder"), network.channels(bundle), network.tokens(bundle)
    if stage is not None and channels is not None and (theirs := len(stage.weights["mean"])) != channels:
        raise Refusal(f"{source} draws latents of {channels} channels; its autoencoder's have {theirs}, and are another's.")
    for name, made in (item for part in parts() for item in part.tokens(bundle).items()):
        if wanted not in (None, made):
            raise Refusal(f"{source}: the {network.name} reads tokens {wanted} wide, condition.{name} makes them {made} wide.")
    if bundle.words is not None and bundle.made_by("ldm.condition.bert.Bert") is None:
        raise Refusal(f"{source} holds no BERT to read the words of --vocabulary.")


def _read(path: Path, prediction: str | None) -> tuple[Bundle, str]:
    for layout in layouts():
        if layout.recognise(path):
            return layout.read(path, prediction)
    inside = sorted(f.name for f in path.iterdir())[:5]
    raise Refusal(
        f"{path} is in no layout that is known: neither a model exported here (config.json, model.safetensors) nor a folder of "
        f"diffusers (model_index.json). It holds {inside}. A single file is named itself."
    )


def write(bundle: Bundle, target: Path, layout: str, licence: str = "unknown", source: str = "") -> None:
    """Writes a model, and into a folder its model card too.

    Args:
        bundle: the model.
        target: a folder, or a .safetensors file for the layouts that are one.
        layout: such as ldm, diffusers, compvis.
        licence, source: for the model card; `source` also for errors.

    Raises:
        Refusal: the layout has no place for something in it.
    """
    made = next(made for made in layouts() if layout in made.words())
    network = None if bundle.recipe is None or not made.file else network_of(bundle)
    if made.file and layout != ("compvis" if network is None else network.single):
        raise Refusal(f"--to {layout}: that layout is for a {made.words()[layout]}, and this model is none.")
    if bundle.recipe is not None and "autoencoder" not in bundle.parts and not (network and network.alone):
        raise Refusal(f"{source} holds no autoencoder. Say whose latents it draws: --autoencoder FOLDER_OR_FILE.")
    if made.file:
        if target.suffix != ".safetensors":
            raise Refusal(f"{target}: a model in the layout of {layout} is one file; name it FILE.safetensors.")
        made.write(bundle, target)
        return
    for part in parts():
        part.check(bundle, source)
    if target.is_file():
        raise Refusal(f"{target} is a file; a model in the layout of {layout} is a folder.")
    made.write(bundle, target)
    origin = f"Converted from `{source}` to the layout of {layout}." if source else ""
    write_text(card(bundle.recipe, layout, licence, source, origin), target / "README.md")


def describe(bundle: Bundle) -> str:
    """What was recognised, in a few lines."""
    lines = []
    if bundle.recipe is not None:
        lines.append(network_of(bundle).describe(bundle))
        lines.append(f"conditions   {', '.join(bundle.recipe['condition']) or 'none'}")
        kinds = [bundle.recipe[name]["_target_"].split(".")[-1] for name in ("schedule", "prediction")]
        betas = [f"{bundle.recipe['schedule'][end]:g}" for end in ("beta_start", "beta_end") if end in bundle.recipe["schedule"]]
        lines.append(f"says         {kinds[1]} on {kinds[0]}{f', betas {betas[0]} to {betas[1]}' if len(betas) == 2 else ''}")
        lines += [f"{name:12s} {told}" for name, told in _trained(bundle).items()]
    lines += [f"assumed      {said}" for said in bundle.assumed]
    if bundle.grid is not None:
        lines.append(f"steps        {bundle.grid}: draw with sampler/grid={bundle.grid}")
    words = {part.kind: part.word for part in parts()}
    for place, part in bundle.parts.items():
        lines.append(f"{words[part.kind]:12s} {sum(x.numel() for x in part.weights.values()):,} numbers ({place})")
    return "\n".join(lines)


def _trained(bundle: Bundle) -> dict[str, str]:
    """What was trained beside the network, by the condition's name."""
    counts: dict[str, int] = {}
    for tensor, x in bundle.weights.items():
        if tensor.startswith("conditioner.embedders."):
            name = tensor.split(".")[2]
            counts[name] = counts.get(name, 0) + x.numel()
    told = {name: f"{count:,} numbers (condition.{name})" for name, count in counts.items()}
    if (table := bundle.weights.get(LABEL)) is not None:
        null = "which was not there and is zeros: draw with guidance=none" if lacks_null(table) else "the last row"
        told["label"] = f"{len(table) - 1:,} classes, and no label, {null}"
    return told
