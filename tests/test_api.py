"""`import ldm`: light to import, PIL in and out, the same pictures and numbers as the commands, and README's lines run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
from ldm import api
from ldm.build import build
from ldm.command.sample import sample
from ldm.compose import CONFIGS, compose_config
from ldm.errors import NotFound, Refusal
from ldm.files.folder import save_model

ROOT = CONFIGS.parent
KL = {"_target_": "ldm.autoencoder.kl.KL", "width": 8, "mult": [1, 1, 1], "groups": 4}
SMALL = [
    "condition.text.whiten=false",
    "condition.text.layers=[-1]",
    "backbone.width=16",
    "backbone.groups=4",
    "backbone.heads=2",
    "trainer.max_steps=1",
    "callback=[checkpoint]",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, clip_folder, emoji_root):
    """A folder with runs/quickstart/{clip,autoencoder,diffusion} and the emoji's shards, the last trained by README's words."""
    place = tmp_path_factory.mktemp("home")
    (place / "runs" / "quickstart").mkdir(parents=True)
    (place / "runs" / "quickstart" / "clip").symlink_to(clip_folder)
    (place / "runs" / "data").symlink_to(emoji_root)
    torch.manual_seed(0)
    weights = build(KL).state_dict() | {"count": torch.tensor(1)}
    save_model(weights, KL, place / "runs" / "quickstart" / "autoencoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        folder = ldm.train("emoji/text", [*SMALL, *DATA, "run_id=quickstart/diffusion"])
    assert folder == Path("runs/quickstart/diffusion")
    return place


DATA = ["data.groups=[Activities]", "data.val_fraction=0.2", "data.batch=8", "logger=[csv]"]


@pytest.fixture
def model(home, monkeypatch):
    monkeypatch.chdir(home)
    return ldm.load("runs/quickstart/diffusion", device="cpu")


def test_importing_ldm_imports_the_standard_library_alone():
    code = "import sys; before = set(sys.modules); import ldm; dir(ldm); print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "ldm" in found and {name.split(".")[0] for name in found} <= {"ldm", *sys.stdlib_module_names}


def test_what_ldm_offers_is_in_its_api_and_documented():
    assert set(ldm.__all__) <= set(dir(ldm))
    assert all(getattr(ldm, name) is getattr(api, name) and getattr(ldm, name).__doc__ for name in ldm.__all__)
    with pytest.raises(AttributeError, match="offers Pipeline"):
        _ = ldm.draw
    assert (ROOT / "ldm" / "py.typed").is_file() and "py.typed" in (ROOT / "pyproject.toml").read_text()


def test_the_same_words_draw_what_the_command_draws(model, tmp_path):
    words = ["model=runs/quickstart/diffusion", f"out={tmp_path}", "prompt=[dart,kite]", "negative=x", "seed=3"]
    wanted = sample(compose_config("sample", [*words, "sampler=heun", "sampler.steps=3", "guidance.scale=4"]))
    drawn = model.draw(["dart", "kite"], negative="x", seed=3, sampler="heun", steps=3, guidance=4)
    assert [picture.size for picture in drawn] == [(32, 32)] * 2 and drawn[0].mode == "RGB"
    tensor = model.draw("kite", negative="x", seed=4, sampler="heun", steps=3, guidance=4, output="pt")
    torch.testing.assert_close(tensor, wanted[1:], atol=1e-4, rtol=0)
    for i, picture in enumerate(drawn):
        file = torch.tensor(list(Image.open(tmp_path / f"{i:05d}.png").getdata()), dtype=torch.int)
        assert (torch.tensor(list(picture.getdata())) - file).abs().max() <= 1


def test_objects_go_where_words_go(model):
    from ldm.guidance.cfg import CFG
    from ldm.sampler.euler import Euler
    from ldm.sampler.grid import Uniform

    built = model.draw("dart", sampler=Euler(2, Uniform()), guidance=CFG(5.0), output="pt")
    torch.testing.assert_close(built, model.draw("dart", sampler="euler", steps=2, guidance=5, output="pt"))


def test_pictures_begin_from_pils_and_are_kept_where_the_mask_is_black(model, tmp_path):
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    picture.save(tmp_path / "a.png")
    kept = model.draw("dart", steps=2, init=picture, strength=0, output="pt")
    through = model.decode(model.encode(picture), output="pt")
    torch.testing.assert_close(kept, through)
    by_file = model.draw("dart", steps=4, init=str(tmp_path / "a.png"), strength=0.5, output="pt")
    torch.testing.assert_close(by_file, model.draw("dart", steps=4, init=picture, strength=0.5, output="pt"))
    latents = []
    model.draw("dart", steps=2, init=picture, mask=half, watch=lambda step, time, x: latents.append(x))
    assert latents and latents[-1].shape == (1, 4, 8, 8)


def test_encode_and_decode_take_and_give_pils_pictures(model):
    pictures = [Image.new("RGB", (64, 32), colour) for colour in ("red", "white")]
    latents = model.encode(pictures)
    assert latents.shape == (2, 4, 8, 16)
    torch.testing.assert_close(latents, model.autoencoder.encode(api.to_images(pictures)).mean)
    assert [picture.size for picture in model.decode(latents)] == [(64, 32)] * 2
    assert list(api.to_pil(api.to_images(pictures[0]))[0].getdata()) == list(pictures[0].getdata())
    with pytest.raises(Refusal, match=r"one size are wanted.*\(8, 8\), \(16, 8\)"):
        model.encode([Image.new("RGB", size) for size in ((8, 8), (16, 8))])
    with pytest.raises(Refusal, match=r"30x32 pixels.*multiples of 4"):
        model.encode(Image.new("RGB", (30, 32)))


def test_an_autoencoder_alone_encodes_and_draws_nothing(home, monkeypatch):
    monkeypatch.chdir(home)
    alone = ldm.load(Path("runs/quickstart/autoencoder"), device="cpu")
    assert alone.encode(Image.new("RGB", (32, 32))).shape == (1, 4, 8, 8)
    with pytest.raises(Refusal, match="alone draws nothing"):
        alone.draw("dart")
    with pytest.raises(NotFound):
        ldm.load("runs/nothing")


def test_batches_give_every_sample_once(home, monkeypatch):
    monkeypatch.chdir(home)
    found = list(ldm.batches("emoji", DATA, split="val"))
    keys = [key for batch in found for key in batch["key"]]
    assert len(keys) == len(set(keys)) > 8 and len(found[0]["caption"]) == 8
    assert found[0]["image"].shape == (8, 3, 32, 32) and found[0]["image"].min() >= -1 and found[0]["image"].max() <= 1


def test_readmes_lines_run(home, monkeypatch, tmp_path):
    """The first Python in README, but for the length of its training."""
    code = re.search(r"```python\n(import ldm\n.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert code.count("\n") <= 15
    monkeypatch.chdir(home)
    monkeypatch.setattr(
        api, "compose_config", lambda name, words, **used: compose_config(name, [*words, *(SMALL + DATA) * (name == "train")])
    )
    for folder in ("drawn", "pictures"):
        for i in range(3):
            path = tmp_path / folder / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.effect_noise((32, 32), 99).convert("RGB").save(path)
    code = code.replace('"drawn"', f'"{tmp_path}/drawn"').replace('"pictures"', f'"{tmp_path}/pictures"')
    scope = {}
    exec(code, scope)
    assert isinstance(scope["images"][0], Image.Image) and scope["numbers"]["fd_clip"] >= 0
