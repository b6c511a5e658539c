"""What is evaluated and against what: a plain config -> sources of pictures, made when a metric asks for them."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.build import build, load_model
from ldm.evaluation.pictures import Drawings, Given, Kept, Reconstructions, Split, chosen
from ldm.evaluation.protocol import code_version
from ldm.evaluation.rows import fingerprint
from ldm.measure import weights_sha256
from ldm.request import read_request


class Subject:
    """The model, pictures and references that an evaluation's config names.

    used: the sources that were made, by kind; what they hold as `protocol` goes beside the numbers.
    """

    def __init__(self, config: Mapping[str, Any], out: Path) -> None:
        self.config, self.out, self.used = config, out, {}
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config["device"] == "auto" else config["device"]
        self.device = torch.device(device)
        makers = {"drawing": self._drawings, "reconstruction": self._reconstructions}
        self.pictures = {kind: lambda kind=kind, make=make: self._kept(kind, make()) for kind, make in makers.items()}
        makers = {"train": lambda: self._split("train"), "reference": self._reference}
        self.real = {kind: lambda kind=kind, make=make: self._use(kind, make()) for kind, make in makers.items()}

    @cached_property
    def model(self) -> Any:
        """The model, on its device."""
        return load_model(self.config["model"]).to(self.device)

    @cached_property
    def data(self) -> Any:
        """The data module, its shards written and read."""
        data = build(self.config["data"], ("ldm", *self.config["allow"]))
        data.prepare_data()
        data.setup()
        return data

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What a number depends on beside its metric, pictures and reference."""
        return {"ema": averaged(Path(self.config["model"])), "code": code_version()}

    @cached_property
    def what(self) -> dict[str, Any]:
        """What was measured."""
        return {"model": str(self.config["model"]), "sha256": self._weights}

    @cached_property
    def _weights(self) -> str:
        return weights_sha256(self.model)

    def _drawings(self) -> Drawings:
        config = self.config
        count = config["count"]
        if config["prompts"] is not None or config["ask"]:
            requests = Given(*read_request(config, self.model))
        else:
            requests = Split(self.data, config["requests"], self.device, chosen(self.data, count, config["requests"]))
        size = (config["size"], config["size"]) if isinstance(config["size"], int) else tuple(config["size"])
        told = {name: config[name] for name in ("sampler", "guidance", "batch")}
        sampler, guidance = build(config["sampler"]), build(config["guidance"])
        how = (config["seed"], size, config["conditioning"], str(config["precision"]))
        return Drawings(self.model, requests, sampler, guidance, *how, protocol={**told, "model": self._weights})

    def _reconstructions(self) -> Reconstructions:
        return Reconstructions(self.model.autoencoder, self._split("val"), self._weights)

    def _split(self, split: str) -> Split:
        return Split(self.data, split, self.device)

    def _reference(self) -> Split:
        return self._split(self.config["reference"])

    def _kept(self, kind: str, source: Any) -> Kept:
        folder = self.out / f"{kind}-{fingerprint(source.protocol)[:8]}"
        return self._use(kind, Kept(source, folder, self.config["keep"]))

    def _use(self, kind: str, source: Any) -> Any:
        self.used[kind] = source
        return source


def averaged(model: Path) -> float | str:
    """The decay of the weights' average, as the run's config.yaml has it."""
    for folder in (model, model.parent.parent):
        if (folder / "config.yaml").is_file():
            callbacks = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("callback") or {}
            return (callbacks.get("ema") or {}).get("decay", "none")
    return "unknown"
