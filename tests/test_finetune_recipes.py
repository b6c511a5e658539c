"""The recipes of words, DreamBooth and edits, as they are for the emoji and shrunken for the others, each a few steps."""

import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from helpers.runs import write_runs
from ldm.build import build_stage
from ldm.command.prior import prior
from ldm.command.sample import sample
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.data.shard.write import write_shards
from ldm.files.folder import write_text

WORD = ["adapter.textual_inversion.word=<it>", "adapter.textual_inversion.begin=face"]
RECIPES = {"emoji/textual_inversion": [], "emoji/dreambooth": [], "emoji/edit": ["condition.text.whiten=false"]}
RECIPES |= {"sd/textual_inversion": [*WORD, "size=tiny"], "sd/dreambooth": ["size=tiny"], "sd/edit": ["size=tiny"]}


def picture(seed, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)), path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip_folder):
    """What the recipes begin from: a base, pictures, the base's own drawings, and edits."""
    runs = write_runs(tmp_path_factory.mktemp("home") / "runs", clip_folder)
    base = compose_config("train", ["experiment=emoji/text", "condition.text.whiten=false", f"runs={runs}"])
    build_stage(base).export(runs / "quickstart" / "diffusion")
    for i in range(2):
        picture(i, runs / "subjects" / "frog" / f"{i}.png")
    one = picture(3, runs / "subjects" / "seen0" / "0.png")
    write_text("frog\nfox\n", runs / "subjects" / "prior.txt")
    words = [f"model={runs}/quickstart/diffusion", f"prompts={runs}/subjects/prior.txt", "count=2", "sampler.steps=1"]
    prior(compose_config("prior", [*words, f"out={runs}/subjects/prior"]))
    Image.open(one).save(runs / "one.jpg")
    members = {"jpg": (runs / "one.jpg").read_bytes(), "source.png": one.read_bytes(), "txt": "dark skin tone"}
    for split in ("train", "val"):
        write_shards(({"__key__": f"{i:09d}", **members} for i in range(32)), runs / "tones" / split)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_draws(name, runs, tmp_path):
    words = [f"experiment={name}", f"runs={runs}", f"folder={tmp_path / 'run'}", "logger=[]", "trainer.accelerator=cpu"]
    folder = train(compose_config("train", [*words, *RECIPES[name], "trainer.max_steps=2"]))
    ask = [f"ask.source={runs}/one.jpg"] if "edit" in name else []
    drawn = sample(compose_config("sample", [f"model={folder}", "prompt=a <it>", "sampler.steps=2", f"out={tmp_path}", *ask]))
    assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()
