"""LoRA beside a frozen model: without effect at first, learning alone, resumed, drawn merged; what does not go is named."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers.language import save_t5
from ldm.adapt import Asked, Given, asked, attach, put_on
from ldm.adapter.lora import LoRA
from ldm.build import adapted, build, build_stage, load_model
from ldm.command.evaluate import evaluate
from ldm.command.train import of_base, train
from ldm.compose import compose_config
from ldm.errors import Refusal
from ldm.files.base import identity_of
from ldm.files.folder import load_tensors, read_json, read_recipe, save_model, save_tensors, with_parts, write_json
from ldm.interop.adapters import base_of, is_adapter
from ldm.nn.attention import split_attention
from ldm.training.saved import read_checkpoint

UNET = {
    "_target_": "ldm.backbone.unet.UNet",
    "width": 8,
    "mult": [1, 2],
    "res_blocks": 1,
    "depth": [1, 0],
    "heads": 2,
    "groups": 4,
}
DIT = {"_target_": "ldm.backbone.dit.DiT", "size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2}
DIT["vector"] = {"_target_": "ldm.nn.layers.mlp", "_partial_": True}
LABEL = {"_target_": "ldm.condition.label.Label", "classes": 9, "width": 8, "slot": "vector"}


def at_rest(folder, backbone, condition):
    """A model of 3 x 8 x 8 pictures with random weights that leave no branch silent, exported."""
    torch.manual_seed(0)
    recipe = {"_target_": "ldm.build.assemble", "autoencoder": {"_target_": "ldm.autoencoder.identity.Identity"}}
    recipe |= {
        "condition": condition,
        "backbone": {"_partial_": True, **backbone},
        "schedule": {"_target_": "ldm.schedule.Linear"},
    }
    recipe |= {"prediction": {"_target_": "ldm.prediction.Flow"}, "level": {"_target_": "ldm.denoiser.LogRatio"}}
    model = build(recipe)
    for p in model.denoiser.parameters():
        nn.init.normal_(p, std=0.1 if p.ndim < 2 else p[0].numel() ** -0.5)
    save_model({n: x for n, x in model.state_dict().items() if ".tower." not in n}, with_parts(recipe, folder), folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory, clip_folder):
    text = {"_target_": "ldm.condition.text.Text", "model": f"local-dir:{clip_folder}"}
    return at_rest(tmp_path_factory.mktemp("base"), UNET, {"text": text})


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return at_rest(tmp_path_factory.mktemp("dit"), DIT, {"label": LABEL})


X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.8])
FIELDS = {"caption": ["a fox", "two"], "label": torch.tensor([1, 4])}


def said(model):
    return model.denoiser(X, T, model.condition({name: FIELDS[name] for name in model.conditioner.fields}))


@pytest.mark.parametrize("targets", ["attention", "transformers", "all"])
def test_at_step_0_nothing_is_other(base, dit, targets):
    """To the bit; the parts that are trained grow from one list to the next."""
    counts = []
    for place in (base, dit):
        model = load_model(place).requires_grad_(False)  # torch folds a product otherwise where its weight wants a gradient
        with torch.no_grad():
            before = said(model)
            attach(model, {"lora": LoRA(rank=2, targets=targets)}, {})
            assert torch.equal(said(model), before)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == model.trained
        counts.append(len(model.trained) // 2)
    assert counts == {"attention": [32, 2], "transformers": [48, 4], "all": [79, 10]}[targets]


def test_a_split_attention_says_the_same(clip_folder, base):
    """As nn.MultiheadAttention, with a causal mask, and in a text tower, where LoRA begins without effect."""
    whole = nn.MultiheadAttention(16, 2, batch_first=True)
    nn.init.normal_(whole.in_proj_bias)
    x, mask = torch.randn(3, 5, 16), torch.full((5, 5), -torch.inf).triu(1)
    wanted = whole(x, x, x, need_weights=False, attn_mask=mask)[0]
    holder = nn.ModuleList([whole])
    split_attention(holder)
    found, none = holder[0](x, x, x, need_weights=False, attn_mask=mask)
    assert none is None and (found - wanted).abs().max() < 1e-6
    assert holder[0].q.weight.data_ptr() == whole.in_proj_weight.data_ptr()
    model = adapted(base, {"lora": LoRA(rank=2, text=True)}).eval()
    assert (said(model) - said(load_model(base))).abs().max() < 1e-5
    assert sum(".tower." in name for name in model.trained) == 2 * 4 * 2


def test_what_no_gradient_reaches_has_no_factors(clip_folder, tmp_path, capsys):
    """A tower that is read before its last block, under DDP too; a language model is read without a gradient."""
    node = {"_target_": "ldm.condition.text.Text", "model": f"local-dir:{clip_folder}", "layers": [-2]}
    model = adapted(at_rest(tmp_path / "text", UNET, {"text": node}), {"lora": LoRA(rank=2, targets="all", text=True)})
    assert sum(".resblocks.0." in name for name in model.trained) == 2 * 6
    assert not any(".resblocks.1." in name for name in model.trained)
    assert "without conditioner.embedders.text.tower.transformer.resblocks.1: no gradient" in capsys.readouterr().out
    said(model).square().mean().backward()
    assert all(model.get_parameter(name).grad is not None for name in model.trained)
    t5 = {"_target_": "ldm.condition.language.Language", "model": str(save_t5(tmp_path / "t5")), "length": 8}
    for targets in ("attention", "SelfAttention"):
        with pytest.raises(Refusal, match=r"no text tower is run here with a gradient \(the model is told by Language\)"):
            adapted(at_rest(tmp_path / "language", UNET, {"text": t5}), {"lora": LoRA(text=True, targets=targets)})


def loud(model):
    for name in sorted(model.trained):
        p = model.get_parameter(name)
        nn.init.normal_(p, std=0.3) if "magnitude" not in name else p.data.mul_(torch.rand_like(p) + 0.5)
    return model.eval()


@pytest.mark.parametrize("place", ["base", "dit"])
def test_gradients_are_those_of_the_sum(place, request):
    """d loss / d B and d A of PEFT's layers = those of W + alpha / rank B A as one weight."""
    place = request.getfixturevalue(place)
    model = loud(adapted(place, {"lora": LoRA(rank=2, alpha=3.0, targets="all")}))
    said(model).square().mean().backward()
    own = {name: model.get_parameter(name) for name in model.trained}
    plain = load_model(place).requires_grad_(False)
    free = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    weights = {}
    for name in (n for n in free if "lora_A" in n):
        w = plain.get_parameter(name.replace(".lora_A.default", ""))
        b = free[name.replace("lora_A", "lora_B")]
        weights[name.replace(".lora_A.default", "")] = w + 1.5 * (b.flatten(1) @ free[name].flatten(1)).reshape(w.shape)
    cond = plain.condition({name: FIELDS[name] for name in plain.conditioner.fields})
    inner = {name.removeprefix("denoiser."): w for name, w in weights.items()}
    functional_call(plain.denoiser, inner, (X, T, cond)).square().mean().backward()
    largest = max(p.grad.abs().max() for p in free.values())
    assert all((own[name].grad - free[name].grad).abs().max() < 1e-5 * largest for name in own)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in model.trained)


@pytest.mark.parametrize("text", [False, True])
def test_what_is_frozen_stays_to_the_bit(base, text):
    """20 steps of AdamW with weight decay: at the first only B moves; the base and its towers never."""
    model = adapted(base, {"lora": LoRA(rank=2, targets="all", text=text)})
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(20):
        optimizer.zero_grad()
        said(model).square().mean().backward()
        if step == 0:
            grads = {name: model.get_parameter(name).grad for name in model.trained}
            heard = {name: g for name, g in grads.items() if g is not None}
            assert all(bool(g.any()) is ("lora_B" in name) for name, g in heard.items()) and len(heard) > 0.9 * len(grads)
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - model.trained)
    assert not any(torch.equal(before[name], after[name]) for name in heard)


@pytest.mark.parametrize("dora", [False, True])
def test_drawn_merged_is_peft_unmerged(base, dit, dora, tmp_path):
    """LoRA and DoRA on matrices and kernels, on the network and a text tower, as at rest."""
    for i, place in enumerate((base, dit)):
        lora = LoRA(rank=2, alpha=1.0, targets="all", dora=dora, text=place == base)
        model = loud(adapted(place, {"lora": lora}))
        recipe = {"_target_": "ldm.build.adapted", "base": {"path": place, "sha256": sha(place)}}
        settings = {"rank": 2, "alpha": 1.0, "targets": "all", "dora": dora, "text": lora.text}
        recipe["adapters"] = {"lora": {"_target_": "ldm.adapter.lora.LoRA", **settings}}
        save_model({name: model.get_parameter(name) for name in model.trained}, recipe, tmp_path / str(i))
        wanted = said(model)
        merged = load_model(tmp_path / str(i))
        assert (said(merged) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert merged.state_dict().keys() == load_model(place).state_dict().keys()


def sha(place):
    from ldm.files.content import file_content

    return file_content(f"{place}/model.safetensors")


def test_lengths_of_input_columns(base):
    """Older LyCORIS' DoRA: m V / |V| over each input column, of a matrix and of a kernel."""
    weights = load_model(base).state_dict()
    for module in ("denoiser.backbone.level.0", "denoiser.backbone.encoder.1.0.conv_in"):
        w = weights[f"{module}.weight"]
        a, b, m = torch.randn(2, *w.shape[1:]), torch.randn(len(w), 2), torch.rand(1, w.shape[1])
        parts = {"lora_A.default.weight": a, "lora_B.default.weight": b, "lora_magnitude_vector.default.weight": m}
        tensors = {f"{module}.{name}": x for name, x in parts.items()}
        found = LoRA().merged(tensors, 0.5, weights, weights)[f"{module}.weight"]
        v = w + (b @ a.flatten(1)).reshape(w.shape)
        norm = v.transpose(0, 1).flatten(1).norm(dim=1)
        whole = (m[0] / norm).reshape(1, -1, *(1,) * (w.ndim - 2)) * v
        torch.testing.assert_close(found, w + 0.5 * (whole - w))


# ---- the road: train, resume, draw


def command(base, emoji_root, folder, *more):
    words = ["training=finetune", f"model.init={base}", "adapter=[lora]", f"data.root={emoji_root}", "data.groups=[Activities]"]
    words += ["data.val_fraction=0.2", "data.size=8", "data.batch=8", "logger=[]", "callback=[checkpoint]", f"folder={folder}"]
    return compose_config("train", [*words, "callback.checkpoint.every=2", "trainer.accelerator=cpu", *more])


@pytest.fixture(scope="module")
def run(base, emoji_root, tmp_path_factory):
    return train(command(base, emoji_root, tmp_path_factory.mktemp("run"), "trainer.max_steps=6", "rate=constant"))


def test_resumed_twice_is_the_same_run(base, emoji_root, run, tmp_path):
    for steps in (2, 4, 6):
        train(command(base, emoji_root, tmp_path, f"trainer.max_steps={steps}", "rate=constant"))
    one, other = (load_tensors(folder / "model.safetensors") for folder in (run, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(x.any() for x in one.values())


@pytest.mark.slow
def test_a_lora_is_distilled_beside_its_own_teacher(base, emoji_root, tmp_path):
    """LCM-LoRA (https://arxiv.org/abs/2311.05556): factors alone are trained, and drawn from as any others are."""
    more = ["trainer.max_steps=2", "rate=constant", "objective=latent_consistency", "callback=[checkpoint,ema]"]
    folder = train(command(base, emoji_root, tmp_path, *more))
    factors = load_tensors(folder / "model.safetensors")
    assert factors and all(".lora_" in name and x.any() for name, x in factors.items())
    assert not torch.equal(said(load_model(base, adapters=[f"{folder}:1"])), said(load_model(base)))


def test_a_checkpoint_holds_what_is_trained(base, run):
    checkpoint = read_checkpoint(run / "checkpoints" / "step-00000006.ckpt")
    exported = load_tensors(run / "model.safetensors")
    assert {name.removeprefix("model.") for name in checkpoint["state_dict"]} == exported.keys()
    assert all(".lora_" in name for name in exported) and len(checkpoint["optimizer_states"][0]["state"]) == len(exported)
    recipe = read_recipe(run)
    assert recipe["base"] == identity_of(Path(base)) == checkpoint["recipe"]["base"]
    assert not (run / "condition.text").exists()


def test_a_base_with_another_text_tower_is_another(base, run, tmp_path, capfd):
    """Of a record from before its parts were in it, it is said that they were not compared."""
    shutil.copytree(base, tmp_path / "base")
    tower = tmp_path / "base" / "condition.text" / "open_clip_model.safetensors"
    assert torch.equal(said(load_model(run, base=tmp_path / "base")), said(load_model(run)))
    save_tensors({name: x + 1 for name, x in load_tensors(tower).items()}, tower)
    with pytest.raises(Refusal, match=r"there is another: its autoencoder or a text tower \(sha256 \w{12}, now \w{12}\)"):
        load_model(run, base=tmp_path / "base")
    shutil.copytree(run, tmp_path / "run")
    recipe = read_recipe(run)
    del recipe["base"]["parts"]
    write_json(recipe, tmp_path / "run" / "config.json")
    capfd.readouterr()
    load_model(tmp_path / "run", base=tmp_path / "base")
    assert "does not say which autoencoder and text towers its base had" in capfd.readouterr().out


def test_a_run_draws_alone_beside_others_and_without_peft(base, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    alone, beside = load_model(run), load_model(base, adapters=[f"{run}:1"])
    unfinished = load_model(run / "checkpoints" / "step-00000006.ckpt")
    assert torch.equal(said(alone), said(beside)) and torch.equal(said(alone), said(unfinished))
    assert not torch.equal(said(alone), said(load_model(base)))
    assert torch.equal(said(load_model(base, adapters=f"{run}:0")), said(load_model(base)))
    assert alone.adapters[0].items() >= {"source": str(run), "strength": 1.0}.items() and alone.adapters[0]["sha256"]
    with pytest.raises(Refusal, match=rf"adapters={run} is at work already, since model={run} is its run"):
        load_model(run, adapters=f"{run}:0.5")
    with pytest.raises(Refusal, match=r"are the same\. Ask for it once, with the strengths' sum"):
        load_model(base, adapters=[str(run), f"{run}:0.5"])
    with pytest.raises(Refusal, match=r"trains by PEFT .*pip install 'ldm\[lora\]'\. Drawing with a LoRA needs none"):
        adapted(base, {"lora": LoRA()})


@pytest.mark.slow
def test_a_whole_evaluation_needs_no_peft(base, run, emoji_root, tmp_path, monkeypatch):
    """Of a run, and of a file at strength 0, whose numbers are the base's; the protocol names what was put to work."""
    monkeypatch.setitem(sys.modules, "peft", None)
    words = [
        f"data.root={emoji_root}",
        "data.groups=[Activities]",
        "data.val_fraction=0.2",
        "data.size=8",
        "count=4",
        "data=emoji",
    ]
    words += ["metric=[text_match]", "metric.text_match.side=4", "sampler.steps=2", "batch=4", f"cache={tmp_path}/cache"]

    def measured(out, *more):
        return evaluate(compose_config("evaluate", [*words, f"out={tmp_path / out}", *more]))[0]

    plain, none = measured("plain", f"model={base}"), measured("none", f"model={base}", f"adapters={run}:0")
    assert plain == none and plain.keys() == measured("run", f"model={run}").keys()
    told = read_json(tmp_path / "none" / "metrics.json")
    assert all(one["subject"]["adapters"][0]["strength"] == 0 for one in told.values())


def test_a_run_on_the_hub_draws_as_the_one_here(base, run, monkeypatch):
    """As a model and as an adapter; it is known again by its content."""
    for place in ("ldm.interop.hub.download", "ldm.interop.cache.download"):
        monkeypatch.setattr(place, lambda source: Path(run))
    here = load_model(run)
    for there in (load_model("hf://me/mine"), load_model(base, adapters="hf://me/mine")):
        assert torch.equal(said(there), said(here)) and there.adapters[0]["sha256"] == here.adapters[0]["sha256"]
    with pytest.raises(Refusal, match="is at work already"):
        load_model(run, adapters="hf://me/mine:0.5")
    assert is_adapter("hf://me/mine") and base_of("hf://me/mine") == base


class Plain:
    """An adapter of one's own with nothing but what it needs."""

    def attach(self, model):
        return [NAME]

    def owns(self, name):
        return name == NAME

    def apply(self, model, tensors, strength, base):
        model.get_parameter(NAME).data = base[NAME] + strength * tensors[NAME]


NAME = "denoiser.backbone.out.2.bias"


def test_ones_own_adapter_needs_three_methods(base):
    model, before = load_model(base), load_model(base).get_parameter(NAME)
    put_on(model, [Given(Asked("mine", strength=0.5), {"plain": Plain()}, {NAME: torch.full_like(before, 2.0)}, "sha")])
    assert torch.equal(model.get_parameter(NAME), before + 1) and model.whole == ()
    model = load_model(base)
    attach(model, {"plain": Plain(), "other": Plain()}, {})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [NAME]


def test_a_run_is_drawn_as_its_base(base, tmp_path):
    """With its sampler, guidance and precision; the size is that of the pictures that it learns from."""
    usual = {"sampler": {"steps": 7}, "guidance": {"scale": 3.0}, "precision": "bf16", "resolution": [8, 8]}
    recipe = {**read_recipe(Path(base)), "usual": usual}
    save_model(load_tensors(Path(base) / "model.safetensors"), recipe, tmp_path)
    words = [f"model.init={tmp_path}", "adapter=[lora]"]
    assert of_base(compose_config("train", ["training=finetune", *words])) == {n: usual[n] for n in usual if n != "resolution"}
    assert of_base(compose_config("train", [f"model.init={tmp_path}"])) == {}


def test_all_of_a_base_is_trained_without_adapters(base, emoji_root, tmp_path):
    """A whole model with the base's own config comes out, which stands on its own."""
    folder = train(command(base, emoji_root, tmp_path, "adapter=[]", "rates={text: 0.5}", "trainer.max_steps=1"))
    recipe = read_recipe(folder)
    assert recipe["_target_"] == "ldm.build.assemble" and recipe["condition"]["text"]["rate"] == 0.5
    assert recipe["condition"]["text"]["model"] == "local-dir:./condition.text"
    after, before = load_model(folder).state_dict(), load_model(base).state_dict()
    assert after.keys() == before.keys() and not torch.equal(
        after["denoiser.backbone.out.2.weight"], before["denoiser.backbone.out.2.weight"]
    )


def test_what_does_not_go_on_is_named(base, dit, emoji_root, run, tmp_path):
    with pytest.raises(Refusal, match=r"adapter\.lora\.rank: 4 \(before: 8\)"):
        train(command(base, emoji_root, run, "adapter.lora.rank=4", "trainer.max_steps=7", "rate=constant"))
    other = at_rest(tmp_path / "other", UNET, {"text": {**read_recipe(Path(base))["condition"]["text"], "model": clip_of(base)}})
    weights = load_tensors(tmp_path / "other" / "model.safetensors")
    save_model({n: x + 1 for n, x in weights.items()}, read_recipe(tmp_path / "other"), tmp_path / "other")
    with pytest.raises(Refusal, match=r"adapters were trained on .*; model\.init has"):
        train(command(other, emoji_root, run, "trainer.max_steps=7", "rate=constant"))
    with pytest.raises(
        Refusal, match=r"trained on .*, and in .* there is another: its model\.safetensors .* Say base=PATH, or put it"
    ):
        load_model(run, base=other)
    with pytest.raises(Refusal, match="is updated, and there is no such module here"):
        load_model(dit, adapters=str(run))
    with pytest.raises(Refusal, match="is a whole model: model="):
        load_model(base, adapters=base)
    with pytest.raises(Refusal, match="holds adapters, and no whole model"):
        adapted(str(run), {})
    with pytest.raises(Refusal, match="stands on no base"):
        load_model(base, base=base)


def clip_of(base):
    return f"local-dir:{base}/condition.text"


WRONG = {
    "nothing": (LoRA(targets="nothing"), r"targets=nothing matches none of the \d+ modules; they are named like denoiser"),
    "resampler": (LoRA(targets=r"encoder\.2"), r"encoder\.2\.0 resizes inside; PEFT cannot wrap it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_targets_that_cannot_be_are_named(base, case):
    lora, message = WRONG[case]
    with pytest.raises(Refusal, match=message):
        adapted(base, {"lora": lora})


def test_other_mistakes_are_named(dit, base):
    with pytest.raises(Refusal, match=r"no text tower is run here with a gradient \(the model is told by Label\)"):
        adapted(dit, {"lora": LoRA(text=True)})
    with pytest.raises(Refusal, match=r"rates\.txt: the base has no such condition\. Did you mean `text`"):
        adapted(base, {}, {"txt": 0.5})
    model = load_model(base)
    model.conditioner.embedders["text"].drop_from = 0.05
    with pytest.raises(Refusal, match=r"condition\.text\.drop_from=0\.05: wanted 0 to 1 - rate, and rates\.text=0\.96"):
        attach(model, {}, {"text": 0.96})
    with pytest.raises(Refusal, match=r"rates\.text=1\.5: wanted 0 \(never dropped\) to 1"):
        attach(model, {}, {"text": 1.5})
    with pytest.raises(Refusal, match="would make it nothing"):
        LoRA(alpha=0)
    with pytest.raises(Refusal, match=r"begins from a model at rest: model\.init=FOLDER"):
        build_stage(compose_config("train", ["training=finetune", "adapter=[lora]"]))


def test_how_adapters_are_asked_for(tmp_path, monkeypatch):
    odd = tmp_path / "rank=8, [a]:b.safetensors"
    odd.touch()
    monkeypatch.chdir(tmp_path)
    for place in (str(odd), odd.name):
        assert asked([place, f"{place}:0.5:0.25"]) == [Asked(place), Asked(place, None, 0.5, 0.25)], "a path that is there"
    (one,) = asked("<fox>=a/b.pt:0.5:-0.25")
    assert (one.name, one.source, one.strength, one.text) == ("<fox>", "a/b.pt", 0.5, -0.25)
    assert asked("hf://org/name:2")[0].source == "hf://org/name" and asked(None) == [] and asked(["a", "b"])[1].strength == 1
    (tmp_path / "x=y:1").touch()
    place = str(tmp_path / "x=y:1")
    assert asked(place)[0].source == place
    assert asked([f"a={place}", f"b={place}:0.5:guess"]) == [Asked(place, "a"), Asked(place, "b", 0.5, guess=True)]
    with pytest.raises(Refusal, match=r"the strength 'strong' is no number"):
        asked("a.safetensors:strong")
    with pytest.raises(Refusal, match="adapters= names nothing"):
        asked("")
    with pytest.raises(Refusal, match=r"x\.pt and y\.pt are both called a"):
        asked(["a=x.pt", "a=y.pt"])


def test_adapters_are_free_text_on_the_command_line():
    config = compose_config("sample", ["model=m", "adapters=[a b.safetensors:0.8,<fox>=x.pt,e=c.pth:0.7]"])
    assert list(config.adapters) == ["a b.safetensors:0.8", "<fox>=x.pt", "e=c.pth:0.7"]


def test_words_of_fine_tuning_are_refused_where_nothing_is_fine_tuned():
    for words in (["adapter=[lora]"], ["rates={text: 0.5}"]):
        with pytest.raises(Refusal, match="are of training=finetune"):
            build_stage(compose_config("train", words))
