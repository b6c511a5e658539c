"""A family that was never seen is one file in `ldm/interop/network/`, and what a user calls a condition decides nothing."""

import json
import sys

import pytest
import torch

import ldm.interop.network
from helpers.family import of_words, scheduler, their_pipeline, their_vae
from ldm.build import load_model
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.interop.__main__ import main
from ldm.interop.convert import read, write
from ldm.interop.tie import give
from ldm.types import Cond

TOY = '''
"""A network of two convolutions."""

import torch

from ldm.interop.protocols import Network
from ldm.interop.tie import kernel, same


class Toy(torch.nn.Module):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, widths, width=8):
        super().__init__()
        self.inward, self.outward = torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.Linear(width, channels)

    def forward(self, x, noise_level, cond):
        return self.outward(self.inward(x).movedim(1, 3)).movedim(3, 1)

    def blocks(self):
        return []


class ToyNetwork(Network):
    name, target, made, classes, prefix = "Toy", "ldm.interop.network.toy.Toy", Toy, ("ToyModel",), "toy."

    def settings_of(self, shapes, told):
        width, channels = shapes["first.weight"][:2]
        return {"width": width}, channels, {}

    def read_config(self, config):
        return {"width": config["width"]}, config["channels"], {}

    def config(self, settings, bundle):
        return {"_class_name": "ToyModel", "channels": self.channels(bundle), "width": settings["width"]}

    def channels(self, bundle):
        return len(bundle.backbone()["outward.bias"])

    def single_ties(self, names, settings, prediction):
        return {name: same(name.replace("inward", "first").replace("outward", "last")) for name in names}

    def diffusers_ties(self, names, settings):
        return {name: kernel(f"net.{name}", 2) if name == "outward.weight" else same(f"net.{name}") for name in names}


NETWORK = ToyNetwork()
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The file, put beside the others; and a pipeline's folder with such a network."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    monkeypatch.setattr(ldm.interop.network, "__path__", [*ldm.interop.network.__path__, str(tmp_path / "more")])
    from ldm.interop.network.toy import NETWORK, Toy

    torch.manual_seed(0)
    net = Toy(4, None)
    folder = tmp_path / "theirs"
    their_vae().save_pretrained(folder / "vae")
    scheduler("v_prediction").save_pretrained(folder / "scheduler")
    ties = NETWORK.diffusers_ties(net.state_dict(), {})
    (folder / "unet").mkdir()

    save_tensors(give(ties, net.state_dict()), folder / "unet" / "diffusion_pytorch_model.safetensors")
    write_json({"_class_name": "ToyModel", "channels": 4, "width": 8}, folder / "unet" / "config.json")
    index = {
        "unet": ["diffusers", "ToyModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write_json({"_class_name": "ToyPipeline", **index}, folder / "model_index.json")
    yield net, folder
    del sys.modules["ldm.interop.network.toy"]


def test_it_travels_to_every_layout_and_back(toy, tmp_path, capsys):
    net, theirs = toy
    main([str(theirs), str(tmp_path / "ours"), "--to", "ldm"])
    assert "Toy          " in (said := capsys.readouterr().out) and "Velocity on ScaledLinear" in said
    write(read(str(tmp_path / "ours"))[0], tmp_path / "one.safetensors", "compvis")
    assert "toy.first.weight" in load_tensors(tmp_path / "one.safetensors")
    bundle, layout = read(str(tmp_path / "one.safetensors"))
    assert layout == "compvis" and bundle.recipe["prediction"]["_target_"] == "ldm.prediction.Velocity"
    write(bundle, tmp_path / "again", "diffusers")
    for part in ("unet", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        before, after = load_tensors(theirs / file), load_tensors(tmp_path / "again" / file)
        assert before.keys() == after.keys() and all(torch.equal(x, after[n]) for n, x in before.items())
    assert json.loads((tmp_path / "again" / "unet" / "config.json").read_text())["width"] == 8
    model, x, t = load_model(tmp_path / "ours", ["ldm.interop"]), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        assert torch.equal(model.denoiser.output(x, t, Cond()), net(x, t, Cond()))


def test_what_is_left_over_is_named(toy, tmp_path):

    _, theirs = toy
    write(read(str(theirs))[0], tmp_path / "one.safetensors", "compvis")
    save_tensors(load_tensors(tmp_path / "one.safetensors") | {"toy.more": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"none of this model's, such as toy\.more"):
        read(str(tmp_path / "two.safetensors"))


@pytest.mark.parametrize("made, mine", [("of_words", "bert"), ("xl", "text")])
def test_a_condition_of_another_name_travels_as_what_it_is(made, mine, tmp_path):
    pipeline = of_words(tmp_path) if made == "of_words" else their_pipeline(made, tmp_path / "words")
    pipeline.save_pretrained(tmp_path / "theirs")
    write(read(str(tmp_path / "theirs"))[0], tmp_path / "ours", "ldm")
    other = (tmp_path / "ours" / "config.json").read_text().replace(f'"{mine}": {{', '"mine": {')
    (tmp_path / "ours" / "config.json").write_text(other)
    weights = load_tensors(tmp_path / "ours" / "model.safetensors")
    save_tensors(
        {n.replace(f"embedders.{mine}.", "embedders.mine."): x for n, x in weights.items()},
        tmp_path / "ours" / "model.safetensors",
    )
    for place in (f.name for f in (tmp_path / "ours").glob(f"condition.{mine}*")):
        (tmp_path / "ours" / place).rename(tmp_path / "ours" / place.replace(f"condition.{mine}", "condition.mine"))
    (tmp_path / "ours" / "config.json").write_text(other.replace(f"./condition.{mine}", "./condition.mine"))
    bundle = read(str(tmp_path / "ours"))[0]
    write(bundle, tmp_path / "again", "diffusers")
    write(bundle, tmp_path / "home", "ldm")
    assert load_model(tmp_path / "home").conditioner.embedders["mine"]
    for file in (f.relative_to(tmp_path / "theirs") for f in (tmp_path / "theirs").rglob("*.safetensors")):
        before, after = load_tensors(tmp_path / "theirs" / file), load_tensors(tmp_path / "again" / file)
        assert {n.removeprefix("text_model.") for n in before} == {n.removeprefix("text_model.") for n in after}
    write(bundle, tmp_path / "one.safetensors", "compvis")
    assert next(iter(read(str(tmp_path / "one.safetensors"))[0].recipe["condition"])) == mine
