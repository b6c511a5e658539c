"""A model at rest: whole or not there, on its own two feet, and never a way to run code."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from helpers.processes import together
from ldm.build import build, load_autoencoder, load_model
from ldm.errors import NotWritten
from ldm.files.folder import LOCAL, from_parts, load_tensors, save_model, save_tensors, with_parts, write_json
from ldm.files.whole import write_whole
from ldm.training.callback.checkpoint import WholeCheckpointIO

KL = {"_target_": "ldm.autoencoder.kl.KL", "width": 8, "mult": [1, 1], "groups": 4}


@pytest.fixture
def folder(tmp_path):
    """An autoencoder's folder."""
    save_model(build(KL).state_dict() | {"count": torch.tensor(1)}, KL, tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def test_weights_come_back_to_the_bit(folder):
    saved, loaded = load_tensors(folder / "model.safetensors"), load_autoencoder(str(folder)).state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_weights_can_be_read_by_those_who_can_read_other_files(folder, tmp_path):
    (tmp_path / "plain").touch()
    assert (folder / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_turned_and_sliced_tensors_come_back(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    save_tensors({"turned": x.T, "slice": x[:, 1]}, tmp_path / "a.safetensors")
    back = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(back["turned"], x.T) and torch.equal(back["slice"], x[:, 1])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("broke")], ids=repr)
def test_what_stood_there_stays_when_writing_stops(tmp_path, error):
    path = tmp_path / "a.json"
    write_json({"old": 1}, path)

    def write(temporary):
        temporary.write_text("{half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, write)
    assert json.loads(path.read_text()) == {"old": 1} and [f.name for f in tmp_path.iterdir()] == ["a.json"]


def fill(path):
    """Writes what is larger than the kernel lets a file of this process be."""
    small, large, save = torch.ones(8), torch.ones(100_000), WholeCheckpointIO().save_checkpoint
    save({"state_dict": {"a": small}, "global_step": 1}, path / "a.ckpt")
    save_tensors({"a": small}, path / "a.safetensors")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with pytest.raises(NotWritten, match="nothing that was saved before is lost"):
        save({"state_dict": {"a": large}, "global_step": 2}, path / "a.ckpt")
    with pytest.raises(NotWritten, match="nothing that was saved before is lost"):
        save_tensors({"a": large}, path / "a.safetensors")


def test_a_disk_that_is_really_full(tmp_path):
    """The kernel refuses a file's growth half-way: both formats say so, and what was there stays."""
    (tmp_path / "disk").mkdir()
    assert together(lambda: fill(tmp_path / "disk"), [{}], tmp_path)[0] == [0]
    tmp_path = tmp_path / "disk"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.ckpt", "a.safetensors"]
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["global_step"] == 1
    assert load_tensors(tmp_path / "a.safetensors")["a"].sum() == 8


# ---- parts


def test_parts_travel_with_the_model(folder, clip_folder, tmp_path):
    config = {
        "autoencoder": {"_target_": "ldm.build.load_autoencoder", "path": str(folder)},
        "condition": {"text": {"model": f"{LOCAL}{clip_folder}", "key": "caption"}},
    }
    told = with_parts(config, tmp_path / "out")
    assert str(tmp_path) not in json.dumps(told) and str(clip_folder) not in json.dumps(told)
    back = from_parts(told, (tmp_path / "out").rename(tmp_path / "moved"))
    assert load_autoencoder(back["autoencoder"]["path"]).count == 1 and back["condition"]["text"]["key"] == "caption"
    assert load_tensors(Path(back["condition"]["text"]["model"].removeprefix(LOCAL)) / "open_clip_model.safetensors")
    assert with_parts(back, tmp_path / "again") == told, "an exported model is exported again as it was"


def test_other_words_are_left_alone(tmp_path):
    config = {"a": {"name": "ViT-L-14", "path": "nowhere", "n": 3, "list": [1, "x"], "none": None}}
    assert from_parts(with_parts(config, tmp_path), tmp_path) == config and not list(tmp_path.iterdir())


# ---- trust

PATH = {"_target_": "ldm.files.folder.Path", "_args_": ["OWNED"]}
TOUCH = "${oc.create:{_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: ['OWNED']}]}}"
HOSTILE = {
    "another package": {"_target_": "os.system", "command": "touch OWNED"},
    "deep": {"_target_": "ldm.denoiser.LogRatio", "scale": [{"_target_": "os.system", "command": "touch OWNED"}]},
    "torch": {"_target_": "torch.load", "f": "OWNED", "weights_only": False},
    "torch.nn": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1},
    "a longer name": {"_target_": "ldmx.run"},
    "what a module imported": {"_target_": "ldm.files.folder.shutil.rmtree", "path": "OWNED"},
    "what a module imported, a class": {"_target_": "ldm.files.folder.write_text", "text": "x", "path": PATH},
    "a node out of a string": {"_target_": "ldm.objective.regression.Regression", "time": TOUCH},
    "the environment": {"_target_": "ldm.objective.regression.Regression", "time": "${oc.env:HOME}"},
    "a list of targets": {"_target_": ["os.system"], "command": "touch OWNED"},
}


@pytest.mark.parametrize("config", HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_config_runs_nothing(folder, tmp_path, config):
    owned = tmp_path / "owned"
    (folder / "config.json").write_text(json.dumps(config).replace("OWNED", str(owned)))
    for load in (load_autoencoder, load_model):
        with pytest.raises(ValueError, match=r"_target_|\$\{"):
            load(str(folder))
        assert not owned.exists()


# ---- what is not a model


def test_an_autoencoder_is_not_a_latent_model(folder):
    with pytest.raises(ValueError, match=r"holds a KL, not a latent diffusion model"):
        load_model(folder)


def test_half_a_download_is_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file.*copy it again"):
        load_autoencoder(str(folder))


def test_the_command_named_makes_what_is_missing(tmp_path):
    """What the message says to run would put the autoencoder exactly where it was looked for."""
    import shlex

    from ldm.compose import compose_config

    for path in ("runs/quickstart/autoencoder", f"{tmp_path}/mine/autoencoder"):
        with pytest.raises(FileNotFoundError, match=r"python train\.py experiment=emoji/autoencoder") as error:
            load_autoencoder(path if path.startswith("/") else f"{path}-none")
        command = str(error.value).split("python train.py ")[1].split(";")[0]
        folder = compose_config("train", shlex.split(command)).folder
        assert folder == (path if path.startswith("/") else f"{path}-none")


@pytest.mark.parametrize(
    "target", ["ldm.data.shard.write.write_shards", "ldm.files.folder.write_text", "ldm.training.logging.wandb_logger"]
)
def test_a_model_at_rest_builds_models_only(target, tmp_path):
    from ldm.build import NARROW, build

    with pytest.raises(ValueError, match="not among what a config may build"):
        build({"_target_": target, "folder": str(tmp_path / "owned")}, NARROW)
    assert not (tmp_path / "owned").exists()
