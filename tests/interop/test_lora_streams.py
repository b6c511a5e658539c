"""LoRA files of Stable Diffusion 3, Flux and PixArt: each module by the names of both layouts, against W + B A."""

import pytest
import torch

from helpers.modern import ours_of, their_flux, their_mmdit, their_pixart
from ldm.adapt import asked
from ldm.files.folder import save_tensors
from ldm.interop.adapter.lora import LoRAFile
from ldm.interop.adapters import merge, read_any
from ldm.interop.bundle import Bundle, recipe_of
from ldm.interop.find import networks
from ldm.interop.tie import bring, give

PEERS = {"sd3": lambda: their_mmdit((0,), qk_norm="rms_norm"), "flux": lambda: their_flux(True), "pixart": their_pixart}
SPELLED = {
    "diffusers": (lambda name: f"transformer.{name}.lora_A.weight", lambda name: f"transformer.{name}.lora_B.weight"),
    "kohya": (
        lambda n: f"lora_unet_{n.replace('.', '_')}.lora_down.weight",
        lambda n: f"lora_unet_{n.replace('.', '_')}.lora_up.weight",
    ),
}


@pytest.fixture(params=PEERS)
def model(request):
    """A network, its settings, and a model on it."""
    peer = PEERS[request.param]()
    network = next(n for n in networks() if type(peer).__name__ in n.classes)
    settings, _, _ = network.read_config({"_class_name": type(peer).__name__, **peer.config})
    weights = {f"denoiser.backbone.{n}": x for n, x in ours_of(peer).state_dict().items()}
    bundle = Bundle(recipe_of(network.node(settings), {}, "Flow", {"_target_": "ldm.schedule.Linear"}), weights)
    return network, settings, bundle


def assert_same_updates(first, second):
    """Of each module, whose factors may have another rank in another layout."""
    names = [n.removesuffix("lora_A.default.weight") for n in first if n.endswith("lora_A.default.weight")]
    assert names and first.keys() == second.keys()
    for name in names:
        one, two = (x[f"{name}lora_B.default.weight"] @ x[f"{name}lora_A.default.weight"] for x in (first, second))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_every_matrix_of_a_transformer_is_updated_by_the_closed_form(layout, model, tmp_path):
    """Queries, keys and values apart (diffusers) or in one (kohya's published names), scales and shifts in either order."""
    network, settings, bundle = model
    own = bundle.backbone()
    names = {n for n in own if n.endswith(".weight") and own[n].ndim == 2}
    ties = network.diffusers_ties(own, settings) if layout == "diffusers" else network.single_ties(own, settings, "Flow")
    theirs, lora, wanted = give(ties, own), {}, {}
    torch.manual_seed(0)
    for ours, tie in ties.items():
        for name in tie.theirs:
            wanted[name] = theirs[name]
            if ours in names:
                down, up = torch.randn(2, theirs[name].shape[1]), torch.randn(len(theirs[name]), 2)
                lora |= {spell(name.removesuffix(".weight")): x for spell, x in zip(SPELLED[layout], (down, up))}
                wanted[name] = theirs[name] + up @ down
    save_tensors(lora, tmp_path / "lora.safetensors")
    expected = bring(ties, wanted, {n: tuple(own[n].shape) for n in ties})
    first = read_any(str(tmp_path / "lora.safetensors"), bundle)
    for again in ("diffusers", "kohya"):
        LoRAFile().write(first, bundle, tmp_path / f"{again}.safetensors", again)
        second = read_any(str(tmp_path / f"{again}.safetensors"), bundle)
        assert_same_updates(first.tensors, second.tensors)
    merge(bundle, asked([str(tmp_path / "lora.safetensors")]))
    for name, x in expected.items():
        torch.testing.assert_close(bundle.backbone()[name], x, atol=1e-5, rtol=1e-5, msg=name)
    assert sum(not torch.equal(own[n], bundle.backbone()[n]) for n in own) == len(names)
