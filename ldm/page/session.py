"""What lies behind the page: models that are ready, what was uploaded, and what was drawn. It knows no server.

Everything that is drawn is composed of words of the command line (words.py), so that the command that is shown draws it again.
"""

import base64
import hashlib
import io
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from ldm.build import allowed
from ldm.compose import CONFIGS, compose_config, spoken
from ldm.drawing.request import write_pictures
from ldm.embedder import Input
from ldm.errors import Refusal
from ldm.files.folder import write_text
from ldm.files.picture import open_picture, to_bytes, upright
from ldm.files.whole import write_whole
from ldm.model import LatentModel
from ldm.page.describe import Ready, describe, inputs_of
from ldm.page.words import asked_of, command_of, strengths, words_of

PREVIEW = 256  # pixels of an estimate's longer side, at most
SHARE = 4  # how much longer than an estimate took to show, nothing else is shown
Tell = Callable[[dict[str, Any]], None]


class Stopped(Exception):
    """Nobody waits for a drawing any more."""


@dataclass(frozen=True)
class Commands:
    """What the page does by other rooms' hands, `ldm sample` in parts: of command/sample.py, command/usual.py, data/usual.py.

    Args:
        check: refuses a config of sample.yaml that cannot be drawn.
        ready: loads what a config names -> the model, and how it is usually drawn from.
        draw: as command/sample.py's.
        as_usual: a plain config and how the model is usually drawn from -> the config without nulls.
        size_of: as data/usual.py's.
    """

    check: Callable[[DictConfig], None]
    ready: Callable[[DictConfig], tuple[LatentModel, Mapping[str, Any]]]
    draw: Callable[..., tuple[Tensor, dict[str, Any]]]
    as_usual: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
    size_of: Callable[..., tuple[tuple[int, int], list[str]]]


class Session:
    """Models to draw with, and a folder for what they draw.

    Args:
        models: what `model=` takes, one or several, which may draw side by side.
        adapters: what `adapters=` takes, put on each of them.
        base: other words of sample.yaml, in all drawings.
        out: the folder: `given/` for uploads, by their hash, and one folder a drawing.
        commands: how it loads and draws.
    """

    def __init__(
        self, models: Sequence[str], adapters: Sequence[str], base: Sequence[str], out: Path, commands: Commands
    ) -> None:
        if len(set(models)) < len(models):
            raise Refusal(f"model=[{','.join(models)}]: one stands there twice; name each once.")
        self.models, self.adapters, self.base, self.out, self.commands = list(models), list(adapters), list(base), out, commands
        self.samplers = sorted(path.stem for path in (CONFIGS / "sampler").glob("*.yaml"))
        self.loaded: dict[str, tuple[tuple[str, ...], Ready]] = {}
        self.inputs: dict[str, dict[str, Input]] = {}
        self.description: dict[str, Any] = {}
        self.drawings: list[dict[str, Any]] = []

    def load(self) -> None:
        """Reads all models, so that what is wrong with one is said before the page opens."""
        models = {name: self._ready(name, self.adapters) for name in self.models}
        self.inputs = {name: inputs_of(ready.model) for name, ready in models.items()}
        self.description = describe(models, self.samplers, self.adapters)

    def keep(self, name: str, data: bytes) -> Path:
        """A picture that was uploaded or painted -> its file, as it came; `map.FIELD` are labels in colours -> a label map.

        Raises:
            Refusal: it is no picture that we read, or too large.
        """
        try:
            picture = open_picture(data)
            ending = picture.format.lower()
            picture = upright(picture)  # whole, or refused
            if name.startswith("map."):
                data, ending = _labels(picture), "png"
        except ValueError as error:
            raise Refusal(f"{name}: {error}") from error
        return self._kept(data, ending)

    def draw(self, said: Mapping[str, Any], given: Mapping[str, bytes], tell: Tell, stopped: Callable[[], bool]) -> None:
        """Draws what the page asks for with each model that it names, one after the other, with the same seeds.

        Args:
            said: plain values (words.py), with `models` and `adapters`.
            given: pictures, by `init`, `mask`, `ask.FIELD` or `map.FIELD`.
            tell: is told notes, each step with its estimates, and each finished drawing.
            stopped: whether to leave off, asked at each step.

        Raises:
            Refusal: something cannot be drawn like that. Stopped: it was stopped.
        """
        models = said.get("models") or self.models[:1]
        if not isinstance(models, list) or [name for name in models if name not in self.models]:
            raise Refusal(f"models={models}: there are {', '.join(self.models)}.")
        adapters = strengths(self.adapters, said.get("adapters", [])) if self.adapters else []
        files = self._files(said, given)
        group = len(self.drawings)
        for name in dict.fromkeys(models):
            tell({"model": name})
            words = [*_chosen(name, adapters), *self.base]
            inputs = self.inputs[name]
            words += words_of(said, files, inputs, self.samplers)
            self._ready(name, adapters)
            self._draw(name, words, group, tell, stopped)

    def _files(self, said: Mapping[str, Any], given: Mapping[str, bytes]) -> dict[str, Path]:
        """What was uploaded, painted or laid out -> files, by `init`, `mask` and `ask.FIELD`."""
        kinds = {f"ask.{field}": one.kind for inputs in self.inputs.values() for field, one in inputs.items()}
        boxes = {f"ask.{f}": v for f, v in asked_of(said).items() if kinds.get(f"ask.{f}") == "boxes" and v is not None}
        names = {name: re.sub("^map", "ask", name) for name in given}
        if unknown := sorted(set(names.values()) - kinds.keys() - {"init", "mask"}):
            raise Refusal(f"{unknown[0]}: no model here reads such a picture; they read {', '.join(sorted(kinds)) or 'none'}.")
        files = {names[name]: self.keep(name, data) for name, data in given.items()}
        return files | {name: self._kept(json.dumps(value).encode(), "json") for name, value in boxes.items()}

    def _kept(self, data: bytes, ending: str) -> Path:
        path = self.out / "given" / f"{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
        if not path.is_file():
            write_whole(path, lambda part: part.write_bytes(data))
        return path

    def _draw(self, name: str, words: Sequence[str], group: int, tell: Tell, stopped: Callable[[], bool]) -> None:
        config = compose_config("sample", words)
        self.commands.check(config)
        ready, plain = self.loaded[name][1], OmegaConf.to_container(config, resolve=True)
        steps = self.commands.as_usual(plain, ready.usual)["sampler"].get("steps")
        watch = Watch(ready.model, plain["count"] or 1, plain["batch"], steps, tell, stopped)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            images, request = self.commands.draw(
                ready.model, ready.usual, plain, allowed(config), lambda line: tell({"note": line}), watch
            )
        for line in dict.fromkeys(str(one.message) for one in said if issubclass(one.category, UserWarning)):
            tell({"note": line})
        folder = self._folder()
        shown = ready.model.conditioner.show(request["asked"])
        write_pictures(images, folder, request, shown)
        command = command_of(words)
        write_text(command + "\n", folder / "command.txt")
        drawing = {"folder": folder.name, "group": group, "model": name, "command": command, "seeds": request["seeds"]}
        drawing |= {"pictures": [f"{i:05d}.png" for i in range(len(images))], "size": list(images.shape[2:])}
        drawing |= {"shown": [f"00000.{condition}.png" for condition in shown], "prompt": plain["prompt"] or ""}
        self.drawings.append(drawing)
        tell({"drawing": drawing})

    def _ready(self, name: str, adapters: Sequence[str]) -> Ready:
        """A model with its adapters at their strengths; with others it is read again, as the command does it."""
        key = tuple(adapters)
        if name not in self.loaded or self.loaded[name][0] != key:
            self.loaded.pop(name, None)  # first, so that there is room for the next
            config = compose_config("sample", [*_chosen(name, adapters), *self.base])
            model, usual = self.commands.ready(config)
            plain = OmegaConf.to_container(config, resolve=True)
            said = {**self.commands.as_usual(plain, usual), "resolution": self.commands.size_of(None, usual)[0]}
            self.loaded[name] = key, Ready(model, usual, said)
        return self.loaded[name][1]

    def _folder(self) -> Path:
        """A new folder for a drawing, numbered on."""
        self.out.mkdir(parents=True, exist_ok=True)
        last = max((int(path.name) for path in self.out.iterdir() if path.name.isdigit()), default=-1)
        folder = self.out / f"{last + 1:05d}"
        folder.mkdir()
        return folder


class Watch:
    """Tells each step of a drawing, and shows the estimates on the way, for no more than a fifth of the time.

    Args:
        model: what draws, whose autoencoder shows the estimates.
        count: pictures of the drawing.
        batch: pictures at a time.
        steps: of each batch, if it is known.
        tell: is told each step.
        stopped: whether to leave off.
    """

    def __init__(
        self, model: LatentModel, count: int, batch: int, steps: int | None, tell: Tell, stopped: Callable[[], bool]
    ) -> None:
        self.model, self.count, self.batch, self.steps, self.tell, self.stopped = model, count, batch, steps, tell, stopped
        self.first, self.quiet_until = -batch, 0.0

    def __call__(self, step: int, time_now: float, x_hat: Tensor) -> None:
        """As drawing/generate.py's Watch."""
        if self.stopped():
            raise Stopped
        self.first += self.batch if step == 1 else 0
        event: dict[str, Any] = {"step": step, "of": self.steps, "first": self.first}
        if (began := time.monotonic()) >= self.quiet_until:
            latents = x_hat[: max(1, self.count - self.first)]
            event["pictures"] = [_url(self.model.autoencoder.decode(x[None].float())) for x in latents]
            self.quiet_until = (ended := time.monotonic()) + SHARE * (ended - began)
        self.tell(event)


def _chosen(model: str, adapters: Sequence[str]) -> list[str]:
    words = [f"model={spoken(model)}"]
    if adapters:
        words.append(f"adapters=[{','.join(map(_element, adapters))}]")
    return words


def _element(word: str) -> str:
    """One of a list, in quotes where signs of lists are in it."""
    plain = all(sign.isalnum() or sign in "/._-:=" for sign in word)
    return word if plain else "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _labels(picture: Image.Image) -> bytes:
    """Labels in colours, red + 256 green, as the page paints them -> a PNG of one channel."""
    colours = np.asarray(picture.convert("RGB")).astype(np.uint16)
    labels = colours[..., 0] + 256 * colours[..., 1]
    stream = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8) if labels.max(initial=0) < 256 else labels).save(stream, "PNG")
    return stream.getvalue()


def _url(image: Tensor) -> str:
    """(1, 3, h, w) in [-1, 1] -> a small picture as an address that holds it."""
    picture = Image.fromarray(to_bytes(image.nan_to_num().clamp(-1, 1))[0].permute(1, 2, 0).cpu().contiguous().numpy())
    picture.thumbnail((PREVIEW, PREVIEW))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
