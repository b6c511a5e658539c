"""Towers and autoencoder that visit the device say what they say there, and are gone afterwards."""

import torch

from helpers.training import diffusion
from ldm.autoencoder.tiled import Tiled
from ldm.condition.edit import Edit
from ldm.drawing.generate import generate
from ldm.drawing.offload import offload
from ldm.guidance.cfg import CFG
from ldm.sampler.ddim import DDIM


def test_an_offloaded_model_draws_the_same_and_moves_each_part_there_and_back(monkeypatch):
    model = diffusion().model.eval()
    model.autoencoder = Tiled(model.autoencoder, 8, 2)
    ask, drawing = {"label": torch.tensor([1, 4])}, (DDIM(2), CFG(2.0), [0, 1], (8, 8))
    wanted = generate(model, ask, *drawing)
    moves = []
    for name, part in (("conditioner", model.conditioner), ("autoencoder", model.autoencoder)):
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    offloaded = offload(model, torch.device("cpu:0"))
    moves.clear()
    assert torch.equal(generate(offloaded, ask, *drawing), wanted)
    told = [("conditioner", "cpu:0"), ("conditioner", "cpu")]
    assert moves == [*told, *told, ("autoencoder", "cpu:0"), ("autoencoder", "cpu")]


def test_the_autoencoder_visits_with_a_condition_that_encodes_pictures_by_it(monkeypatch):
    model = diffusion().model.eval()
    model.conditioner.add("edit", Edit(model.autoencoder))
    places = ["cpu"]
    monkeypatch.setattr(model.autoencoder, "to", lambda device: places.append(str(device)))
    offload(model, torch.device("cpu:0"))
    embedder, seen = model.conditioner.embedders["edit"], []
    monkeypatch.setattr(embedder, "encode", lambda x, encode=embedder.encode: seen.append(places[-1]) or encode(x))
    model.condition({"label": torch.tensor([1]), "source": torch.zeros(1, 3, 8, 8)})
    assert seen == ["cpu:0"] and places[-1] == "cpu"
