"""From one layout to another, through our own; the layout of a source is recognised, never guessed from its name."""

from pathlib import Path

from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.folder import write_text
from ldm.interop import bert, compvis, diffusers, dit, dit_model
from ldm.interop import bundle as ours
from ldm.interop.bundle import Bundle, Part
from ldm.interop.card import card
from ldm.interop.conditions import LABEL, lacks_null
from ldm.interop.statistics import published_statistics
from ldm.interop.weights import open_weights, read_config

HUB = "hf://"
LAYOUTS = ("ldm", "diffusers", "compvis", "dit")
FILES = ("compvis", "dit")  # layouts of one file


def read(source: str, prediction: str | None = None) -> tuple[Bundle, str]:
    """hf://org/name, a folder, or a file -> the model apart, and the layout that it came in.

    Raises:
        NotFound: nothing is there. Refusal: it is in no layout that is known, or not whole.
    """
    path = download(source) if source.startswith(HUB) else Path(source)
    if not path.exists():
        raise NotFound(f"There is nothing at {path}.")
    try:
        return _read(path, prediction)
    except ValueError as error:
        raise Refusal(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise Refusal(f"{path} holds settings of another kind than were wanted ({type(error).__name__}: {error}).") from error


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
        scale = bundle.scale or part.scale
        part.weights |= published_statistics(part.settings()["channels"], scale)
        bundle.assumed.append(
            f"scale: {scale}, of {'this family' if bundle.scale else 'Stable Diffusion 1'}; {source} does not say it"
        )
    bundle.parts["autoencoder"] = part


def check(bundle: Bundle, source: str, prediction: str | None) -> None:
    """Raises ValueError where the parts of a model are of different models, or it says something else than is told."""
    if bundle.recipe is None:
        return
    says = bundle.recipe["prediction"]["_target_"].split(".")[-1]
    if prediction is not None and says != prediction:
        raise Refusal(f"{source} says {says.lower()} by itself; leave --prediction {prediction.lower()} out.")
    stage, channels = bundle.parts.get("autoencoder"), bundle.channels()
    if stage is not None and (theirs := stage.settings()["channels"]) != channels:
        raise Refusal(f"{source} draws latents of {channels} channels; its autoencoder's have {theirs}, and are another's.")
    wanted = next((x.shape[1] for name, x in bundle.backbone().items() if name.endswith("attend_tokens.k.weight")), None)
    for name, node in bundle.recipe["condition"].items():
        towers = ours.towers({name: node}).items()
        made = sum(len(n.get("layers", [-1])) * bundle.parts[p].config["text_cfg"]["width"] for p, n in towers)
        if towers and wanted not in (None, made):
            raise Refusal(f"{source}: the U-Net reads tokens {wanted} wide, condition.{name} makes them {made} wide.")
    if bundle.words is not None and "bert" not in bundle.recipe["condition"]:
        raise Refusal(f"{source} holds no BERT to read the words of --vocabulary.")


def _read(path: Path, prediction: str | None) -> tuple[Bundle, str]:
    if path.is_file():
        weights = open_weights(path)
        layout, reader = ("dit", dit_model) if dit.TABLE in weights else ("compvis", compvis)
        return reader.read_file(path, weights, prediction), layout
    if (path / "model_index.json").is_file():
        index = read_config(path / "model_index.json")
        return (dit_model if "transformer" in index else diffusers).read_folder(path), "diffusers"
    config = path / "config.json"
    told = read_config(config) if config.is_file() else {}
    if "_target_" in told:
        return ours.read_folder(path), "ldm"
    if "_class_name" in told:
        return diffusers.read_folder(path), "diffusers"
    inside = sorted(f.name for f in path.iterdir())[:5]
    raise Refusal(
        f"{path} is in no layout that is known: neither a model exported here (config.json, model.safetensors) nor a folder of "
        f"diffusers (model_index.json). It holds {inside}. A single file is named itself."
    )


def write(bundle: Bundle, target: Path, layout: str, licence: str = "unknown", source: str = "") -> None:
    """Writes a model into a folder, with a model card, or for compvis and dit into a .safetensors file.

    Raises:
        Refusal: the layout has no place for something in it.
    """
    if layout in FILES and bundle.is_dit != (layout == "dit"):
        raise Refusal(f"--to {layout}: that layout is for a {'U-Net' if bundle.is_dit else 'DiT'}, and this model is none.")
    if bundle.recipe is not None and "autoencoder" not in bundle.parts and layout != "dit":
        raise Refusal(f"{source} holds no autoencoder. Say whose latents it draws: --autoencoder FOLDER_OR_FILE.")
    if bundle.recipe is not None and layout not in FILES:
        bert.check_words(bundle, source)
    if layout not in FILES and target.is_file():
        raise Refusal(f"{target} is a file; a model in the layout of {layout} is a folder.")
    if layout in FILES:
        if target.suffix != ".safetensors":
            raise Refusal(f"{target}: a model in the layout of {layout} is one file; name it FILE.safetensors.")
        (compvis if layout == "compvis" else dit_model).write_file(bundle, target)
        return
    (ours if layout == "ldm" else dit_model if bundle.is_dit else diffusers).write_folder(bundle, target)
    write_text(card(bundle, layout, licence, source), target / "README.md")


def download(source: str) -> Path:
    """hf://org/name -> the folder of its snapshot: one copy of the weights, and settings, and never code.

    Raises:
        Refusal: the name is no org/name. OSError: the hub is not reached, and the snapshot is not in its cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # what a connection that fails raises, where it is no OSError

    name = source.removeprefix(HUB)
    if name.count("/") != 1:
        raise Refusal(f"{source}: name a repository of the Hugging Face hub as {HUB}org/name.")
    try:
        return Path(snapshot_download(name, allow_patterns=_wanted(HfApi().list_repo_files(name))))
    except (OSError, HTTPError) as error:  # offline: what was downloaded before
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except OSError:
            raise Unreachable(f"{source} was not fetched before, and is not had now: {' '.join(str(error).split())}") from error


def _wanted(files: list[str]) -> list[str]:
    """Of a repository's files those that `read` reads: of a pipeline its parts, and each part once, in full precision."""
    whole = [f for f in files if "model_index.json" not in files or "/" in f or f == "model_index.json"]
    weights = [f for f in whole if f.endswith((".safetensors", ".bin"))]
    settings = [f for f in whole if f.endswith((".json", ".txt", ".yaml"))]

    def rank(f: str) -> tuple[int, bool]:
        return (next((i for kind, i in (("non_ema", 3), ("bf16", 2), ("fp16", 1)) if kind in f), 0), f.endswith(".bin"))

    best = {folder: min(rank(f) for f in weights if Path(f).parent == folder) for folder in {Path(f).parent for f in weights}}
    return settings + [f for f in weights if rank(f) == best[Path(f).parent]]


def push(target: Path, name: str) -> str:
    """Uploads a folder, or a file with the yaml beside it, to the repository org/name of the hub -> its address.

    Raises:
        OSError: the hub refuses, or is not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        if target.is_dir():
            api.upload_folder(repo_id=name, folder_path=target)
        else:
            for path in (p for p in (target, target.with_suffix(".yaml")) if p.is_file()):
                api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=name)
    except (OSError, HTTPError) as error:
        raise Unreachable(f"--push {name}: {' '.join(str(error).split())}. The model is in {target}.") from error
    return str(address)


def describe(bundle: Bundle) -> str:
    """What was recognised, in a few lines."""
    lines = []
    if bundle.recipe is not None:
        lines.append(_network(bundle))
        lines.append(f"conditions   {', '.join(bundle.recipe['condition']) or 'none'}")
        kinds = [bundle.recipe[name]["_target_"].split(".")[-1] for name in ("schedule", "prediction")]
        betas = [f"{bundle.recipe['schedule'][end]:g}" for end in ("beta_start", "beta_end") if end in bundle.recipe["schedule"]]
        lines.append(f"says         {kinds[1]} on {kinds[0]}{f', betas {betas[0]} to {betas[1]}' if len(betas) == 2 else ''}")
        lines += [f"{name:12s} {told}" for name, told in _trained(bundle).items()]
    lines += [f"assumed      {said}" for said in bundle.assumed]
    if bundle.grid is not None:
        lines.append(f"steps        {bundle.grid}: draw with sampler/grid={bundle.grid}")
    for place, part in bundle.parts.items():
        kind, count = "text tower" if part.tower else "autoencoder", sum(x.numel() for x in part.weights.values())
        lines.append(f"{kind:12s} {count:,} numbers ({place})")
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


def _network(bundle: Bundle) -> str:
    s, count = bundle.settings(), sum(x.numel() for name, x in bundle.backbone().items() if name != "position")
    if bundle.is_dit:
        more = [name for name in ("rms_norm", "swiglu", "rotary", "norm_heads") if s[name]]
        sizes = [f"width {s['width']}", f"depth {s['depth']}", f"{s['heads']} heads", f"patch {s['patch']}"]
        return f"DiT          {count:,} parameters: {', '.join(sizes + more)}"
    heads = f"{s['heads']} heads" if s["head_width"] is None else f"{s['head_width']}-wide heads"
    return f"U-Net        {count:,} parameters: width {s['width']}, mult {s['mult']}, depth {s['depth']}, {heads}"
