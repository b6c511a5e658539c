"""Whatever is fine-tuned: killed and begun again, on two ranks, and on latents made ahead of time it is the same run."""

import signal

import pytest
import torch

from helpers.finetune import UNET, at_rest, command, text_of
from helpers.processes import together, torchrun
from ldm.autoencoder.identity import Identity
from ldm.build import build
from ldm.command.train import train
from ldm.data.batch.latents import write_latents
from ldm.files.folder import load_tensors
from ldm.training.saved import newest, read_checkpoint

SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.fused=false", "optimizer.lr=0.1"]
KINDS = {  # words of each, and the fields, beside pictures and captions, that it reads
    "lora": (["adapter=[lora]", "adapter.lora.rank=2", "adapter.lora.text=true"], {}),
    "controlnet": (["adapter=[controlnet]", "adapter.controlnet.name=edges"], {"edges": "jpg"}),
    "word": (["adapter=[textual_inversion]", "adapter.textual_inversion.word=christmas tree"], {}),
    "ip_adapter": (["adapter=[ip_adapter]", "adapter.ip_adapter.prompt.pretrained=null"], {"image_prompt": "jpg"}),
    "edit": (["adapter=[]"], {"source": "jpg"}),
    "dreambooth": (["adapter=[]", "data=dreambooth", "data.prompt=sks dog"], None),
}
KINDS["word"][0].append("adapter.textual_inversion.begin=fox")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory, clip_folder, emoji_root):
    """Bases at rest, plain and for edits, and how a run of each kind is commanded."""
    home = tmp_path_factory.mktemp("home")
    text, edit = text_of(clip_folder, rate=0.1), {"_target_": "ldm.condition.edit.Edit", "_partial_": True}
    bases = {"plain": at_rest(home / "plain", {"text": text}), "edit": at_rest(home / "edit", {"text": text, "edit": edit}, UNET)}
    for kind, count in (("dog", 2), ("dogs", 3)):
        (home / kind).mkdir()
        for i in range(count):
            picture(home / kind / f"{i}.png", i + 10 * count)
            (home / kind / f"{i}.txt").write_text("a dog")

    def config(kind, folder, *more):
        words, fields = KINDS[kind]
        emoji = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0"]
        emoji += [f"+data.fields.{field}={member}" for field, member in (fields or {}).items()]
        emoji = [f"data.pictures={home}/dog", f"data.prior={home}/dogs"] if fields is None else emoji
        tower = [f"adapter.ip_adapter.prompt.model=local-dir:{clip_folder}"] if kind == "ip_adapter" else []
        return command(bases["edit" if kind == "edit" else "plain"], folder, *emoji, *words, *tower, *SGD, *more)

    return config


def picture(path, seed):
    from torchvision.utils import save_image

    save_image(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)), path)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """What each kind is after four steps."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = tensors(train(home(kind, tmp_path_factory.mktemp(kind), "trainer.max_steps=4")))
        return made[kind]

    return run


def tensors(folder):
    return load_tensors(folder / "model.safetensors")


def apart(found, wanted, share):
    """The names of tensors that differ by more than that share of their largest number."""
    assert found.keys() == wanted.keys()
    return [name for name, x in wanted.items() if (found[name] - x).abs().max() > share * x.abs().max() + 1e-9]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_begun_again_it_is_the_same_run(kind, home, whole, tmp_path):
    """kill -9 in the third step, after a checkpoint: to the bit."""
    kill = ["allow=[helpers]", "+callback.kill._target_=helpers.survive.Send", "+callback.kill.signum=9", "+callback.kill.step=3"]
    codes, said = together(lambda: train(home(kind, tmp_path, "trainer.max_steps=4", *kill)), [{}], tmp_path)
    assert codes == [-signal.SIGKILL], said
    assert read_checkpoint(newest(tmp_path))["global_step"] == 2
    assert apart(tensors(train(home(kind, tmp_path, "trainer.max_steps=4"))), whole(kind), 0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind, home, whole, tmp_path):
    two = ["trainer.max_steps=4", "trainer.devices=2", "+trainer.strategy=ddp"]
    codes, said = together(lambda: train(home(kind, tmp_path, *two)), torchrun(2), tmp_path, timeout=300)
    assert codes == [0, 0], said
    assert apart(tensors(tmp_path), whole(kind), 2e-5) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dreambooth"])  # whose data are mixed of two sources
def test_latents_made_ahead_train_the_same(kind, home, whole, tmp_path):
    """The pictures that it is told go along as they were."""
    data = build(home(kind, tmp_path / "unused", "trainer.max_steps=4").data)
    data.prepare_data()
    data.setup()
    keep = list(KINDS[kind][1])
    write_latents(Identity(), data, "train", tmp_path / "latents", 8, "cpu", keep=keep)
    config = home(kind, tmp_path / "run", "trainer.max_steps=4")
    told = {"moments": "moments.npy", "caption": "txt", **dict.fromkeys(keep, "png")}
    config.data = {
        "_target_": "ldm.data.shards.Shards",
        "train": str(tmp_path / "latents"),
        "fields": told,
        "size": 8,
        "batch": 8,
    }
    assert apart(tensors(train(config)), whole(kind), 2e-3) == []
