"""A picture as a prompt beside a frozen U-Net: without effect at first, what learns when, trained, resumed and drawn."""

import pytest
import torch
from PIL import Image
from torch import nn

from helpers.finetune import T, X, at_rest, command, text_of
from ldm.adapt import attach
from ldm.adapter.ip_adapter import IPAdapter
from ldm.build import adapted, build, load_model
from ldm.command.sample import sample
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.errors import Refusal
from ldm.files.folder import load_tensors

KINDS = {"linear": {"tokens": 2}, "resampler": {"tokens": 3, "inner": 64, "depth": 1}, "mlp": {}}
PICTURE = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.fixture(scope="module")
def base(tmp_path_factory, clip_folder):
    return at_rest(tmp_path_factory.mktemp("base"), {"text": text_of(clip_folder)})


def adapter(clip_folder, kind="linear", name="style"):
    prompt = {"_target_": "ldm.condition.image_prompt.ImagePrompt", "_partial_": True, "kind": kind, **KINDS[kind]}
    prompt |= {"model": f"local-dir:{clip_folder}"}
    return build({"_target_": "ldm.adapter.ip_adapter.IPAdapter", "name": name, "prompt": prompt})


def said(model, **more):
    fields = {"caption": ["a red fox", ""], "style": PICTURE, **more}
    return model.denoiser(X, T, model.condition(model.conditioner.fill(fields)))


@pytest.mark.parametrize("kind", KINDS)
def test_at_step_0_nothing_is_other_and_what_learns_when(base, clip_folder, kind):
    """To the bit, of whatever picture; at first only the values have a gradient, then all; base and image tower never."""
    model = load_model(base).requires_grad_(False)
    with torch.no_grad():
        before = said(model)
        attach(model, {"ip_adapter": adapter(clip_folder, kind)}, {})
        assert torch.equal(said(model.train()), before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == model.trained and not [n for n in trained if "image_tower" in n]
    optimizer, history = torch.optim.SGD(trained.values(), lr=0.1), []
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    for _ in range(2):
        optimizer.zero_grad()
        (said(model) - X).square().mean().backward()
        history.append({n for n, p in trained.items() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert history[0] == {n for n in trained if n.endswith(".v.weight")} and history[1] == trained.keys()
    assert all(p.grad is None and torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_run_is_trained_resumed_and_drawn(base, clip_folder, emoji_root, tmp_path):
    """The sample's own picture is its prompt; what is exported is what was trained, stopped twice or not."""
    words = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2", "optimizer.lr=0.01"]
    words += ["adapter=[ip_adapter]", "adapter.ip_adapter.name=style", "adapter.ip_adapter.prompt.pretrained=null"]
    words += [f"adapter.ip_adapter.prompt.model=local-dir:{clip_folder}"]
    run = train(command(base, tmp_path / "run", *words, "trainer.max_steps=3"))
    for steps in (1, 3):
        again = train(command(base, tmp_path / "again", *words, f"trainer.max_steps={steps}"))
    tensors, resumed = (load_tensors(folder / "model.safetensors") for folder in (run, again))
    assert tensors.keys() == resumed.keys() and all(torch.equal(x, resumed[name]) and x.any() for name, x in tensors.items())
    assert not [name for name in tensors if "image_tower" in name]
    alone, beside = load_model(run), load_model(base, adapters=f"look={run}:1")
    with torch.no_grad():
        found, renamed, plain = said(alone), said(beside, look=PICTURE), said(load_model(base))
        half = said(load_model(base, adapters=f"{run}:0.5"))
        assert torch.equal(half, said(alone, style_strength=torch.full((2,), 0.5)))
        assert torch.equal(said(alone, style_strength=torch.zeros(2)), plain)
    assert torch.equal(found, renamed) and not torch.equal(found, plain) and not torch.equal(half, found)
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    ask = [f"model={base}", f"adapters={run}:0.8", "prompt=a fox", "sampler.steps=2", f"out={tmp_path / 'drawn'}"]
    drawn = sample(compose_config("sample", [*ask, f"ask.style={tmp_path / 'red.png'}", "ask.style_strength=0.5"]))
    assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()
    with pytest.raises(Refusal, match=r"ask\.style=FILE must be said"):
        sample(compose_config("sample", ask))


def test_what_does_not_go_is_named(base, clip_folder, tmp_path):
    label = {"label": {"_target_": "ldm.condition.label.Label", "classes": 3, "width": 16, "slot": "vector"}}
    dit = {"_target_": "ldm.backbone.dit.DiT", "_partial_": True, "patch": 2, "width": 16, "depth": 1, "heads": 2}
    with pytest.raises(Refusal, match="this backbone is a DiT"):
        adapted(at_rest(tmp_path / "dit", label, dit), {"ip_adapter": adapter(clip_folder)})
    with pytest.raises(Refusal, match=r"has a condition of that name \(\['text'\]\)"):
        adapted(base, {"ip_adapter": adapter(clip_folder, name="text")})
    with pytest.raises(Refusal, match=r"name=a b: wanted a word"):
        IPAdapter(nn.Identity, "a b")
    with pytest.raises(Refusal, match=r"model: an image tower must be named"):
        build({"_target_": "ldm.condition.image_prompt.ImagePrompt", "width": 8, "key": "style"})
