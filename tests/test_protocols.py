"""What callers ask of conditions, data, averages and autoencoders: the object says it, whatever it inherits and is called."""

import shlex
from inspect import getattr_static
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.adapter.controlnet import HalfAndHalf
from ldm.autoencoder.identity import Identity
from ldm.autoencoder.vq import VQ
from ldm.backbone.dit import DiT
from ldm.backbone.unet import UNet
from ldm.command import precompute as command
from ldm.compose import compose_config
from ldm.condition.cached_text import CachedText, embed, save_null
from ldm.conditioner import Conditioner
from ldm.drawing.request import read_request
from ldm.embedder import OPTIONAL, Condition, complete
from ldm.files.lightning import are_logs_due, begin_step_anew, listen_with
from ldm.nn.route import Routed
from ldm.training.callback.ema import EMA
from ldm.training.callback.power_ema import PowerEMA
from ldm.training.protocols import Average, Quantised, averages_in
from ldm.types import Cond, Embedder, Widths

NO = torch.zeros(2, dtype=torch.bool)


class Brightness(nn.Module):
    """A condition of the user's that inherits nothing of ours, and has only what it must."""

    key, rate, widths = "brightness", 0.1, Widths(vector=1)

    def forward(self, value, drop):
        return Cond(vector=torch.as_tensor(value).float()[:, None] * ~drop[:, None])


class Tower(nn.Module):
    """A text tower of the user's: four characters of a title, each a token."""

    key, rate, widths, frozen = "title", 0.1, Widths(tokens=3), ("table",)

    def __init__(self, rows: int = 128, key: str = "title") -> None:
        super().__init__()
        self.key, self.table = key, nn.Embedding(rows, 3).requires_grad_(False)
        self.table.weight.data.copy_(torch.arange(3.0 * rows).sin().reshape(rows, 3))

    def forward(self, value, drop):
        ids = [[ord(c) for c in ("" if d else v)[:4].ljust(4)] for v, d in zip(value, drop.tolist())]
        return Cond(tokens=self.table(torch.tensor(ids)))

    def settings(self):
        return {"rows": self.table.num_embeddings}


def test_the_defaults_are_the_protocols_optional_members():
    stated = {*Embedder.__annotations__, *(name for name in vars(Embedder) if not name.startswith("_"))}
    assert set(OPTIONAL) == stated - {"key", "rate", "widths"}


def test_a_condition_that_inherits_nothing_of_ours_is_trained_drawn_with_and_asked_for():
    conditioner = Conditioner({"light": Brightness()})
    model = SimpleNamespace(conditioner=conditioner)
    ask, count = read_request({"ask": {"brightness": [0.25, 0.5]}}, model)
    assert count == 2 and conditioner(ask).vector.flatten().tolist() == [0.25, 0.5]
    assert conditioner.show(ask) == {} and conditioner.hole is None
    with pytest.raises(ValueError, match=r"This model is asked by ask\.brightness="):
        read_request({}, model)


def test_what_a_condition_says_itself_is_kept():
    tower = complete(Tower())
    assert tower.settings() == {"rows": 128} and tower.frozen == ("table",) and tower.original() is None
    assert complete(tower) is tower and isinstance(complete(Brightness()).read("x", ["a"], (8, 8)), list)
    assert type(Condition().read("x", [1, 2], (8, 8))) is torch.Tensor


def test_a_text_tower_of_the_users_own_is_cached_under_whatever_name(tmp_path, monkeypatch):
    tower = complete(Tower())
    save_null(tower, tmp_path)
    cache = CachedText(Tower, str(tmp_path), key="title", stands_for="mine")
    said = {f"title_{member.split('.')[1]}": value for member, value in embed(tower, ["fox", "lion"]).items()}
    captions = cache.derive({"title": ["fox", "lion"], **said}, None)["title"]
    assert torch.equal(cache(captions, NO).tokens, tower(["fox", "lion"], NO).tokens)
    assert cache.original().settings() == tower.settings() and not cache.kept
    node = {"_target_": f"{__name__}.Tower", "rows": 128, "rate": 0.1}
    config = SimpleNamespace(out=str(tmp_path), condition={"mine": node})
    monkeypatch.setattr(command.OmegaConf, "to_container", lambda node, resolve: node)
    words = command._words("mine", tower, config)
    monkeypatch.undo()
    load = compose_config("train", shlex.split(shlex.join(words))).condition.cached_text.load
    assert dict(load) == {"_target_": f"{__name__}.Tower", "_partial_": True, "key": "title", "rows": 128}


def test_an_average_is_known_by_what_it_keeps_whatever_its_callback_is_called():
    kept = {"model.w": torch.ones(2)}
    states = {
        "Mine{'decay': 0.9}": {"average": kept, "n": 3},
        "EMAfter": {"updates": 2},
        "PowerEMA": {"averages": {"0.050": kept}},
    }
    assert averages_in({"callbacks": states}) == kept and averages_in({}) == {}
    assert isinstance(EMA(), Average) and not isinstance(PowerEMA("x", 1), Average)


def test_a_codebook_is_known_by_what_it_does():
    small = {"channels": 2, "width": 4, "mult": (1,), "res_blocks": 1, "groups": 2, "codes": 4}
    assert isinstance(VQ(**small), Quantised) and VQ(**small).codes() == 4 and not isinstance(Identity(), Quantised)


@pytest.mark.parametrize(
    ("reach", "name"),
    [(are_logs_due, "_logger_connector"), (begin_step_anew, "fit_loop"), (lambda t: listen_with(t, print), "_signal_connector")],
)
def test_a_lightning_without_what_is_reached_for_is_named(reach, name):
    with pytest.raises(ValueError, match=rf"needs pytorch-lightning >= 2\.6, < 2\.7; found \d.*SimpleNamespace has no {name}"):
        reach(SimpleNamespace(accumulate_grad_batches=1))


def test_protocols_are_told_without_looking_at_modules():
    """From Python 3.12 on isinstance finds what a class or an object's own dictionary has, and no module or parameter of it."""
    from typing import _get_protocol_attrs as members_of

    unet = UNet(3, Widths(tokens=8), width=8, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4)
    dit = DiT(3, Widths(vector=16), patch=2, width=16, depth=1, heads=2)
    for network, protocol in ((unet, HalfAndHalf), (dit, Routed)):
        assert isinstance(network, protocol)
        for member in members_of(protocol):
            getattr_static(network, member)
