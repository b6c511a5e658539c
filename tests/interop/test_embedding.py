"""Learned words in others' files: every layout that is read and written, and what they say as diffusers and transformers do."""

from collections import OrderedDict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from helpers.family import their_pipeline, their_text, their_tokenizer
from ldm.build import load_model
from ldm.drawing.generate import generate
from ldm.errors import Refusal
from ldm.files.content import file_content
from ldm.files.folder import load_tensors, read_recipe, save_model, save_tensors
from ldm.guidance.cfg import CFG
from ldm.interop.__main__ import main
from ldm.interop.convert import read, write
from ldm.sampler.ddim import DDIM
from ldm.sampler.grid import Leading

G = torch.Generator().manual_seed(7)
ROWS = {64: torch.randn(3, 64, generator=G) * 0.3, 128: torch.randn(3, 128, generator=G) * 0.3}
WIDTHS = {"sd1": (64,), "xl": (64, 128)}
PROMPTS = ["a <fox> in snow", "<fox>,<FOX>", "no word", "a <fox> and a long tail of words which is cut off at the end of it"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> diffusers' pipeline; home, with ours of it in `ours`."""

    @cache
    def make(kind):
        home = tmp_path_factory.mktemp(kind)
        pipeline = their_pipeline(kind, home)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(home / "theirs")
        write(read(str(home / "theirs"))[0], home / "ours", "ldm", source="x")
        return SimpleNamespace(kind=kind, pipeline=pipeline, home=home)

    return make


def old_parameters(rows, path):
    """A file of A1111's of before torch 1.12: an nn.ParameterDict that keeps `_parameters`."""
    held = nn.ParameterDict()
    held.__dict__ = {"training": True, "_parameters": OrderedDict({"*": nn.Parameter(rows)}), "_buffers": OrderedDict()}
    told = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held, "name": "<fox>", "step": 100}
    torch.save(told, path)


def a1111(rows, path):
    told = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "<fox>", "step": 100, "sd_checkpoint": None}
    torch.save(told, path)


LAYOUTS = {  # the file, and how it is written
    "style.pt": a1111,
    "old.pt": old_parameters,
    "<fox>.safetensors": lambda rows, path: save_tensors({"emb_params": rows}, path),
    "learned_embeds.safetensors": lambda rows, path: save_tensors({"<fox>": rows}, path),
    "learned_embeds.bin": lambda rows, path: torch.save({"<fox>": rows.half().float()[0]}, path),
}


def told(model, prompts=PROMPTS):
    fields = {n: torch.full((len(prompts),), 0.0 if "crop" in n else 16.0) for n in model.conditioner.fields if n != "caption"}
    with torch.no_grad():
        return model.condition({"caption": prompts, **fields})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(made, name, tmp_path):
    """The word that a file names, or its stem; (D) is (1, D)."""
    rows = ROWS[64]
    LAYOUTS[name](rows, tmp_path / name)
    model = load_model(made("sd1").home / "ours", adapters=str(tmp_path / name))
    text = model.conditioner.embedders["text"]
    wanted = rows[:1].half().float() if name.endswith(".bin") else rows
    assert text.taught == ("<fox>",) and torch.equal(text.tower.token_embedding.rows, wanted)
    assert model.adapters[0]["sha256"]
    other = load_model(made("sd1").home / "ours", adapters=f"<dog>={tmp_path / name}")
    assert torch.equal(told(other, ["a <dog>"]).tokens, told(model, ["a <fox>"]).tokens)


@pytest.mark.parametrize("count", [1, 3])
def test_captions_are_cut_and_read_as_transformers_does(count, made, tmp_path):
    """200 captions, with CLIPTokenizer.add_tokens and a grown table: ids, and what the tower says, its pooled vector too."""
    words = ["fox", "a", "<fox>", "<fox>,", "red's", "<fox>y", "42", "<Fox>", "naïve", "!"]
    g = torch.Generator().manual_seed(1)
    captions = [" ".join(words[i] for i in torch.randint(10, (int(n),), generator=g)) for n in torch.randint(1, 12, (200,))]
    names = ["<fox>", *(f"<fox>_{i}" for i in range(1, count))]
    peer, tower = their_tokenizer(tmp_path), their_text()
    peer.add_tokens(names)
    tower.resize_token_embeddings(len(peer), mean_resizing=False)
    with torch.no_grad():
        tower.get_input_embeddings().weight[-count:] = ROWS[64][:count]
    spelt = [c.replace("<Fox>", "<fox>").replace("<fox>", " ".join(names)) for c in captions]
    ids = peer(spelt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    save_tensors({"<fox>": ROWS[64][:count]}, tmp_path / "fox.safetensors")
    model = load_model(made("sd1").home / "ours", adapters=str(tmp_path / "fox.safetensors"))
    text = model.conditioner.embedders["text"]
    assert torch.equal(text.ids(captions), ids)
    text.pooled, text.projected = True, False
    with torch.no_grad():
        wanted, found = tower(ids[:40]), text(captions[:40], torch.zeros(40, dtype=torch.bool))
    assert (found.tokens - wanted.last_hidden_state).abs().max() < 1e-5
    assert (found.vector - wanted.pooler_output).abs().max() < 1e-5


def written(of, layout, target, tmp_path):
    """A word's rows through our layout into another."""
    base = ["--base", str(of.home / "ours")]
    rows = [ROWS[width] for width in WIDTHS[of.kind]]
    if len(rows) == 1:
        save_tensors({"<fox>": rows[0]}, tmp_path / "first.safetensors")
    else:
        save_tensors(dict(zip(("clip_l", "clip_g"), rows)), tmp_path / "<fox>.safetensors")
    first = tmp_path / ("first.safetensors" if len(rows) == 1 else "<fox>.safetensors")
    main([str(first), str(tmp_path / "ours"), "--to", "ldm", *base])
    main([str(tmp_path / "ours"), str(tmp_path / target), "--to", layout])
    return tmp_path / target, rows


@pytest.mark.parametrize(
    "kind, layout, target",
    [
        ("sd1", "a1111", "<fox>.pt"),
        ("sd1", "a1111", "<fox>.safetensors"),
        ("sd1", "diffusers", "there"),
        ("sd1", "diffusers", "<fox>.safetensors"),
        pytest.param("xl", "a1111", "there/<fox>.safetensors", marks=pytest.mark.slow),
        pytest.param("xl", "diffusers", "there", marks=pytest.mark.slow),
    ],
)
def test_round_trips_are_to_the_bit(made, kind, layout, target, tmp_path):
    of = made(kind)
    path, rows = written(of, layout, target, tmp_path)
    assert read_recipe(tmp_path / "ours")["adapters"]["textual_inversion"]["word"] == "<fox>"
    model = load_model(of.home / "ours", adapters=str(path))
    text = model.conditioner.embedders["text"]
    found = [text] if kind == "sd1" else list(text.towers.values())
    assert text.taught == ("<fox>",) and all(torch.equal(t.tower.token_embedding.rows, x) for t, x in zip(found, rows))


@pytest.mark.parametrize("kind", ["sd1", pytest.param("xl", marks=pytest.mark.slow)])
def test_what_is_exported_is_what_diffusers_draws(made, kind, tmp_path):
    """`load_textual_inversion` of our files; 4 steps of DDIM with guidance and the word in the negative prompt."""
    of = made(kind)
    path, _ = written(of, "diffusers", "there", tmp_path)
    pipe = of.pipeline
    for end in ("", "_2")[: len(WIDTHS[kind])]:
        parts = {"tokenizer": getattr(pipe, f"tokenizer{end}"), "text_encoder": getattr(pipe, f"text_encoder{end}")}
        held = load_tensors(path / f"learned_embeds{end}.safetensors")
        pipe.load_textual_inversion(held["<fox>"], token="<fox>", **parts)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = {"negative_prompt": "<fox>, blurry", "num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe("a <fox>", latents=noise, output_type="pt", **words).images
    model = load_model(of.home / "ours", adapters=f"<fox>={path}")
    fields = {n: torch.full((1,), 0.0 if "crop" in n else 16.0) for n in model.conditioner.fields if n != "caption"}
    ask = {"caption": ["a <fox>"], "negative.caption": ["<fox>, blurry"], **fields}
    ours = generate(model, ask, DDIM(4, grid=Leading(last=0.001)), CFG(3.0), [0], (16, 16))
    assert (ours.add(1) / 2 - theirs).abs().max() < 1e-3


def refuses(base, tmp_path):
    def refused(file, tensors, message, word=""):
        save_tensors(tensors, tmp_path / file)
        with pytest.raises(Refusal, match=message):
            load_model(base, adapters=f"{word}{tmp_path / file}")

    return refused


@pytest.mark.slow
def test_what_does_not_fit_two_towers_is_named(made, tmp_path):
    refused = refuses(made("xl").home / "ours", tmp_path)
    refused("b.safetensors", {"clip_g": ROWS[128]}, r"holds clip_g and no clip_l; this model has 2 text towers")
    refused("f.safetensors", {"clip_l": ROWS[64], "clip_g": ROWS[128][:1]}, r"has \[1, 3\] rows of its two towers")
    refused("g.safetensors", {"emb_params": ROWS[64]}, r"is 64 wide, these towers 64 and 128")


def test_what_does_not_fit_is_named(made, tmp_path):
    ours = made("sd1").home / "ours"
    refused = refuses(ours, tmp_path)
    wide, rows = torch.randn(1, 1024), ROWS[64]
    refused("a.safetensors", {"emb_params": wide}, r"a\.safetensors is 1024 wide \(Stable Diffusion 2\), this tower 64")
    refused("c.safetensors", {"clip_l": rows, "clip_g": ROWS[128]}, r"is 64 and 128 wide, this tower 64")
    refused("d.safetensors", {"emb_params": rows * torch.nan}, r"emb_params .* holds numbers that are not finite")
    refused("e.safetensors", {"emb_params": rows, "x": rows.clone()}, r"holds x beside emb_params, which is no row of a word")
    refused("fox.safetensors", {"emb_params": rows}, r"word='fox' is a word already; write <fox>")
    refused("g.safetensors", {"emb_params": rows}, r"word='<\|endoftext\|>' is a word already", word="<|endoftext|>=")
    save_tensors({"<fox>": rows}, tmp_path / "x.safetensors")
    twice = [str(tmp_path / "x.safetensors"), f"<FOX>={tmp_path / 'x.safetensors'}"]
    with pytest.raises(Refusal, match=r"word='<FOX>' is a word already"):
        load_model(ours, adapters=twice)
    with pytest.raises(Refusal, match=r":0\.5 is a word, which is there or is not: 1 or 0"):
        load_model(ours, adapters=f"{tmp_path / 'x.safetensors'}:0.5")
    with pytest.raises(SystemExit, match="goes into a1111, diffusers, ldm"):
        main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors"), "--to", "kohya", "--base", str(ours)])
    with pytest.raises(SystemExit, match=r"name it FILE\.safetensors"):
        main([str(tmp_path / "x.safetensors"), str(tmp_path / "y"), "--to", "a1111", "--base", str(ours)])


def test_a_word_and_a_lora_of_one_run_go_into_one_folder(made, tmp_path):
    """Pivotal tuning, for diffusers; layouts of one kind alone are refused."""
    home = made("sd1").home
    module = "denoiser.backbone.encoder.1.1.blocks.0.attend_self.q.lora_"
    tensors = {f"{module}A.default.weight": torch.randn(2, 32), f"{module}B.default.weight": torch.randn(32, 2)}
    tensors |= {"conditioner.embedders.text.tower.token_embedding.rows": ROWS[64]}
    nodes = {"textual_inversion": {"_target_": "ldm.adapter.textual_inversion.TextualInversion", "word": "<fox>", "vectors": 3}}
    nodes |= {"lora": {"_target_": "ldm.adapter.lora.LoRA", "rank": 2}}
    base = {"path": str(home / "ours"), "sha256": file_content(home / "ours" / "model.safetensors")}
    save_model(tensors, {"_target_": "ldm.build.adapted", "base": base, "adapters": nodes}, tmp_path / "both")
    main([str(tmp_path / "both"), str(tmp_path / "out"), "--to", "diffusers"])
    assert torch.equal(load_tensors(tmp_path / "out" / "learned_embeds.safetensors")["<fox>"], ROWS[64])
    assert len(load_tensors(tmp_path / "out" / "pytorch_lora_weights.safetensors")) == 2
    with pytest.raises(SystemExit, match=r"goes into a1111, diffusers, ldm|goes into kohya, diffusers, ldm"):
        main([str(tmp_path / "both"), str(tmp_path / "x.safetensors"), "--to", "kohya"])
