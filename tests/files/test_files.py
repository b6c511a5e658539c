"""The ground floor: files that appear whole, weights that run no code, hashes, and processes that know their number."""

import argparse
import collections
import datetime
import multiprocessing
import os
import pathlib
import socket
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EarlyStopping
from safetensors.torch import save_file
from torch import nn

from ldm.data.batch.latents import about
from ldm.errors import NotFound, NotWritten, Refusal, Unreachable
from ldm.files import content
from ldm.files import process as processes
from ldm.files.content import file_content, files_content
from ldm.files.process import Process, first, process
from ldm.files.weights import came_from, download, read_weights, weights_hash
from ldm.files.whole import remove_halves, replace_folder, whole, whole_folder, write_whole
from ldm.metric._colours import labels_of

# ---- whole


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), RuntimeError("broke")], ids=repr)
def test_a_file_or_folder_that_was_not_finished_leaves_nothing(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), whole(tmp_path / "a") as part:
        part.write_text("half")
        raise error
    with pytest.raises(type(error)), whole_folder(tmp_path / "b") as part:
        (part / "file").write_text("half")
        raise error
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_file_is_seen_when_it_is_whole_and_two_writers_do_not_meet(tmp_path):
    with whole(tmp_path / "deep" / "a") as one, whole(tmp_path / "deep" / "a") as other:
        assert one != other and one.parent == tmp_path / "deep"
        one.write_text("one")
        other.write_text("other")
        assert not (tmp_path / "deep" / "a").exists()
    assert (tmp_path / "deep" / "a").read_text() == "one", "the last to finish"
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["a"]


def test_of_two_processes_that_write_a_folder_the_faster_ones_stays(tmp_path):
    with whole_folder(tmp_path / "a") as slow:
        (slow / "file").write_text("slow")
        with whole_folder(tmp_path / "a") as fast:
            (fast / "deep").mkdir()
            (fast / "deep" / "file").write_text("fast")
    assert [str(f.relative_to(tmp_path)) for f in sorted(tmp_path.rglob("*"))] == ["a", "a/deep", "a/deep/file"]


def test_a_folder_replaces_another_or_neither_is_lost(tmp_path):
    for name in ("a", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError):
        replace_folder(tmp_path / "nothing", tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "a"
    replace_folder(tmp_path / "new", tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_says_why_and_halves_are_removed(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotWritten, match=r"file/a could not be written \(.*\); nothing that was saved before is lost"):
        write_whole(tmp_path / "file" / "a", lambda part: part.write_text("x"))
    for name in (".a.ckpt.1234.part", ".a.ckpt.part", "a.ckpt", ".b.tar.1234.part"):
        (tmp_path / name).write_text("")
    remove_halves(tmp_path, "*.ckpt")
    assert sorted(f.name for f in tmp_path.iterdir()) == [".b.tar.1234.part", "a.ckpt", "file"]


# ---- weights


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}
# What trainings note beside the weights: data, of classes of which nothing is built.
BESIDE = {"args": argparse.Namespace(lr=1), "rng": np.random.RandomState(0).get_state(), "path": pathlib.Path("a")}
BESIDE |= {"date": datetime.datetime(2020, 1, 1), "counts": collections.defaultdict(list, a=[1])}
BESIDE |= {"best": np.float32(1), "losses": np.arange(3.0), "stop": {EarlyStopping: {"wait": 1}}, "kind": float}


@pytest.mark.parametrize(
    ("held", "name", "zipped"),
    [
        (WEIGHTS, "a.pth", True),
        (WEIGHTS, "a.pt", False),
        (collections.OrderedDict(WEIGHTS), "a.bin", True),
        ({"state_dict": WEIGHTS, "epoch": 3, "loss": np.float64(0.5)}, "a.ckpt", False),
        ({"model": WEIGHTS, "ema": WEIGHTS | {"a": WEIGHTS["a"] + 1}, "step": np.int64(7)}, "a.pt", True),
        ({"model": {**WEIGHTS, "note": "text"}, "state_dict": None}, "a.pt", True),
        ({"model": {"state_dict": WEIGHTS}, "step": 3}, "a.pt", True),
        ({"module": {f"module._orig_mod.{n}": x for n, x in WEIGHTS.items()}}, "a.pt", True),
        ({"state_dict": WEIGHTS, "kept": BESIDE}, "a.ckpt", True),
        ({"state_dict": WEIGHTS, "hyper_parameters": OmegaConf.create({"a": {"b": [1, 0.5, "x", None, True]}})}, "a.ckpt", True),
    ],
    ids=["state", "legacy", "ordered", "lightning", "average", "model", "nested", "wrapped", "beside", "settings"],
)
def test_weights_are_found_in_what_trainings_save(held, name, zipped, tmp_path):
    torch.save(held, tmp_path / name, _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / name)
    assert found.keys() == WEIGHTS.keys() and found["b"] == 3
    assert torch.equal(found["a"], WEIGHTS["a"] + ("ema" in held))


def test_wrapped_and_bare_names_of_one_tensor_are_refused(tmp_path):
    save_file({"module.a": WEIGHTS["a"], "a": WEIGHTS["a"].clone()}, tmp_path / "a.safetensors")
    with pytest.raises(Refusal, match="with and without their wrappers' names"):
        read_weights(tmp_path / "a.safetensors")


def test_safetensors_are_read_and_their_hash_is_compared_before(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    sha256 = file_content(tmp_path / "a.safetensors")
    assert torch.equal(read_weights(tmp_path / "a.safetensors", sha256)["a"], WEIGHTS["a"])
    assert read_weights(tmp_path / "a.safetensors", sha256[:8])
    torch.save(Code(), tmp_path / "code.pth")
    with pytest.raises(Refusal, match=rf"loss\.weights=.*code\.pth has sha256 \w{{64}}, not {sha256}: .*Take another\."):
        read_weights(tmp_path / "code.pth", sha256, "loss.weights", "Take another.")


def test_no_code_is_run_and_what_is_no_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save({"state_dict": WEIGHTS, "x": Code()}, tmp_path / "code.ckpt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(Refusal, match=r"code\.ckpt does not load as plain tensors \(it names \w+\.mkdir\)"):
            read_weights(tmp_path / "code.ckpt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    torch.save(["a"], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    torch.save(WEIGHTS, tmp_path / "cut.pth")
    os.truncate(tmp_path / "cut.pth", 300)
    (tmp_path / "a.safetensors").write_text("<html>not found</html>")
    (tmp_path / "a.npz").write_text("")
    for name, words in (
        ("page.pth", r"page\.pth does not load as plain tensors \(UnpicklingError\)"),
        ("list.pth", "holds a list and no tensors by name"),
        ("empty.pth", "holds a dict and no tensors by name"),
        ("cut.pth", r"cut\.pth does not load as plain tensors"),
        ("a.safetensors", "is not a whole safetensors file"),
        ("a.npz", r"is none of \.safetensors, \.ckpt"),
    ):
        with pytest.raises(Refusal, match=words):
            read_weights(tmp_path / name)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
    for name in ("a.safetensors", "page.pth"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(Refusal, match="It is a pointer of Git LFS in the place of the file: `git lfs pull`"):
            read_weights(tmp_path / name)
    with pytest.raises(NotFound, match=r"metric\.x\.weights=none\.pth: there is no such file"):
        read_weights(tmp_path.joinpath("none.pth").relative_to(tmp_path), option="metric.x.weights")


def test_what_is_downloaded_is_held_to_its_name_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    save_file(WEIGHTS, tmp_path / "source.safetensors")
    name = f"net-{file_content(tmp_path / 'source.safetensors')[:8]}.safetensors"
    os.rename(tmp_path / "source.safetensors", tmp_path / name)
    url = (tmp_path / name).as_uri()
    assert download(url).keys() == WEIGHTS.keys() == download(url).keys()
    with pytest.raises(Refusal, match=r"has sha256 .*, not 00: .*Remove it, and file:.* is fetched again"):
        download(url, "00")
    save_file({"a": torch.zeros(1)}, tmp_path / "checkpoints" / name)
    with pytest.raises(Refusal, match="it is damaged, or another network"):
        download(url)
    (tmp_path / "checkpoints" / name).unlink()
    save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(Unreachable, match=r"could not be downloaded \(invalid hash.*Copy it to .*Or go by train"):
        download(url, instead="Or go by train.")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_hash_of_weights_is_that_of_saved_provenance_whatever_their_precision():
    """The number is what version 0 wrote into provenance.json for this network: latents made then stay usable."""
    net = nn.Linear(3, 2)
    net.register_buffer("count", torch.tensor(7))
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0).view(2, 3))
        net.bias.fill_(0.5)
    saved = "4880035cabf8773aaeeea2d960645cec3eda69c6865fc0928b17750c25655c34"
    assert weights_hash(net) == about(net)["autoencoder"] == saved
    assert weights_hash(net.half()) == weights_hash(net.double()) == saved
    net.bias.data[1] = 0.25
    assert weights_hash(net) != saved


@pytest.fixture
def large(monkeypatch, tmp_path):
    """A file that is counted among the large ones, and no longer new; how many bytes were hashed since."""
    path, read = tmp_path / "large", []
    path.write_bytes(b"a" * 100)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "LARGE", 100)
    monkeypatch.setattr(content, "RECENT", -1.0)
    monkeypatch.setattr(content.hashlib, "file_digest", lambda *a, whole=content.hashlib.file_digest: read.append(1) or whole(*a))
    return path, read


def test_a_large_file_is_read_again_only_when_it_may_have_changed(large):
    """Whoever writes it and puts its time and size back does not hide it: an inode's change time cannot be set."""
    path, read = large
    before = file_content(path)
    assert file_content(path) == before and len(read) == 1
    stat = path.stat()
    with path.open("rb+") as file:
        file.write(b"b")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and file_content(path) != before and len(read) == 2
    small = path.with_name("small")
    small.write_bytes(b"a")
    assert file_content(small) == file_content(small) and len(read) == 4


def test_what_was_written_just_now_is_not_remembered(large, monkeypatch):
    path, read = large
    monkeypatch.setattr(content, "RECENT", 1e9)
    assert file_content(path) == file_content(path) and len(read) == 2


def test_large_weights_are_hashed_once_while_they_are_as_they_were_loaded(large):
    """By the file that they came from; a number that is changed in memory counts."""
    path, _ = large
    net = nn.Linear(2, 2).requires_grad_(False)
    plain = weights_hash(net)
    came_from(net, [path])
    kept = path.with_name("cache") / "hashes"
    assert weights_hash(net) == plain and [file.read_text() for file in kept.iterdir()] == [plain]
    next(kept.iterdir()).write_text("remembered")
    assert weights_hash(net) == "remembered" != weights_hash(net.half())
    net.weight[0, 0] += 1
    assert weights_hash(net) not in (plain, "remembered")


def test_the_parts_of_a_network_that_stand_still_are_read_once():
    """The same hash; those that come before all that is trained, by name."""
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)}).requires_grad_(False)
    for change in (net["b"], net["b"], net["c"]):
        assert weights_hash(net, ["a", "c"]) == weights_hash(net, ["a"]) == weights_hash(net)
        change.weight += 1
    before = weights_hash(net, ["a"])
    net["a"].weight += 1
    assert weights_hash(net, ["a"]) == before != weights_hash(net), "what is said to stand still is not looked at again"


def test_files_are_known_by_their_names_and_bytes_below_their_folder(tmp_path):
    for home in ("a", "b"):
        (tmp_path / home).mkdir()
        (tmp_path / home / "file").write_text("same")
    one, other = (files_content([tmp_path / home / "file"], tmp_path / home) for home in "ab")
    assert one == other != files_content([tmp_path / "a" / "file"], tmp_path)


# ---- processes

NAMES = [*processes.TORCHRUN, *processes.SRUN, "NODE_RANK", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_NODELIST"]
NAMES += ["SLURM_STEP_NODELIST", "MASTER_ADDR", "MASTER_PORT"]


@pytest.fixture
def environment(monkeypatch):
    """Sets what a launcher says, and nothing else."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # what the test sets itself goes afterwards
        monkeypatch.delenv(name)
    return lambda said: [monkeypatch.setenv(name, value) for name, value in said.items()]


@pytest.mark.parametrize(
    ("said", "expected", "speaks"),
    [
        ({}, (0, 1, 0), True),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1), False),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, (0, 8, 0), True),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2), False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, (0, 1, 0), True),  # a batch script itself, not srun
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, (0, 1, 0), False),  # Lightning's, before they have met
        ({"NODE_RANK": "1"}, (0, 1, 0), False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"}, (0, 1, 0), True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "LOCAL_RANK": "1"}, (0, 1, 0), False),  # Lightning's, within srun -n1
    ],
)
def test_processes_know_their_number(said, expected, speaks, environment):
    environment(said)
    assert process() == expected and first() is speaks


def test_once_they_have_met_their_numbers_are_those_of_torch(environment, monkeypatch):
    environment({"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4"})
    here = sys.modules["torch.distributed"]
    for name, value in {"is_initialized": True, "get_rank": 3, "get_world_size": 4}.items():
        monkeypatch.setattr(here, name, lambda value=value: value)
    assert process() == Process(3, 4, 1) and not first()


def say_what_the_first_says(number, said, pipe):
    os.environ.update(said, RANK=str(number))
    processes.meet()
    pipe.send((process(), processes.from_first(f"of {number}")))
    processes.wait()


def test_processes_that_torchrun_started_meet(environment):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    context, (here, there) = multiprocessing.get_context("fork"), multiprocessing.Pipe(duplex=False)
    jobs = [context.Process(target=say_what_the_first_says, args=(n, dict(os.environ), there)) for n in range(2)]
    for job in jobs:
        job.start()
    assert sorted(here.recv() for _ in jobs) == [((n, 2, 0), "of 0") for n in range(2)]
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]


@pytest.mark.parametrize("nodes", ["a7", "a[7-9]", "a[7,9-12]", "a7,b1", "a[7-9],b[1-3]", "a[7]", "a7 b1"])
@pytest.mark.parametrize("job", [{}, {"SLURM_JOB_ID": "1234567"}, {"MASTER_PORT": "99", "MASTER_ADDR": "c"}])
def test_under_srun_they_meet_where_lightnings_processes_would(nodes, job, environment):
    from lightning_fabric.plugins.environments import SLURMEnvironment

    environment({"SLURM_NODELIST": nodes, **job})
    address, port = processes._meeting_place()
    lightnings = SLURMEnvironment(auto_requeue=False)
    assert (address, port) == (lightnings.main_address, lightnings.main_port)


def test_each_process_has_a_gpu_of_its_own_of_those_it_sees(environment, monkeypatch):
    from ldm.files.device import device_of

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    environment({})
    assert device_of("auto") == torch.device("cuda")
    environment({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "3"})
    assert device_of("auto") == torch.device("cuda:1")


# ---- pictures


def test_colours_are_those_of_their_bytes():
    palette = [(0, 0, 0), (255, 255, 255), (230, 55, 45)]
    images = torch.tensor(palette).view(1, 3, 1, 3).permute(0, 3, 2, 1) / 127.5 - 1
    assert labels_of(images, palette).flatten().tolist() == [0, 1, 2]
