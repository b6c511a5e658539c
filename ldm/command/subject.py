"""What is evaluated and against what: a plain config -> sources of pictures, made when a metric asks for them."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from ldm.build import allowed, build, load_autoencoder, load_model
from ldm.command.usual import as_usual, check_drawing
from ldm.compose import CONFIGS
from ldm.data.shard.source import expand
from ldm.data.shards import Shards
from ldm.data.usual import far, resolved
from ldm.drawing.precision import hold
from ldm.drawing.request import read_request
from ldm.errors import NotFound, Refusal
from ldm.evaluation.pictures import Drawings, Given, Kept, Reconstructions, Split, chosen
from ldm.evaluation.protocol import code_version
from ldm.evaluation.real import Archive, Folder, read_captions
from ldm.evaluation.rows import fingerprint
from ldm.files.device import device_of
from ldm.files.folder import without_usual
from ldm.files.named import named_content
from ldm.files.process import rank
from ldm.files.weights import weights_hash
from ldm.measure import Metric
from ldm.rest import at_rest, recipe_of

# What says what is measured, and against what.
SAID = (
    "model images reference requests conditioning conditions prompts ask negative count resolution seed precision paste".split()
)
SAID += "corrupt keep adapters base sampler guidance data".split()


REFERENCES = "Wanted train, val, a folder of pictures, an .npz, or shards (*.tar)."


class Noted(dict):
    """A plain config that notes which of its settings are asked for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


class Subject:
    """The model, pictures and references that an evaluation's config names.

    used: the sources that were made, by kind; what they hold as `protocol` goes beside the numbers.
    """

    def __init__(self, config: Mapping[str, Any], out: Path) -> None:
        self.config, self.out, self.used, self.allow = Noted(config), out, {}, allowed(config)
        self.device = device_of(config["device"])
        if config["images"] is None:
            check_drawing(config, self.recipe.get("usual", {}), self.allow)
        makers = {"drawing": self._drawings, "reconstruction": self._reconstructions}
        self.pictures = {kind: lambda kind=kind, make=make: self._kept(kind, make()) for kind, make in makers.items()}
        makers = {"train": lambda: self._split("train"), "val": lambda: self._split("val"), "reference": self._reference}
        self.real = {kind: lambda kind=kind, make=make: self._use(kind, make()) for kind, make in makers.items()}

    def make(self, metrics: Mapping[str, Metric]) -> None:
        """Makes what metrics ask for, once, and says which settings none of that reads."""
        for attribute, sources in (("of", self.pictures), ("against", self.real)):
            for kind in dict.fromkeys(getattr(metric, attribute) for metric in metrics.values()):
                if kind is not None:
                    sources[kind] = partial(_itself, sources[kind]())
        usual = yaml.safe_load((CONFIGS / "evaluate.yaml").read_text(encoding="utf-8"))
        usual["data"] = yaml.safe_load((CONFIGS / "data" / "usual.yaml").read_text(encoding="utf-8"))
        given = [name for name in SAID if name not in self.config.read and self.config.get(name) != usual[name]]
        unread = [name if isinstance(self.config.get(name), dict) else f"{name}={self.config.get(name)}" for name in given]
        why = (
            "images=... are judged as they are"
            if self.config.get("images")
            else f"metric=[{','.join(metrics)}] reads nothing of it"
        )
        self._say(f"Not used, since {why}: {', '.join(unread)}" if unread else "")

    @cached_property
    def place(self) -> Path:
        """Where the model lies, in our layout."""
        return at_rest(self.config["model"])

    @cached_property
    def model(self) -> Any:
        """The model, on its device."""
        config = self.config
        model = load_model(self.place, self.allow, config["adapters"], config["base"])
        hold(model.denoiser.backbone, self.recipe.get("usual", {}), str(config.get("precision")))
        return model.to(self.device)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """What the model says of itself; nothing where there is none."""
        return {} if self.config["model"] is None else recipe_of(self.place)

    @cached_property
    def node(self) -> dict[str, Any]:
        """The config of the data: the model's own where no others are said."""
        return resolved(self.config["data"], self.recipe.get("usual", {}))

    @cached_property
    def data(self) -> Any:
        """The data module, its shards written and read.

        Raises:
            NotFound: the data are not there.
        """
        chosen, usual = self.config["data"] == self.node, self.recipe.get("usual", {}).get("data")
        where = self.node.get("train") or self.node.get("name") or (self.node.get("dataset") or {}).get("_target_", "the emoji")
        if not chosen:
            why = "as the model was trained on them" if usual else "since the model does not say what it was trained on"
            self._say(f"Data: {where} at {self.node.get('size')} px, {why} (data=..., data.train=...).")
        try:  # a model, perhaps a stranger's, chooses among data alone
            data = build(self.node, self.allow if chosen else ("ldm.data", "ldm.tower.counter", *self.config["allow"]))
            data.prepare_data()
            data.setup()
        except FileNotFoundError as error:
            if chosen or usual is None:
                raise
            raise NotFound(
                f"{self.config['model']} was trained on {where}, which cannot be read here: {error} Name where they are now, or "
                "other pictures: data.train=PATH data.val=PATH."
            ) from error
        return data

    @property
    def settings(self) -> dict[str, Any]:
        """What a number depends on beside its metric, pictures and reference."""
        model = self.config["model"]
        return {"ema": None if model is None else averaged(self.place), "code": code_version()}

    @property
    def what(self) -> dict[str, Any]:
        """What was measured."""
        models = {kind: source.protocol["model"] for kind, source in self.used.items() if "model" in source.protocol}
        put = {"adapters": list(self.model.adapters)} if self.config["adapters"] else {}
        return {"model": self.config["model"], "images": self.config["images"], **put, "sha256": models}

    def captions(self, count: int) -> list[str]:
        """The captions of the first drawings, where they have some."""
        source = self.used.get("drawing")
        fields = {} if source is None else source.fields(range(min(count, source.count)))
        return list(fields.get("caption", ()))

    @cached_property
    def _made(self) -> dict[str, str]:
        """The model's weights, and what else makes it what it is: its recipe, and the files that it reads when it draws."""
        recipe, path = without_usual(self.recipe)[0], self.place
        return {"model": weights_hash(self.model), "recipe": fingerprint(recipe, named_content(recipe, path))}

    @cached_property
    def _size(self) -> int | Sequence[int]:
        """Pixels drawn: one number, or height and width."""
        return self.config["resolution"] or self.node.get("size") or self.data.size

    def _say(self, line: str) -> None:
        if line and rank() == 0:
            print(line, flush=True)

    def _drawings(self) -> Drawings | Folder:
        config = self.config
        if config["images"] is not None:
            captions = None if config["prompts"] is None else read_captions(config["prompts"])
            return Folder(config["images"], config["resolution"], self.device, captions, config["corrupt"])
        if config["model"] is None:
            raise Refusal("model=RUN_OR_FOLDER must be said, or images=FOLDER of pictures that were drawn already.")
        size = (self._size, self._size) if isinstance(self._size, int) else tuple(self._size)
        self._say(far(size, self.recipe.get("usual", {})))
        usual = as_usual(config, self.recipe.get("usual", {}))
        how_drawn = {name: usual[name] for name in ("sampler", "guidance", "batch")}
        if guides := named_content([usual["sampler"], usual["guidance"]]):
            how_drawn["guides"] = guides
        sampler, guidance = build(usual["sampler"], self.allow), build(usual["guidance"], self.allow)
        how = (config["seed"], size, config["conditioning"], str(config["precision"]), config["paste"])
        return Drawings(self.model, self._requests(), sampler, guidance, *how, {**how_drawn, **self._made}, config["conditions"])

    def _requests(self) -> Split | Given:
        config, count = self.config, self.config["count"]
        request = {**config, "resolution": self._size, "ask": spread(config["ask"])}
        if config["prompts"] is not None:
            ask, lines = read_request({**request, "count": None, "negative": config["negative"]}, self.model)
            if count > lines:
                raise Refusal(f"fewer captions than pictures: count={count}, and prompts={config['prompts']} has {lines} lines.")
            return Given({name: value[:count] for name, value in ask.items()}, count)
        if config["ask"] or not self.model.conditioner.embedders:
            return Given(*read_request({**request, "negative": config["negative"]}, self.model))
        if config["negative"] is not None:
            raise Refusal("negative=... goes with prompts=FILE; the requests of shards have none.")
        return Split(self.data, config["requests"], self.device, chosen(self.data, count, config["requests"]))

    def _reconstructions(self) -> Reconstructions:
        if self.config["model"] is None:
            raise Refusal(
                "Reconstruction is measured with a model: model=RUN_OR_FOLDER; or choose metric=[...] of drawings alone."
            )
        alone = self.recipe.get("_target_", "").startswith("ldm.autoencoder.")
        self._say(far((self.data.size,) * 2, self.recipe.get("usual", {})))
        autoencoder = load_autoencoder(str(self.place)).to(self.device) if alone else self.model.autoencoder
        return Reconstructions(autoencoder, self._split("val"), weights_hash(autoencoder))

    def _split(self, split: str) -> Split:
        return Split(self.data, split, self.device)

    def _reference(self) -> Split | Folder | Archive:
        config, name = self.config, self.config["reference"]
        if name in ("train", "val"):
            return self._split(name)
        if name.lower().endswith(".npz"):
            return Archive(name, self.device)
        size = self._size if config["images"] is None else config["resolution"]
        if Path(name).is_dir() and not any(Path(name).glob("*.tar")):
            return Folder(name, size, self.device, limit=config["corrupt"], option="reference")
        try:
            shards = [name] if Path(name).is_file() else expand(name, "reference")
        except NotFound as error:
            raise NotFound(f"reference={name}: nothing is there. {REFERENCES}") from error
        if not all(shard.split("?")[0].lower().endswith(".tar") for shard in shards):
            raise Refusal(f"reference={name} is no file of pictures that is read. {REFERENCES}")
        if not isinstance(size, int):
            raise Refusal(
                f"reference={name} are shards, whose pictures are brought to one size: say resolution=256, or the like."
            )
        fields = {"image": self.node.get("fields", {}).get("image") or "jpg"}
        return Split(Shards(shards, fields=fields, size=size), "train", self.device)

    def _kept(self, kind: str, source: Any) -> Any:
        if isinstance(source, Folder):
            return self._use(kind, source)
        folder = self.out / f"{kind}-{fingerprint(source.protocol)[:8]}"
        return self._use(kind, Kept(source, folder, self.config["keep"]))

    def _use(self, kind: str, source: Any) -> Any:
        self.used[kind] = source
        return source


def _itself(source: Any) -> Any:
    return source


def spread(ask: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions as they were asked for, where `0..999` stands for the whole numbers from 0 to 999."""
    spans = {name: re.fullmatch(r"(\d+)\.\.(\d+)", str(value)) for name, value in ask.items()}
    return {n: ask[n] if span is None else list(range(int(span[1]), int(span[2]) + 1)) for n, span in spans.items()}


def averaged(model: Path) -> float | str:
    """The decay of the weights' average, as the run's config.yaml has it."""
    for folder in (model, model.parent.parent):
        if (folder / "config.yaml").is_file():
            callbacks = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("callback") or {}
            return (callbacks.get("ema") or {}).get("decay", "none")
    return "unknown"
