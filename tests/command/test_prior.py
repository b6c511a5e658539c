"""Class pictures that a model draws by itself: from seeds, in turn of the prompts, going on where they stopped."""

import pytest
import torch
from PIL import Image

from helpers.finetune import at_rest, command, said, text_of
from ldm.build import load_model
from ldm.command.prior import prior
from ldm.command.sample import sample
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.errors import Refusal
from ldm.files import process
from ldm.files.folder import load_tensors, read_json, read_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory, clip_folder):
    return at_rest(tmp_path_factory.mktemp("base"), {"text": text_of(clip_folder)})


def drawn(base, out, *more):
    words = [f"model={base}", f"out={out}", "prompt=[a dog,a cat]", "resolution=8", "sampler.steps=2", "batch=2", "seed=5"]
    return prior(compose_config("prior", [*words, *more]))


@pytest.fixture(scope="module")
def five(base, tmp_path_factory):
    return drawn(base, tmp_path_factory.mktemp("prior") / "five", "count=5")


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted((folder / "pictures").iterdir())}


def test_each_picture_is_of_its_seed_and_prompt(base, five, tmp_path):
    words = [f"model={base}", f"out={tmp_path}", "prompt=a cat", "resolution=8", "sampler.steps=2", "seed=8"]
    sample(compose_config("sample", words))
    assert Image.open(tmp_path / "00000.png").tobytes() == Image.open(five / "pictures" / "00003.png").tobytes()
    assert [(five / "pictures" / f"{i:05d}.txt").read_text().strip() for i in range(5)] == [*["a dog", "a cat"] * 2, "a dog"]
    told = read_json(five / "prior.json")
    assert told["captions"] == ["a dog", "a cat"] and told["model"] == base and told["count"] == 5 and len(told["sha256"]) == 64


def test_it_goes_on_where_it_stopped(base, five, tmp_path):
    """After some were lost, and with more: the same as in one go."""
    out = drawn(base, tmp_path / "out", "count=2")
    (out / "pictures" / "00000.png").unlink()
    drawn(base, out, "count=5")
    assert bytes_of(out) == bytes_of(five)
    stamps = {file: file.stat().st_mtime_ns for file in (out / "pictures").iterdir()}
    drawn(base, out, "count=5", "batch=16")
    assert stamps == {file: file.stat().st_mtime_ns for file in (out / "pictures").iterdir()}


def test_another_model_or_prompt_is_refused(base, five, tmp_path):
    with pytest.raises(Refusal, match=r"holds class pictures of .* with other settings, captions: \['a dog', 'a cat'\]"):
        drawn(base, five, "prompt=a dog")
    with pytest.raises(Refusal, match=r"with other settings, seed: 5 \(now 6\)"):
        drawn(base, five, "seed=6")
    with pytest.raises(Refusal, match="must be said"):
        prior(compose_config("prior", [f"model={base}", f"out={tmp_path / 'x'}"]))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "a.txt").touch()
    with pytest.raises(Refusal, match=r"holds other files and no prior\.json"):
        drawn(base, tmp_path / "y")


def test_what_the_first_process_refuses_all_do(monkeypatch):
    """And what else ends it there the others are told of, instead of losing it: first process 0 runs, then process 1 is told."""
    told = []
    monkeypatch.setattr(process, "met", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(process, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(process, "from_first", lambda value, rank=rank: told.pop(0) if rank else told.append(value) or value)
        kind, words = (Refusal, "The first process has stopped: OSError.*no space") if rank else (OSError, "^no space")
        with pytest.raises(kind, match=words):
            process.by_first(lambda: raises(OSError("no space")))
        with pytest.raises(Refusal, match="not here"):
            process.by_first(lambda: raises(Refusal("not here")))
        assert process.by_first(lambda: 7) == 7
    assert not told


def raises(error):
    raise error


def test_dreambooth_trains_beside_them(base, five, tmp_path, capsys):
    """In full and by a word with a LoRA; the tokens of the prompt are said; another model's are refused."""
    photos = ["data=dreambooth", f"data.pictures={five / 'pictures'}", "data.prompt=a photo of sks dog", f"data.prior={five}"]
    folder = train(command(base, tmp_path / "full", *photos, "adapter=[]", "trainer.max_steps=2"))
    assert "a|photo|of|sks|dog" in capsys.readouterr().out
    assert read_recipe(folder)["_target_"] == "ldm.build.assemble"
    assert not torch.equal(said(load_model(folder), ["a", "b"]), said(load_model(base), ["a", "b"]))
    pivotal = ["adapter=[textual_inversion,lora]", "adapter.textual_inversion.word=<dog>", "adapter.textual_inversion.begin=dog"]
    words = [w.replace("sks dog", "<dog>") for w in photos]
    folder = train(command(base, tmp_path / "pivotal", *words, *pivotal, "trainer.max_steps=2"))
    assert len(load_tensors(folder / "model.safetensors")) > 3
    with pytest.raises(Refusal, match=r"was drawn by .* and model\.init is"):
        train(command(tmp_path / "full", tmp_path / "other", *photos, "adapter=[]", "trainer.max_steps=2"))
