"""Towers and autoencoder that visit the device say what they say there, and are gone afterwards."""

import torch

from helpers.training import diffusion
from ldm.autoencoder.tiled import Tiled
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
