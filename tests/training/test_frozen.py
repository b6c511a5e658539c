"""Frozen layers in bfloat16: outputs, gradients and what is trained are to the bit those of float32 weights under autocast."""

import copy
from types import SimpleNamespace

import pytest
import torch

from helpers.finetune import T, X, at_rest, command, text_of
from ldm.adapt import attach
from ldm.adapter.controlnet import ControlNet
from ldm.adapter.lora import LoRA
from ldm.build import load_model
from ldm.command.train import train
from ldm.condition.hint import Hint
from ldm.errors import Refusal
from ldm.files.folder import load_tensors
from ldm.training.callback.frozen import Frozen, in_bfloat16

ADAPTERS = {"lora": lambda: LoRA(2, targets="all", text=True), "dora": lambda: LoRA(2, dora=True)}
ADAPTERS["controlnet"] = lambda: ControlNet(Hint, "edges")


@pytest.fixture(scope="module")
def base(tmp_path_factory, clip_folder):
    return at_rest(tmp_path_factory.mktemp("base"), {"text": text_of(clip_folder)})


@pytest.mark.parametrize("kind", ADAPTERS)
def test_outputs_and_gradients_are_to_the_bit(base, kind):
    model, told = load_model(base), {"caption": ["a red fox", ""], "edges": X.clamp(-1, 1)}
    attach(model, {kind: ADAPTERS[kind]()}, {})
    for name in model.trained:
        torch.nn.init.normal_(model.get_parameter(name), std=0.1)
    rounded = copy.deepcopy(model)
    names = in_bfloat16(rounded)
    results = []
    for each in (model, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            said = each.denoiser(X, T, each.condition(each.conditioner.fill(told)))
            (said.float() - X).square().mean().backward()
        results.append((said, {name: each.get_parameter(name).grad for name in sorted(model.trained)}))
    (wanted, gradients), (found, others) = results
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert all(torch.equal(others[name], x) for name, x in gradients.items())
    kinds = {name: p.dtype for name, p in rounded.named_parameters()}
    assert {kinds[n] for n in model.trained} == {torch.float32} and any(n.startswith("denoiser.") for n in names)
    assert all(kinds[f"{name}.weight"] == torch.bfloat16 for name in names)
    assert kind != "dora" or not any(name.endswith("attend_self.q.base_layer") for name in names)
    plain = rounded.denoiser(X, T, rounded.condition(rounded.conditioner.fill(told)))  # without autocast, as callbacks draw
    assert plain.dtype == torch.float32 and (plain - found.float()).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.slow
def test_a_run_trains_and_resumes_as_without_it(base, emoji_root, tmp_path):
    words = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2", "trainer.precision=bf16-mixed"]
    words += ["adapter=[lora]", "adapter.lora.rank=2"]
    plain = train(command(base, tmp_path / "plain", *words, "trainer.max_steps=3"))
    for steps in (2, 3):
        run = train(command(base, tmp_path / "run", *words, "callback=[checkpoint,frozen]", f"trainer.max_steps={steps}"))
    wanted, found = (load_tensors(folder / "model.safetensors") for folder in (plain, run))
    assert found.keys() == wanted.keys() and all(torch.equal(x, found[name]) and x.any() for name, x in wanted.items())


def test_it_is_for_bfloat16():
    with pytest.raises(Refusal, match=r"trainer\.precision=32-true: it is for bf16-mixed"):
        Frozen().setup(SimpleNamespace(precision="32-true"), None, "fit")
