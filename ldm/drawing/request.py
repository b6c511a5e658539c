"""From the settings of a command to a request's fields and to an edit's sampler, and from pictures to files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid, save_image

from ldm.drawing.edit import FromInversion, FromPicture, Inpainting
from ldm.drawing.weights import weighted
from ldm.errors import NotFound, Refusal
from ldm.files.folder import write_text
from ldm.files.lines import read_lines
from ldm.files.picture import open_picture, to_grey, to_srgb
from ldm.files.whole import write_whole
from ldm.model import LatentModel
from ldm.types import Denoise, Sampler

Size = tuple[int, int]
STRENGTH, RESAMPLES = 0.6, 4  # the defaults of image-to-image and of inpainting


def read_request(config: Mapping[str, Any], model: LatentModel) -> tuple[dict[str, Any], int]:
    """config: prompt, prompts, negative, ask, count, resolution, prompt_weights -> the request's fields, N of each, and N.

    Each condition reads the values of its fields: numbers, names, words, or files and folders of them.

    Raises:
        Refusal: a field that the model needs has no value, one is not the model's, or lists differ in length.
        NotFound: a file is not there.
    """
    size = config.get("resolution") or 0
    size = (size, size) if isinstance(size, int) else tuple(size)
    values = {field: value if isinstance(value, list) else [value] for field, value in (config.get("ask") or {}).items()}
    prompts = prompts_of(config)
    if prompts and "caption" in values:
        raise Refusal("ask.caption and prompt or prompts both say what the pictures show; leave one of them out.")
    if prompts:
        values["caption"] = prompts
    readers = {field: e for e in model.conditioner.embedders.values() for field in model.conditioner.fields_of(e)}
    how = ", ".join("prompt='...'" if key == "caption" else f"ask.{key}=..." for key in readers) or "no condition at all"
    if values.keys() - readers.keys():
        raise Refusal(f"This model is asked by {how}; found {sorted(values)}.")
    if empty := [field for field, value in values.items() if not value]:
        raise Refusal(f"ask.{empty[0]}=[]: nothing is asked for.")
    begun = {} if config.get("init") is None else {"init": [config["init"]]}
    for embedder in model.conditioner.embedders.values():
        embedder.check({**begun, **values})
    ask = {field: readers[field].read(field, value, size) for field, value in values.items()}
    for field in readers.keys() - ask.keys():
        usual = readers[field].unasked(field, size)
        ask |= {} if usual is None else {field: readers[field].read(field, usual, size)}
    count = max((len(v) for v in ask.values()), default=1) if config.get("count") is None else config["count"]
    if count < 1:
        raise Refusal(f"count={count}: wanted 1 or more pictures.")
    ask = model.conditioner.fill({field: _repeated(field, value, count) for field, value in ask.items()})
    if readers.keys() - ask.keys():
        raise Refusal(f"This model is asked by {how}; found {sorted(values) or 'nothing'}.")
    if config.get("negative") is not None:
        if "caption" not in readers:
            raise Refusal(f"negative={config['negative']!r} is for models that read captions; this one is asked by {how}.")
        negative = config["negative"] if isinstance(config["negative"], list) else [config["negative"]]
        negative = readers["caption"].read("caption", list(map(str, negative)), size)
        ask["negative.caption"] = _repeated("negative", negative, count)
    _warn_of_unspoken(ask, model)
    return (_weighted(ask, model) if config.get("prompt_weights") else ask), count


def _warn_of_unspoken(ask: Mapping[str, Any], model: LatentModel) -> None:
    """Warns of words that an adapter taught the model and that no caption holds."""
    words = {
        word: field for e in model.conditioner.embedders.values() for word in e.taught for field in model.conditioner.fields_of(e)
    }
    for word, field in words.items():
        captions = [*ask.get(field, ()), *ask.get(f"negative.{field}", ())]
        if not any(word.lower() in str(caption).lower() for caption in captions):
            warn(f"no prompt holds {word}, which adapters= taught the model: it has no effect.", stacklevel=3)


def skip_layers(model: LatentModel, layers: int | None) -> None:
    """Makes the conditions that read captions read the `layers`-th layer of their text tower from its end; None is their default.

    Raises:
        Refusal: one cannot, or the model reads no captions.
    """
    readers = [e for e in model.conditioner.embedders.values() if "caption" in model.conditioner.fields_of(e)]
    if layers is not None and not readers:
        raise Refusal(f"clip_skip={layers}: this model reads no captions.")
    for embedder in readers:
        embedder.skip(layers)


def _weighted(ask: Mapping[str, Any], model: LatentModel) -> dict[str, Any]:
    """The request, with its captions parsed into parts and their weights."""
    readers = {n: e for n, e in model.conditioner.embedders.items() if "caption" in model.conditioner.fields_of(e)}
    if deaf := [name for name, embedder in readers.items() if not embedder.weighs] or ([] if readers else ["no text"]):
        raise Refusal(f"prompt_weights=true: {deaf[0]} does not heed weights; CLIP's texts do. Write plain prompts.")
    spelt = {name: list(map(weighted, ask[name])) for name in ("caption", "negative.caption") if name in ask}
    return {**ask, **spelt}


def read_edit(config: Mapping[str, Any], model: LatentModel, ask: Mapping[str, Any], sampler: Sampler, size: Size) -> Sampler:
    """-> the sampler, which begins from the picture `init` where the settings name one.

    Args:
        config: init, a file or a picture of PIL's; mask (white is drawn anew), which makes it inpainting; source (what the
            picture shows), which makes it inversion; strength; resamples.
        model: what encodes the picture.
        ask: the request's fields.
        sampler: what is walked.
        size: height and width in pixels, to which pictures are cut in their middle.

    Raises:
        Refusal: a mask or a source without a picture, or both. NotFound: no such file.
    """
    init, mask, source, strength = (config.get(name) for name in ("init", "mask", "source", "strength"))
    if (init is None and (mask is not None or source is not None)) or (mask is not None and source is not None):
        raise Refusal(f"init={init} mask={mask} source={source}: one of mask and source goes with a picture (init=FILE).")
    _check_edit(config)
    if init is None:
        return sampler
    strength = STRENGTH if strength is None else strength
    resamples = RESAMPLES if config.get("resamples") is None else config["resamples"]
    device = next(model.denoiser.parameters()).device
    with torch.no_grad():
        picture = model.autoencoder.encode(_read_image(init, "init", "RGB", size).to(device) * 2 - 1).mean
    if mask is not None:
        cells = adaptive_max_pool2d(_read_image(mask, "mask", "L", size), picture.shape[2:])
        return Inpainting(sampler, picture, (cells > 0.5).float(), resamples, strength)
    if source is None:
        return FromPicture(sampler, picture, strength)

    shown = {k: v[:1] for k, v in ask.items() if not k.startswith("negative.")} | {"caption": [str(source)]}

    def denoise(count: int) -> Denoise:
        cond = model.condition({k: v.repeat(count) if isinstance(v, Tensor) else v * count for k, v in shown.items()})
        return lambda x_t, t, *to: model.denoiser(x_t, t, cond, *to)

    return FromInversion(sampler, picture, denoise, strength)


def _check_edit(config: Mapping[str, Any]) -> None:
    """Refuses settings that nothing would read."""
    for name, goes_with in {"strength": "init", "resamples": "mask"}.items():
        if config.get(name) is not None and config.get(goes_with) is None:
            raise Refusal(
                f"{name}={config[name]} goes with {goes_with}=FILE, and there is none: take it out, or name the picture."
            )
    if isinstance(config.get("source"), list):
        raise Refusal(f"source={config['source']}: one text says what the picture shows.")


def _read_image(path: str | Image.Image, name: str, mode: str, size: Size) -> Tensor:
    """A file, or a picture of PIL's, cut in its middle to `size` -> (1, 3 or 1, height, width) in [0, 1]."""
    given = isinstance(path, Image.Image)
    if not given and not Path(path).is_file():
        raise NotFound(f"{name}={path}: there is no such picture.")
    try:
        image = (to_srgb if mode == "RGB" else to_grey)(path if given else open_picture(Path(path).read_bytes()))
    except ValueError as error:
        raise Refusal(f"{name}={path} is no whole picture: {error}") from error
    return to_tensor(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC))[None]


def write_pictures(images: Tensor, folder: Path, request: Mapping[str, Any], shown: Mapping[str, Tensor] | None = None) -> None:
    """images: (N, 3, h, w) in [-1, 1] -> FOLDER/00000.png ..., grid.png, request.json.

    `shown` has pictures of the conditions by name, (N, 3, h', w') in [-1, 1], which become FOLDER/00000.NAME.png ..., and stand
    left of the drawn pictures in the grid.
    """
    shown = {name: _unit(pictures) for name, pictures in (shown or {}).items()}
    unit = _unit(images)
    for i, image in enumerate(unit):
        files = {"": image, **{f".{name}": pictures[i] for name, pictures in shown.items()}}
        for name, picture in files.items():
            write_whole(folder / f"{i:05d}{name}.png", lambda path, p=picture: save_image(p, path, format="png"))
    beside = [torch.nn.functional.interpolate(pictures, unit.shape[2:], mode="nearest") for pictures in shown.values()]
    columns = max(1, min(8, len(unit) * (1 + len(beside))) // (1 + len(beside)))
    grid = make_grid(torch.cat((*beside, unit), dim=3), nrow=columns, padding=1, pad_value=1.0)
    write_whole(folder / "grid.png", lambda path: save_image(grid, path, format="png"))
    write_text(json.dumps(request, indent=2, ensure_ascii=False, default=_plain) + "\n", folder / "request.json")


def _unit(images: Tensor) -> Tensor:
    return images.add(1).div(2).clamp(0, 1)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.ndim < 2 else f"{tuple(value.shape)}, beside each picture"
    return str(value)


def _repeated(field: str, value: Any, count: int) -> Any:
    if count % len(value):
        raise Refusal(f"{len(value)} values of {field} do not go evenly into {count} pictures; give 1 or {count} (or count=...).")
    times = count // len(value)
    return value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value * times


def prompts_of(config: Mapping[str, Any]) -> list[str]:
    """What `prompt` or `prompts` say.

    Raises:
        Refusal: both, or a file without any.
    """
    prompt, file = config.get("prompt"), config.get("prompts")
    if file is None:
        return [] if prompt is None else [str(p) for p in prompt] if isinstance(prompt, list) else [str(prompt)]
    if prompt is not None:
        raise Refusal(f"prompt={prompt} and prompts={file} both say what the pictures show; leave one of them out.")
    lines = read_lines(file)
    prompts = [line for line in lines if line]
    if not prompts:
        raise Refusal(f"prompts={file} holds no prompt: wanted one a line.")
    if len(prompts) < len(lines):
        empty = len(lines) - len(prompts)
        warn(f"prompts={file}: {empty:,} empty lines are left out, and the pictures numbered without them.", stacklevel=3)
    return prompts
