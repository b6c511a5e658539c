"""A new word beside a frozen table: without effect unless spoken, learning alone, resumed, drawn; what does not go is named."""

import pytest
import torch
from torch import nn

from helpers.finetune import at_rest, command, said, text_of
from ldm.adapt import attach
from ldm.adapter.lora import LoRA
from ldm.adapter.textual_inversion import TextualInversion
from ldm.build import adapted, load_model
from ldm.command.train import train
from ldm.condition.cached_text import CachedText, save_null
from ldm.drawing.request import read_request
from ldm.drawing.weights import weighted
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, read_recipe
from ldm.page.describe import Ready, describe
from ldm.training.saved import read_checkpoint

USUAL = {"sampler": {"_target_": "a.b.C"}, "guidance": {}, "resolution": (8, 8)}
ROWS = "conditioner.embedders.text.tower.token_embedding.rows"
SPOKEN, PLAIN = ["a <fox>", "two <FOX>, dogs"], ["a red fox", ""]
KINDS = {"masked": {"pooled": True}, "end": {"padding": 49407, "tokenizer": "clip"}, "zeros": {"padding": 0}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, clip_folder):
    """By how captions are padded, and cut."""
    return {n: at_rest(tmp_path_factory.mktemp(n), {"text": text_of(clip_folder, **k)}) for n, k in KINDS.items()}


@pytest.fixture(scope="module")
def base(bases):
    return bases["masked"]


@pytest.mark.parametrize("kind", KINDS)
def test_at_step_0_nothing_is_other(bases, kind):
    """Unspoken: to the bit; spoken it is what it began as, its tokens in turn; so is the end of a caption."""
    model = load_model(bases[kind]).requires_grad_(False)
    before = said(model, PLAIN)
    spelled = said(model, ["a red fox red", "two red fox red, dogs"])
    attach(model, {"word": TextualInversion("<fox>", "red fox", 3)}, {})
    assert torch.equal(said(model, PLAIN), before) and torch.equal(said(model, SPOKEN), spelled)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == model.trained == {ROWS}
    assert model.conditioner.embedders["text"].taught == ("<fox>",)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weighed_word_ends_where_a_plain_one_does(bases, kind):
    model = adapted(bases[kind], {"word": TextualInversion("<fox>", "fox", 2)})
    plain, light = "a <fox>, red", weighted("a (<fox>:1.0), red")
    assert torch.equal(said(model, [light, plain]), said(model, [plain, plain]))
    assert not torch.equal(said(model, [weighted("a (<fox>:1.5), red"), plain]), said(model, [plain, plain]))


def test_only_the_rows_move(base):
    """20 steps of AdamW with weight decay: the table and everything else to the bit, and no gradient of it."""
    model = adapted(base, {"word": TextualInversion("<fox>", "fox")})
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        said(model, SPOKEN).square().mean().backward()
        assert all((p.grad is None) is (name != ROWS) for name, p in model.named_parameters())
        optimizer.step()
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [ROWS]
    assert len(after[ROWS.replace("rows", "table.weight")]) == 49408


def test_unspoken_rows_are_in_the_graph(base):
    """So that no rank waits for one whose captions lack the word."""
    model = adapted(base, {"word": TextualInversion("<fox>", "fox")})
    said(model, PLAIN).square().mean().backward()
    assert model.get_parameter(ROWS).grad is not None and not model.get_parameter(ROWS).grad.any()


def test_five_steps_are_those_of_a_grown_table(base):
    """As diffusers' script has it: the whole table is trained, and all but the new rows copied back after each step."""
    model = adapted(base, {"word": TextualInversion("<fox>", "fox", 2)})
    peer = adapted(base, {"word": TextualInversion("<fox>", "fox", 2)})
    tower = peer.conditioner.embedders["text"].tower
    grown = nn.Embedding(49410, 16)
    grown.weight.data = torch.cat((tower.token_embedding.weight, tower.token_embedding.rows)).detach().clone()
    tower.token_embedding, table = grown, grown.weight.detach()[:49408].clone()
    rows = model.get_parameter(ROWS)
    optimizers = [torch.optim.AdamW([p], lr=5e-3, weight_decay=0.01) for p in (rows, grown.weight)]
    for _ in range(5):
        for net, optimizer in zip((model, peer), optimizers):
            optimizer.zero_grad()
            said(net, SPOKEN).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            grown.weight[:49408] = table
    assert (rows - grown.weight[49408:]).abs().max() < 1e-5 * rows.abs().max()
    assert (rows.grad - grown.weight.grad[49408:]).abs().max() < 1e-5 * rows.grad.abs().max()


# ---- the road: train, resume, draw


@pytest.fixture(scope="module")
def words(base, emoji_root):
    data = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2"]
    word = ["adapter=[textual_inversion]", "adapter.textual_inversion.word=christmas tree", "optimizer.weight_decay=0"]
    return [base, [*data, *word, "adapter.textual_inversion.begin=fox"]]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    base, more = words
    return train(command(base, tmp_path_factory.mktemp("run"), *more, "trainer.max_steps=6"))


def test_resumed_twice_is_the_same_run(words, run, tmp_path):
    base, more = words
    for steps in (2, 4, 6):
        train(command(base, tmp_path, *more, f"trainer.max_steps={steps}"))
    one, other = (load_tensors(folder / "model.safetensors") for folder in (run, tmp_path))
    assert one.keys() == {ROWS} == other.keys() and torch.equal(one[ROWS], other[ROWS])
    assert not torch.equal(one[ROWS], load_model(base).conditioner.embedders["text"].begin("fox", 1))
    checkpoint = read_checkpoint(run / "checkpoints" / "step-00000006.ckpt")
    assert checkpoint["state_dict"].keys() == {f"model.{ROWS}"} and len(checkpoint["optimizer_states"][0]["state"]) == 1
    with pytest.raises(Refusal, match=r"adapter\.textual_inversion\.word: <fox> \(before: christmas tree\)"):
        train(command(base, run, *more, "adapter.textual_inversion.word=<fox>", "trainer.max_steps=7"))
    none = [w.replace("christmas tree", "<fox>") for w in more]
    with pytest.raises(Refusal, match=r"none of the \d+ captions holds <fox> \(data=dreambooth: data\.prompt\)"):
        train(command(base, tmp_path / "other", *none, "trainer.max_steps=7"))


def test_a_run_draws_alone_and_beside_others(words, run):
    base = words[0]
    alone, beside = load_model(run), load_model(base, adapters=str(run))
    prompts = ["a Christmas Tree", "two"]
    assert read_recipe(run)["adapters"]["textual_inversion"]["word"] == "christmas tree"
    assert torch.equal(said(alone, prompts), said(beside, prompts))
    assert not torch.equal(said(alone, prompts), said(load_model(base), prompts))
    assert torch.equal(said(alone, PLAIN), said(load_model(base), PLAIN))
    assert torch.equal(said(load_model(base, adapters=f"{run}:0"), prompts), said(load_model(base), prompts))
    assert [one["whole"] for one in describe({"m": Ready(beside, {}, USUAL)}, [], [str(run), "b:0.5"])["adapters"]] == [
        True,
        False,
    ]
    named = load_model(base, adapters=f"<fox>={run}")
    assert torch.equal(said(named, ["a <fox>", "two"]), said(alone, prompts))
    with pytest.warns(UserWarning, match="no prompt holds <fox>, which adapters= taught the model"):
        read_request({"prompt": "a fox"}, named)
    read_request({"prompt": "a fox", "negative": "<Fox>"}, named)


def test_pivotal_a_word_and_a_lora_in_one_run(base, words, tmp_path):
    """Both are trained and drawn; strengths are the LoRA's, and the word stays whole."""
    more = [w for w in words[1] if not w.startswith("adapter=")]
    folder = train(command(base, tmp_path, *more, "adapter=[textual_inversion,lora]", "trainer.max_steps=2"))
    tensors = load_tensors(folder / "model.safetensors")
    assert ROWS in tensors and any("lora_B" in name and x.any() for name, x in tensors.items())
    prompts = ["a christmas tree", "two"]
    whole, half = said(load_model(folder), prompts), said(load_model(base, adapters=f"{folder}:0.5"), prompts)
    word = load_model(base)
    word.conditioner.embedders["text"].learn("christmas tree", tensors[ROWS])
    assert not torch.equal(half, whole) and (half - (whole + said(word, prompts)) / 2).abs().max() < 0.1 * whole.abs().max()


def test_what_cannot_be_learned_is_named(base, tmp_path, clip_folder):
    def refused(message, *settings, place=base):
        with pytest.raises(Refusal, match=message):
            adapted(place, {"word": TextualInversion(*settings)})

    refused(r"word='fox' is a word already; write <fox>", "fox", "animal")
    refused(r"word='' is empty; write <fox>", "", "animal")
    refused(r"begin='little red fox' has 3 tokens \(little\|red\|fox\) for 2 vectors", "<fox>", "little red fox", 2)
    refused(r"begin='' has 0 tokens", "<fox>", "")
    refused(r"begin: a plain word that <fox> begins as, such as animal, must be said", "<fox>")
    with pytest.raises(Refusal, match="would make it nothing"):
        TextualInversion("<fox>", "fox", 0)
    text = load_model(base).conditioner.embedders["text"]
    save_null(text.eval(), tmp_path / "null")
    model = load_model(base)
    model.conditioner.embedders["text"] = CachedText(lambda: text, str(tmp_path / "null"))
    with pytest.raises(Refusal, match=r"told by CachedText\): condition=\[text\], not cached_text"):
        attach(model, {"word": TextualInversion("<fox>", "fox"), "lora": LoRA()}, {})
