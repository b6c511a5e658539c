"""A ControlNet beside a frozen U-Net: without effect at first, what learns when, strengths, regions, and what does not go."""

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.adapt import Asked, Given, as_asked, asked, attach, put_on
from ldm.build import build, load_model
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.drawing.request import read_request
from ldm.errors import Refusal
from ldm.evaluation.pictures import Drawings
from ldm.evaluation.pictures import Given as Requests
from ldm.files.folder import load_tensors, save_model
from ldm.guidance.none import Unguided
from ldm.types import Cond

UNET = {
    "_target_": "ldm.backbone.unet.UNet",
    "width": 8,
    "mult": [1, 2],
    "res_blocks": 1,
    "depth": [1, 0],
    "heads": 2,
    "groups": 4,
}
LABEL = {"_target_": "ldm.condition.label.Label", "classes": 9, "width": 6}
HINT = {"_target_": "ldm.condition.hint.Hint", "_partial_": True}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T, PICTURE = torch.tensor([0.3, 0.8]), X.flip(0).clamp(-1, 1)


def recipe_of(backbone=UNET):
    recipe = {"_target_": "ldm.build.assemble", "autoencoder": {"_target_": "ldm.autoencoder.identity.Identity"}}
    recipe |= {"condition": {"label": LABEL}, "backbone": {"_partial_": True, **backbone}}
    recipe |= {"schedule": {"_target_": "ldm.schedule.Linear"}, "prediction": {"_target_": "ldm.prediction.Flow"}}
    return recipe | {"level": {"_target_": "ldm.denoiser.LogRatio"}}


def made(backbone=UNET):
    torch.manual_seed(0)
    return loud(build(recipe_of(backbone))).requires_grad_(False)


def loud(network):
    for p in network.parameters():
        nn.init.normal_(p, std=0.1 if p.ndim < 2 else p[0].numel() ** -0.5)
    return network


def adapter(name="edges", **settings):
    return build({"_target_": "ldm.adapter.controlnet.ControlNet", "name": name, "hint": HINT, **settings})


def said(model, **more):
    fields = {"label": torch.tensor([1, 4]), **(dict.fromkeys(("edges", "depth"), PICTURE)), **more}
    return model.denoiser(X, T, model.condition(fields))


def trained():
    """Tensors of a ControlNet that speaks, by a model's names."""
    model = made()
    attach(model, {"controlnet": adapter()}, {})
    return {n: loud(nn.Linear(1, 1)) and torch.randn_like(x) * 0.2 for n, x in model.state_dict().items() if n in model.trained}


def put(model, strength=1.0, name="edges", tensors=None, **settings):
    one = Given(Asked(name, name, strength), {"controlnet": adapter(name, **settings)}, tensors or trained(), "")
    put_on(model, [one])
    return model


def test_its_halves_are_the_whole():
    """What `condition`, `down` and `up` say together, step by step as the stages lie."""
    unet, x, level = made().denoiser.backbone, X, T * 1000
    cond = Cond(tokens=torch.randn(2, 1, 6))
    heard = unet.condition(x, level, cond)
    h, skips = x, []
    for stage in unet.encoder:
        h = stage(h, *heard)
        skips.append(h)
    h = unet.middle(h, *heard)
    for stage in unet.decoder:
        h = stage(torch.cat((h, skips.pop()), 1), *heard)
    assert torch.equal(unet(x, level, cond), unet.out(h))


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0])
@torch.no_grad()
def test_at_step_0_nothing_is_other(strength):
    """To the bit, for any picture at any strength, with one and with two."""
    model, before = made(), said(made())
    attach(model, {"controlnet": adapter()}, {})
    model.requires_grad_(False)
    assert torch.equal(said(model, edges_strength=torch.full((2,), strength)), before)
    adapter("depth").attach(model)
    assert torch.equal(said(model.requires_grad_(False), edges_strength=torch.full((2,), strength)), before)


def test_what_learns_when():
    """At first only the zero convolutions have a gradient, at the third step all; the base never."""
    model = made()
    attach(model, {"controlnet": adapter()}, {})
    assert not [n for n in model.trained if "copy.decoder." in n or "copy.out." in n]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == model.trained
    optimizer, history = torch.optim.SGD(trained.values(), lr=0.1), []
    before = {n: p.clone() for n, p in model.named_parameters() if n not in model.trained}
    for _ in range(4):
        optimizer.zero_grad()
        (said(model) - X).square().mean().backward()
        history.append({n for n, p in trained.items() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert history[0] == {n for n in trained if ".zero" in n}
    silent = ("attend_tokens.q.weight", "attend_tokens.k.weight", "norm_tokens.weight", "norm_tokens.bias")  # before one token
    assert history[3] | {n for n in trained if n.endswith(silent)} == trained.keys()
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in trained)


def test_nothing_before_the_hint_is_held_for_gradients():
    """In training only the second half of the frozen network passes gradients on: its first half keeps none."""
    model, seen = made(), []
    attach(model, {"controlnet": adapter()}, {})
    base = model.train().denoiser.backbone.base
    for stage in (base.encoder[0], base.middle):
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    loss = (said(model) - X).square().mean()
    assert seen == [False, False] and loss.requires_grad
    loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in model.trained)


@torch.no_grad()
def test_strengths_regions_and_what_is_dropped():
    """Strength 0, and the null of one that guesses, are the base to the bit; a region is the whole's inside and 0 outside."""
    tensors, before = trained(), said(made())
    assert torch.equal(said(put(made(), 0.0, tensors=tensors)), before)
    model = put(made(), 0.5, tensors=tensors)
    assert not torch.equal(said(model), before)
    assert torch.equal(said(model, edges_strength=torch.zeros(2)), before)
    assert torch.equal(said(model), said(put(made(), 1.0, tensors=tensors), edges_strength=torch.full((2,), 0.5)))
    net, hint = model.denoiser.backbone.nets["edges"], model.conditioner.embedders["edges"]
    half = torch.zeros(2, 1, 8, 8)
    half[..., 4:] = 1
    dropped = torch.zeros(2, dtype=torch.bool)
    cond = Cond(tokens=torch.randn(2, 1, 6))
    whole = net(X, T, cond, hint([PICTURE, torch.ones(2)], dropped).spatial)
    region = net(X, T, cond, hint([PICTURE, half], dropped).spatial)
    assert not any(r[..., : r.shape[3] // 2].any() for r in region)
    assert all(torch.equal(r[..., r.shape[3] // 2 :], w[..., w.shape[3] // 2 :]) for r, w in zip(region, whole))
    guessing = put(made(), tensors=tensors, guess=True)
    fields = {"label": torch.tensor([1, 4]), "edges": PICTURE}
    null = guessing.denoiser(X, T, guessing.condition(fields, only=()))
    base = made()
    assert torch.equal(null, base.denoiser(X, T, base.condition(fields, only=())))


@torch.no_grad()
def test_several_add_up_in_any_order():
    tensors = trained()
    both = [Given(Asked(n, n, s), {"controlnet": adapter(n)}, tensors, "") for n, s in (("edges", 0.7), ("depth", -0.2))]
    one, other = made(), made()
    put_on(one, both)
    put_on(other, both[::-1])
    torch.testing.assert_close(said(one), said(other), atol=1e-6, rtol=0)


def test_a_request_says_pictures_and_strengths(tmp_path):
    """What is transparent is black; a strength is a number or a picture; without a picture it is asked for by name."""
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8), 51).save(tmp_path / "region.png")
    model = put(made(), 0.6)
    config = {"ask": {"label": [1], "edges": str(tmp_path / "clear.png")}, "resolution": 8}
    with pytest.warns(match=r"ask\.edges: picture 0 is of one colour"):
        ask, _ = read_request(config, model)
    assert (ask["edges"] == -1).all() and ask["edges_strength"].tolist() == pytest.approx([0.6])
    for said, found in ((0.25, [0.25]), (str(tmp_path / "region.png"), [0.2])):
        with pytest.warns(match="one colour"):
            ask, _ = read_request({**config, "ask": {**config["ask"], "edges_strength": said}}, model)
        assert ask["edges_strength"].flatten().unique().tolist() == pytest.approx(found)
    with pytest.raises(Refusal, match=r"ask\.edges=FILE must be said"):
        read_request({"ask": {"label": [1]}, "resolution": 8}, model)


@torch.no_grad()
def test_what_the_control_is_worth_is_measured_alone():
    """conditions=[edges]: none is strength 0, shuffled another's; the label stays right."""
    tensors = trained()

    def one_step(denoise, schedule, noise, seeds):
        return denoise(noise, torch.full((len(noise),), 0.5))

    def drawn(model, conditioning="right", conditions=None, **more):
        requests = Requests({"label": torch.tensor([1, 4]), "edges": PICTURE, **more}, 2)
        drawings = Drawings(model, requests, one_step, Unguided(), 0, (8, 8), conditioning, conditions=conditions)
        return drawings.images(range(2), drawings.fields(range(2)))

    control, base = put(made(), tensors=tensors), put(made(), 0.0, tensors=tensors)
    right = drawn(control)
    assert torch.equal(drawn(control, "none", ["edges"]), drawn(base)) and not torch.equal(right, drawn(base))
    assert torch.equal(drawn(control, "shuffled", ["edges"]), drawn(control, edges=PICTURE.flip(0)))
    assert torch.equal(drawn(control, "none"), drawn(base, "none", ["label"]))
    assert torch.equal(drawn(control, "right", ["edges"]), right)
    with pytest.raises(Refusal, match=r"conditions=\['edge'\]: wanted some of this model's, label, edges"):
        drawn(control, "none", ["edge"])
    control.conditioner.embedders["label"].rate = 0.0
    with pytest.raises(Refusal, match="never dropped in training; conditioning=shuffled does"):
        drawn(control, "none", ["label"])


def test_guess_is_a_word_behind_the_source():
    for word, strength in (("edges=a.pth:0.7:guess", 0.7), ("edges=canny/:guess", 1.0)):
        (one,) = asked(word)
        assert (one.name, one.strength, one.guess) == ("edges", strength, True)
    assert asked("guess:0.5")[0] == Asked("guess", None, 0.5)
    with pytest.raises(Refusal, match=r"adapters=style:guess: lora has no guess mode"):
        as_asked({"lora": {"_target_": "ldm.adapter.lora.LoRA"}}, asked("style:guess")[0])


def test_control_pictures_lie_on_the_first_picture_and_are_not_thinned(tmp_path):
    for name, size in (("wide", (40, 8)), ("square", (40, 40))):
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{name}.png")
    config = {"ask": {"label": [1], "edges": str(tmp_path / "wide.png")}, "resolution": 8}
    with pytest.raises(Refusal, match=r"ask\.edges=.*wide\.png is 40x8 and init=.*square\.png is 40x40"):
        read_request({**config, "init": str(tmp_path / "square.png")}, put(made()))
    config["ask"]["edges"] = str(tmp_path / "square.png")
    with pytest.warns(match=r"scaled down 5 times, and thin lines grow faint: make it 8x8"):
        read_request(config, put(made()))


def test_what_does_not_go_is_named():
    dit = {"_target_": "ldm.backbone.dit.DiT", "size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2}
    with pytest.raises(Refusal, match="needs an encoder with skips; this backbone is a DiT"):
        attach(made(dit), {"controlnet": adapter()}, {})
    with pytest.raises(Refusal, match=r"adapter\.controlnet\.name=label: the model has a condition of that name"):
        attach(made(), {"controlnet": adapter("label")}, {})
    with pytest.raises(Refusal, match=r"'edges' holds labels, \(2, 8, 8\); control pictures have colours"):
        said(put(made()), edges=torch.zeros(2, 8, 8, dtype=torch.int64))
    with pytest.raises(Refusal, match="wanted a word"):
        adapter("a.b")
    with pytest.raises(Refusal, match=r"Hint halves 2 times, this autoencoder 0 \(adapter\.controlnet\.hint\.channels\)"):
        attach(made(), {"controlnet": adapter(hint={**HINT, "channels": [4, 8, 8]})}, {})
    with pytest.raises(Refusal, match=r"copy\.level\.0\.weight is \(32, 8\) in the ControlNet and \(64, 16\) in this"):
        put(made({**UNET, "width": 16}))


def test_a_run_is_trained_and_drawn_alone_and_beside_others(emoji_root, tmp_path):
    """What it exports is what it trains, stopped twice or not; another name is given by NAME=."""
    save_model(made().state_dict(), recipe_of(), tmp_path / "base")
    words = ["training=finetune", f"model.init={tmp_path / 'base'}", "adapter=[controlnet]", "adapter.controlnet.name=edges"]
    words += ["+data.fields.edges=jpg", "+data.fields.label=cls", f"data.root={emoji_root}", "data.groups=[Activities]"]
    words += ["data.val_fraction=0.2", "data.size=8", "data.batch=8", "logger=[]", "callback=[checkpoint]", "rate=constant"]
    words += [f"folder={tmp_path / 'run'}", "trainer.max_steps=3", "trainer.accelerator=cpu", "optimizer.lr=0.01"]
    run = train(compose_config("train", words))
    for steps in (1, 2, 3):
        again = train(compose_config("train", [*words, f"folder={tmp_path / 'again'}", f"trainer.max_steps={steps}"]))
    tensors, resumed = (load_tensors(folder / "model.safetensors") for folder in (run, again))
    assert tensors.keys() == resumed.keys() and all(torch.equal(x, resumed[name]) for name, x in tensors.items())
    assert all(
        n.startswith(("denoiser.backbone.nets.edges.", "conditioner.embedders.edges.")) and x.any() for n, x in tensors.items()
    )
    alone, beside = load_model(run), load_model(tmp_path / "base", adapters=[f"sketch={run}:1"])
    assert list(beside.conditioner.embedders) == ["label", "sketch"]
    with torch.no_grad():
        found, renamed, base = said(alone), said(beside, sketch=PICTURE), said(load_model(tmp_path / "base"))
    assert torch.equal(found, renamed) and not torch.equal(found, base)
    guessing = load_model(tmp_path / "base", adapters=f"{run}:0.5:guess")
    assert guessing.denoiser.backbone.nets["edges"].guess and guessing.adapters[0]["guess"] is True
    with pytest.raises(Refusal, match=r"adapters: .* are both called edges"):
        load_model(tmp_path / "base", adapters=[f"edges={run}", f"edges={run}:0.5"])
