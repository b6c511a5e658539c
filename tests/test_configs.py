"""Every config builds, rooms and configs mirror each other, and experiments say how they are run."""

import re
from functools import cache, partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import alexnet

from helpers.members import write_home
from ldm.autoencoder.identity import Identity
from ldm.build import ALLOWED, build, build_members, build_stage, load_model
from ldm.check import check_nodes
from ldm.compose import CONFIGS, compose_config
from ldm.drawing.generate import generate
from ldm.errors import Refusal
from ldm.files.folder import save_model
from ldm.types import Cond, Draw, Widths

ROOMS = (
    "adapter",
    "autoencoder",
    "backbone",
    "condition",
    "data",
    "extractor",
    "guidance",
    "loss",
    "metric",
    "objective",
    "sampler",
)
TARGETS = {  # (room, file) of each `_target_`
    found for path in CONFIGS.rglob("*.yaml") for found in re.findall(r"_target_: ldm\.(\w+)\.(\w+)\.", path.read_text())
}
EXPERIMENTS = sorted(str(p.relative_to(CONFIGS / "experiment").with_suffix("")) for p in (CONFIGS / "experiment").rglob("*.yaml"))


def names(room):
    return sorted(path.stem for path in (CONFIGS / room).glob("*.yaml"))


def every(*rooms):
    return [pytest.param(room, name, id=f"{room}={name}") for room in rooms for name in names(room)]


@pytest.mark.parametrize("room", ROOMS)
def test_each_file_of_a_room_is_named_by_a_config(room):
    """Helpers begin with `_`; the former name of a command (data/pack.py) defines nothing, and is no member."""
    paths = (CONFIGS.parent / "ldm" / room).glob("[!_]*.py")
    members = {(room, path.stem) for path in paths if re.search("^(class|def|async def) ", path.read_text(), re.M)}
    assert members and members <= TARGETS


@pytest.mark.parametrize("room, name", every(*ROOMS))
def test_a_config_builds_from_its_own_room(room, name):
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS / room / f"{name}.yaml"))
    if isinstance(node.get("defaults", [None])[0], str) and "_target_" not in node and name not in node:  # a variation of another
        node = OmegaConf.to_container(OmegaConf.load(CONFIGS / room / f"{node['defaults'][0]}.yaml"))
    node = node if "_target_" in node else node[name]
    assert node["_target_"].startswith((f"ldm.{room}.", "ldm.build."))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip_folder):
    return write_home(tmp_path_factory.mktemp("home") / "runs", clip_folder)


CHOICES = ("backbone", "loss", "objective", "optimizer", "rate")


@cache
def composed(i, runs):
    """The train config with the i-th choice of each of CHOICES: few compositions hold them all."""
    chosen = [f"{room}={names(room)[i % len(names(room))]}" for room in CHOICES]
    return compose_config("train", [*chosen, f"runs={runs}", "trainer.max_steps=100"])


def node_of(room, name, runs):
    return composed(names(room).index(name), runs)[room]


@pytest.mark.parametrize("room, name", every("loss"))
def test_losses_build(room, name, runs):
    """Other groups' members are built in a recipe: test_swap."""
    node = node_of(room, name, runs)
    if name == "lpips":
        node = {**node, "net": "alex", "weights": str(random_alexnet(runs))}
    assert build(node) is not None


def test_a_teacher_must_be_named(runs):
    with pytest.raises(Refusal, match=r"No model is named: model\.init=RUN"):
        build(node_of("objective", "dmd", runs))


def random_alexnet(folder):
    """The features of torchvision's network, as it saves them."""
    weights = {f"features.{name}": value for name, value in alexnet().features.state_dict().items()}
    torch.save(weights, folder / "alexnet.pth")
    return folder / "alexnet.pth"


@pytest.mark.parametrize("name", names("backbone"))
def test_backbones_are_told_channels_and_widths_only(name, runs):
    node = node_of("backbone", name, runs)
    is_dit = node["_target_"].endswith("DiT")
    widths = Widths(vector=node["width"] * (1 if is_dit else 4), tokens=64, spatial=1)  # as `identity` wants it
    with torch.device("meta"):
        assert isinstance(build(node)(channels=4, widths=widths), nn.Module)


@pytest.mark.parametrize("room, name", every("optimizer", "rate"))
def test_optimizers_and_rates_move_a_weight(room, name, runs, bitsandbytes):
    config = composed(names(room).index(name), runs)
    net = nn.Linear(32, 32)
    before = net.weight.detach().clone()
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="optimizer=adamw_8bit is an extra's")
    optimizer = build(config.optimizer)(net.parameters()) if room == "optimizer" else torch.optim.SGD(net.parameters(), lr=0.1)
    rate = build(config.rate)
    net(torch.ones(1, 32)).sum().backward()
    torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    optimizer.step()
    assert not torch.equal(net.weight, before) and all(0 <= rate(step) <= 1 for step in range(200))


@pytest.mark.parametrize("name", names("condition"))
def test_conditions_say_their_widths(name, runs):
    config = untrained(compose_config("train", [f"condition=[{name}]", f"runs={runs}"]))
    local = "local-dir" in (CONFIGS / "condition" / f"{name}.yaml").read_text()
    with torch.device("cpu" if local else "meta"):
        for embedder in build_members(config, "condition").values():
            embedder = embedder(autoencoder=Identity()) if isinstance(embedder, partial) else embedder
            assert embedder.key and 0 <= embedder.rate <= 1 and embedder.widths != Widths()


def untrained(config):
    """The same without the pretrained weights of towers, which would be fetched."""
    for condition in config.condition.values():
        for node in (condition, *(condition.get("towers") or {}).values()):
            node.update({"pretrained": None} if "pretrained" in node else {})
    return config


@pytest.mark.parametrize("room, name", every("metric", "data"))
def test_metrics_and_data_build(room, name, runs, tmp_path):
    if room == "metric":
        node = compose_config("evaluate", [f"metric=[{name}]", "model=m", f"runs={runs}"]).metric[name]
    else:
        node = compose_config("train", [f"{room}={name}", f"runs={runs}"])[room]
    changes = {
        "model": f"local-dir:{runs}/quickstart/clip",
        "root": str(tmp_path),
        "train": str(tmp_path),
        "pictures": str(tmp_path),
    }
    changes |= {"name": "org/name"} if name == "hf" else {}
    changes |= {"dataset": {"_target_": "torchvision.datasets.FakeData", "size": 2}} if name == "torch" else {}
    for key in changes.keys() & node.keys():
        node[key] = changes[key]
    if node.get("weights") in ("fid", "pretrained", "openai"):  # tests build these with weights of their own
        return check_nodes(OmegaConf.to_container(node, resolve=True), ALLOWED)
    if name == "usual":  # a word of evaluate.py
        with pytest.raises(Refusal, match=r"is for evaluate\.py"):
            build(node)
        return
    assert build(node) is not None


@pytest.mark.parametrize("room", ["callback", "logger"])
def test_callbacks_and_loggers_build(room, runs):
    everything = [f"{room}=[{','.join(names(room))}]", f"runs={runs}"]
    offline = ["logger.wandb.offline=true"] if room == "logger" else []
    assert sorted(build_members(compose_config("train", [*everything, *offline]), room)) == names(room)


@pytest.mark.parametrize("name", sorted(set(names("trainer")) - {"gpu"}))
def test_trainers_build(name, tmp_path):
    config = compose_config("train", [f"trainer={name}", f"runs={tmp_path}", "trainer.accelerator=cpu", "trainer.devices=1"])
    assert build(config.trainer, logger=False, callbacks=[]).max_steps == config.trainer.max_steps


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_their_name_and_command_and_build(name, runs):
    config = untrained(compose_config("train", [f"experiment={name}", f"runs={runs}"]))
    assert config.name == name and config.run_id.startswith(f"{name}-")
    opening = [line for line in (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()[:8] if line[0] == "#"]
    assert any(f"python train.py experiment={name}" in line for line in opening)
    if "net" in config.loss:
        config.loss = {**config.loss, "net": "alex", "weights": str(random_alexnet(runs))}
    if "whiten" in config.condition.get("text", {}):
        config.condition.text.whiten = False  # the random tower has no statistics
    family = ("sd/", "sd3/", "dit/", "pixart/", "flux/", "speedrun/", "rae/")
    if name not in LAION and not name.startswith(family):  # those are built below, or where they are shrunken
        with torch.device("meta" if name.startswith("laion/") else "cpu"):
            assert any(p.requires_grad for p in build_stage(config).parameters())


def test_another_condition_takes_the_place_of_an_experiments_own(runs):
    """condition= swaps, also where the experiment has settings for what it usually has."""
    stage = build_stage(compose_config("train", ["experiment=emoji/text", "condition=[label]", f"runs={runs}"]))
    assert list(stage.model.conditioner.embedders) == list(stage.recipe["condition"]) == ["label"]


def test_nothing_need_be_told(runs):
    """condition=[] is unconditional diffusion, as in the LDM paper's FFHQ and CelebA models."""
    stage = build_stage(compose_config("train", ["condition=[]", "backbone=mlp", "backbone.size=4", "autoencoder=identity"]))
    batch = {"image": torch.zeros(2, 3, 4, 4), "position": torch.arange(2)}
    assert stage.losses(batch, Draw(0, batch["position"], 2))["loss"].isfinite()


PACKAGE = '''
import torch
from torch import nn


class Bright(nn.Module):
    """Says the first token's first channels, everywhere."""

    def __init__(self, channels, widths, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.channels = channels

    def forward(self, x, noise_level, cond):
        return 0 * x + self.gain * cond.tokens[:, 0, : self.channels, None, None]
'''


def test_a_users_own_backbone_trains_in_ours(tmp_path, monkeypatch):
    """hydra.searchpath and allow, and no file of ours changes."""
    configs = tmp_path / "own" / "configs" / "backbone"
    configs.mkdir(parents=True)
    for folder in (tmp_path / "own", configs.parent):
        (folder / "__init__.py").touch()
    (tmp_path / "own" / "bright.py").write_text(PACKAGE)
    (configs / "bright.yaml").write_text("_target_: own.bright.Bright\n_partial_: true\ngain: 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ["hydra.searchpath=[pkg://own.configs]", "backbone=bright", "autoencoder=identity", "condition=[label]"]
    stage = build_stage(compose_config("train", [*mine, "allow=[own]", "backbone.gain=3.0"]))
    table = stage.model.conditioner.embedders["label"].table.weight
    told = stage.model.denoiser.output(torch.zeros(2, 3, 4, 4), torch.tensor(0.5), Cond(tokens=table[[4, 7], None]))
    torch.testing.assert_close(told[:, :, 1, 2], 3 * table[[4, 7], :3])
    batch = {"image": torch.zeros(2, 3, 4, 4), "label": torch.tensor([4, 7]), "position": torch.arange(2)}
    stage.losses(batch, Draw(0, batch["position"], 2))["loss"].backward()
    assert stage.model.denoiser.backbone.gain.grad.abs() > 0
    with pytest.raises(ValueError, match=r"own\.bright\.Bright is not among.*allow=\[own\]"):
        build_stage(compose_config("train", mine))
    stage.export(tmp_path / "model")
    assert load_model(tmp_path / "model", allow=["own"]).denoiser.backbone.gain == 3
    with pytest.raises(ValueError, match=r"own\.bright\.Bright is not among.*allow=\[own\]"):
        load_model(tmp_path / "model")


AUTOENCODER = '''
from ldm.autoencoder.identity import Identity


class Mine(Identity):
    """An autoencoder of the user's own."""
'''


def test_a_users_own_autoencoder_is_loaded_where_it_is_trusted_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "minecoder.py").write_text(AUTOENCODER)
    monkeypatch.syspath_prepend(str(tmp_path))
    save_model({}, {"_target_": "minecoder.Mine", "allow": ["minecoder"]}, tmp_path / "claims")
    save_model({}, {"_target_": "minecoder.Mine"}, tmp_path / "plain")
    node = {"_target_": "ldm.build.load_autoencoder", "path": str(tmp_path / "plain")}
    assert build(node, (*ALLOWED, "minecoder")).channels == 3
    for path in ("plain", "claims"):
        with pytest.raises(ValueError, match=r"minecoder\.Mine is not among"):
            build(node | {"path": str(tmp_path / path)})


LAION = [name for name in EXPERIMENTS if name.startswith("laion/") and "/kl_" not in name]
KLS = {"kl_f4": ["autoencoder.channels=3", "autoencoder.mult=[1,2,4]"], "kl_f8": []}


@pytest.mark.parametrize("name", LAION)
def test_published_sizes_build_on_the_meta_device(name, runs):
    opening = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    (published,) = [overrides for kl, overrides in KLS.items() if f"runs/laion/{kl}" in opening]
    with torch.device("meta"):
        stage = build_stage(
            untrained(compose_config("train", [f"experiment={name}", "autoencoder=kl", f"runs={runs}", *published]))
        )
    first = stage.model.denoiser.backbone.encoder[0][0]
    assert first.in_channels == stage.model.autoencoder.channels + stage.model.conditioner.widths.spatial
    wanted = {"laion/inpaint_sd": 9, "laion/inpaint": 7, "laion/superres": 6, "laion/semantic": 6, "laion/text": 4}
    assert first.in_channels == wanted.get(name, first.in_channels)


FIELDS = {
    "image": torch.zeros(2, 3, 16, 16),
    "map": torch.arange(2)[:, None, None].expand(2, 16, 16),
    "label": torch.arange(2),
    "caption": ["a fox", "two"],
    "json": [{"boxes": [[5, 0.0, 0.0, 0.5, 1.0]]}, {"boxes": []}],
    "key": ["a", "b"],
    "position": torch.arange(2),
}


@pytest.mark.parametrize("name", LAION)
def test_published_recipes_take_steps_when_shrunken(name, runs):
    """And draw, as previews do. By backbone.width=32 alone; a text model that is trained, or fetched, is made small as well."""
    small = ["condition.bert.width=32", "condition.bert.depth=1"] if name == "laion/text" else []
    if "text_sd1" in (CONFIGS / "experiment" / f"{name}.yaml").read_text():
        small = [f"condition.text_sd1.model=local-dir:{runs}/quickstart/clip", "condition.text_sd1.pretrained=null"]
    config = compose_config("train", [f"experiment={name}", f"runs={runs}", "backbone.width=32", *small])
    config.autoencoder.path = f"{runs}/quickstart/autoencoder"
    stage, batch = build_stage(config), {field: FIELDS[field] for field in (*config.data.fields, "key", "position")}
    optimizer = build(config.optimizer)([p for p in stage.parameters() if p.requires_grad])
    losses = []
    for _ in range(2):
        losses.append(stage.losses(batch, Draw(0, batch["position"], 2))["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    drawn = generate(stage.model.eval(), batch, build(config.sampler, steps=1), build(config.guidance), range(2), (16, 16))
    assert drawn.shape == (2, 3, 16, 16) and drawn.isfinite().all()
