"""Data that are no shards: a folder of pictures, any map-style dataset, the hub's; the same batches, order and resume."""

import json
import random
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomHorizontalFlip

from ldm.build import build
from ldm.command.pack import pack
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.data import hub as hub_module
from ldm.data.dataset import MapStyle
from ldm.data.folder import Folder
from ldm.data.hub import Hub
from ldm.data.packing.packed import Packed
from ldm.data.shards import Shards
from ldm.errors import NotFound, Refusal
from ldm.training.callback.preview import first as shown_first

COUNT = 11


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def picture(i, size=(12, 10)):
    pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[0] * 2, size[1]))


@pytest.fixture
def pictures(tmp_path):
    """Pictures with captions beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(COUNT):
        picture(i).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    return folder


def opened(module):
    module.prepare_data()
    module.setup()
    return module


def first(module, steps):
    batches = iter(module.train_dataloader())
    return [next(batches) for _ in range(steps)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for field, value in a.items():
        assert torch.equal(value, b[field]) if isinstance(value, torch.Tensor) else value == b[field], field


# ---- a folder


def test_a_folder_gives_the_batches_that_its_shards_give(pictures, tmp_path):
    """Packed into one shard the same pictures come in the same order, cut and mirrored alike, over several epochs."""
    pack(pictures, tmp_path / "shards", None, 1000, 0.0, Packed())
    how = {"size": 8, "batch": 4, "crop": "random", "flip": 0.5, "filters": {"width": [1, None]}}
    here, there = (first(opened(kind(path, **how)), 7) for kind, path in ((Folder, pictures), (Shards, tmp_path / "shards")))
    for a, b in zip(here, there):
        assert a["key"] != b["key"]
        assert_same({**a, "key": 0}, {**b, "key": 0})
    assert [i for batch in here for i in batch["position"].tolist()] == list(range(28))


def test_a_folder_is_resumed_exactly_and_changes_are_noticed(pictures):
    module = opened(Folder(pictures, size=8, batch=4))
    whole_run, state = first(module, 5), module.state_dict()
    module = opened(Folder(pictures, size=8, batch=4))
    module.load_state_dict({**state, "consumed": 8, "step": 2})
    for a, b in zip(first(module, 3), whole_run[2:]):
        assert_same(a, b)
    (pictures / "3.txt").write_text("another caption")
    with pytest.raises(Refusal, match="The checkpoint's samples are not this run's"):
        opened(Folder(pictures, size=8, batch=4)).load_state_dict(state)


def test_metadata_as_imagefolder_has_it_and_pictures_of_other_kinds(tmp_path):
    picture(0).save(tmp_path / "a.bmp")
    picture(1).convert("P").save(tmp_path / "b.gif")
    rows = [{"file_name": "a.bmp", "text": "first", "score": 5.5}, {"file_name": "b.gif", "text": "second", "score": 2}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"image": "jpg", "caption": "txt", "record": "json"}
    batch = next(iter(opened(Folder(tmp_path, fields=fields, size=8, batch=2)).ordered("train", 2)))
    assert batch["caption"] == ["first", "second"] and [r["score"] for r in batch["record"]] == [5.5, 2]
    assert batch["image"].shape == (2, 3, 8, 8) and batch["original_width"].tolist() == [24, 24]
    chosen = opened(Folder(tmp_path, size=8, batch=1, filters={"score": [3, None]}))
    assert chosen.train_set.captions() == ["first"]


def test_sub_folders_are_classes_and_mean_the_same_in_both_splits(tmp_path):
    for split, names in {"train": ("cat", "dog", "fox"), "val": ("dog", "fox")}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            picture(len(name)).save(tmp_path / split / name / "a.jpg")
    fields = {"image": "jpg", "label": "cls", "caption": "txt"}
    module = opened(Folder(tmp_path / "train", tmp_path / "val", fields, size=8, batch=1))
    assert [next(iter(module.ordered(s, 3)))["label"].tolist() for s in ("train", "val")] == [[0, 1, 2], [1, 2]]
    assert next(iter(module.ordered("val", 3)))["caption"] == ["dog", "fox"]
    (tmp_path / "val" / "fox").rename(tmp_path / "val" / "owl")
    with pytest.raises(Refusal, match=r"data\.val=.* has classes that data\.train has not: owl"):
        opened(Folder(tmp_path / "train", tmp_path / "val", fields, size=8, batch=1))
    with pytest.raises(Refusal, match=r"splits of a data set .* Name one of them: data\.train=.*/\.\.\."):
        opened(Folder(tmp_path, size=8))


def test_what_a_folder_lacks_is_named(tmp_path, pictures):
    with pytest.raises(NotFound, match=r"data\.train=.*nothing: There is no"):
        opened(Folder(tmp_path / "nothing"))
    rows = ["file_name,text", "0.jpg,here", "gone.jpg,not here"]
    (pictures / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(Refusal, match=r"1 of 2 rows are no pictures: .*gone\.jpg.*data\.damaged=leave_out"):
        opened(Folder(pictures, size=8, batch=1))
    with pytest.warns(UserWarning, match="1 rows are left out"):
        assert len(opened(Folder(pictures, size=8, batch=1, damaged="leave_out")).train_set) == 1
    (pictures / "metadata.csv").unlink()
    (pictures / "4.jpg").write_bytes(b"no picture")
    module = opened(Folder(pictures, size=8, batch=11, max_bad_fraction=0.2))
    batch = first(module, 1)[0]
    assert len(batch["bad"]) == 1 and "4.jpg" in batch["bad"][0] and len(batch["key"]) == 11, "replaced by another"


def test_a_folder_is_read_once(pictures, monkeypatch):
    opened(Folder(pictures, size=8, batch=4))
    monkeypatch.setattr("ldm.data.folder._see", None)
    opened(Folder(pictures, size=8, batch=4))


# ---- any map-style dataset


class Toy:
    """Pictures, numbers and captions, mirrored at random by torch's generator, and noise by NumPy's and Python's."""

    flip = RandomHorizontalFlip()

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        noise = torch.tensor([np.random.rand(), random.random()])
        return {"image": self.flip(picture(i)), "label": i, "text": [f"{i}", f"number {i}"], "noise": noise}


FIELDS = {"image": "image", "label": "label", "caption": "text", "noise": "noise"}


def toy(**settings):
    return opened(MapStyle(**{"dataset": Toy(), "fields": FIELDS, "size": 8, "batch": 4, **settings}))


@pytest.mark.parametrize("label", [torch.tensor(3), np.array(3), np.int64(3), 3], ids=lambda label: type(label).__name__)
def test_a_label_may_be_a_tensor_without_dimensions(label):
    data = [(Image.new("RGB", (8, 8)), label)] * 4
    batch = opened(MapStyle(data, fields={"image": 0, "label": 1}, size=8, batch=4)).rows("train", [0, 1])
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [3, 3]


def test_previews_show_training_pictures_where_there_are_no_others():
    module = SimpleNamespace(device="cpu")
    data = toy()
    assert data.val_set is None
    shown = shown_first(SimpleNamespace(datamodule=data), module, 3)
    assert shown["image"].shape == (3, 3, 8, 8) and shown["position"].tolist() == [0, 1, 2]


def test_every_sample_once_an_epoch_at_a_position_of_its_own():
    taken = [label for batch in first(toy(), 11) for label in batch["label"].tolist()]
    assert all(sorted(taken[e * COUNT : (e + 1) * COUNT]) == list(range(COUNT)) for e in range(4))
    assert taken[:COUNT] != taken[COUNT : 2 * COUNT] != sorted(taken[COUNT : 2 * COUNT])


def test_random_transforms_are_functions_of_the_position_too():
    """The same on two ranks, in workers, and after a resume; and nobody else's random numbers are touched."""
    samples, before = toy().train_set, (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert samples[3]["caption"] in ("3", "number 3")
    assert (torch.get_rng_state() == before[0]).all() and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    whole_run = first(toy(), 4)
    ranks = []
    for rank in range(2):
        module = toy()
        module.share = lambda rank=rank: (rank, 2, 1)
        ranks.append(first(module, 4))
    resumed = toy(workers=1)
    resumed.load_state_dict({**toy().state_dict(), "consumed": 8, "step": 2})
    for step, (a, b) in enumerate(zip(*ranks)):
        for field in ("image", "noise", "label", "position"):
            assert torch.equal(torch.cat((a[field], b[field])), whole_run[step][field])
        assert a["caption"] + b["caption"] == whole_run[step]["caption"]
    for a, b in zip(first(resumed, 2), whole_run[2:]):
        assert_same(a, b)
    assert len({float(x) for batch in whole_run for x in batch["noise"].flatten()}) == 32


def test_another_dataset_is_noticed():
    state = toy().state_dict()
    other = Toy()
    other.__class__ = type("Toy", (Toy,), {"__len__": lambda self: COUNT - 1})
    with pytest.raises(Refusal, match="The checkpoint's samples are not this run's"):
        toy(dataset=other).load_state_dict(state)


@pytest.mark.parametrize(
    "value, member, shape",
    [
        (np.zeros((6, 5, 3), np.uint8), "image.jpg", (3, 8, 8)),
        (torch.zeros(1, 6, 5, dtype=torch.uint8), "image.jpg", (3, 8, 8)),
        (np.zeros((6, 5), np.uint8), "image.jpg", (3, 8, 8)),
        (picture(0).convert("L"), "image.jpg", (3, 8, 8)),
        (torch.zeros(4, 6, 5), "image.npy", (4, 6, 5)),
        (np.int32(3), "image.cls", ()),
    ],
)
def test_values_are_taken_for_what_they_are(value, member, shape):
    module = toy(dataset=[(value, 1)] * 4, fields={"image": 0})
    assert module.fields == {"image": member}
    batch = module.on_after_batch_transfer(next(iter(module.ordered("train", 2))))
    assert tuple(batch["image"].shape) == (2, *shape) and batch["image"].is_floating_point() == (not member.endswith("cls"))


@pytest.mark.parametrize(
    "sample, fields, message",
    [
        ((torch.rand(3, 8, 8), 1), {"image": 0}, r"array of floats, \(3, 8, 8\), whose range .* Leave ToTensor"),
        ((picture(0), 1), {"image": 0, "label": 2}, r"has no 2, but a tuple of 2; set data\.fields"),
        ({"img": picture(0)}, {"image": "image"}, "has no 'image', but the keys img"),
        ((picture(0), object()), {"label": 1}, "`label` is of type object; wanted a picture"),
    ],
)
def test_what_cannot_be_taken_is_said(sample, fields, message):
    with pytest.raises(Refusal, match=message):
        toy(dataset=[sample], fields=fields)


def test_an_error_in_the_users_own_code_keeps_its_traceback():
    class Broken(Toy):
        def __getitem__(self, i):
            return super().__getitem__(i) if i != 7 else {}["mine"]

    with pytest.raises(KeyError, match="mine"):
        list(opened(MapStyle(Broken(), fields=FIELDS, size=8, batch=1)).ordered("train", 1))


def test_torchvisions_datasets_train_in_two_lines_of_yaml(tmp_path):
    """FakeData has the samples of CIFAR-10: a picture and its class."""
    node = "{_target_: torchvision.datasets.FakeData, size: 12, image_size: [3, 32, 32], num_classes: 9}"
    words = ["experiment=emoji/class", "data=torch", f"data.dataset={node}", "data.fields={image: 0, label: 1}", "data.workers=0"]
    words += [
        "autoencoder=identity",
        "backbone.width=16",
        "backbone.groups=4",
        "backbone.heads=2",
        "data.batch=4",
        "logger=[csv]",
    ]
    folder = train(
        compose_config("train", [*words, "trainer.max_steps=1", "callback=[checkpoint]", "logger=[csv]", f"runs={tmp_path}"])
    )
    usual = json.loads((folder / "config.json").read_text())["usual"]
    assert usual["data"]["dataset"]["_target_"] == "torchvision.datasets.FakeData" and usual["resolution"] == [32, 32]
    again = build(compose_config("train", words).data)
    assert len(opened(again).train_set) == 12


# ---- the hub's


class Table(list):
    """Stands for a dataset of the library: rows by number."""

    def shuffle(self, seed, buffer_size):
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.fixture
def library(monkeypatch):
    """Stands for the library `datasets`: one dataset, of one split."""
    import sys
    from types import ModuleType

    rows = Table({"image": picture(i), "text": f"number {i}"} for i in range(COUNT))
    modules = {name: ModuleType(name) for name in ("datasets", "datasets.exceptions", "datasets.distributed")}
    modules["datasets.exceptions"].DatasetNotFoundError = type("DatasetNotFoundError", (Exception,), {})

    def load_dataset(name, config, data_dir, split, streaming):
        if name != "org/name":
            raise modules["datasets.exceptions"].DatasetNotFoundError("no such dataset")
        return rows

    modules["datasets"].load_dataset = load_dataset
    modules["datasets.distributed"].split_dataset_by_node = lambda stream, rank, world_size: Table(stream[rank::world_size])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return rows


def test_a_dataset_of_the_hub_is_any_map_style_dataset(library):
    hub = first(opened(Hub("org/name", size=8, batch=4)), 3)
    rows = [{"image": row["image"], "text": row["text"]} for row in library]
    mine = first(toy(dataset=rows, fields={"image": "image", "caption": "text"}), 3)
    for a, b in zip(hub, mine):
        assert_same(a, b)
    with pytest.raises(NotFound, match=r"data\.name=org/other: no such dataset"):
        opened(Hub("org/other"))


def test_a_stream_has_whole_batches_at_the_positions_of_training(library):
    module = opened(Hub("org/name", size=8, batch=4, streaming=True, val_split="test"))
    module.share = lambda: (1, 2, 1)
    batches = first(module, 4)
    assert [b["position"].tolist() for b in batches] == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert [c for b in batches for c in b["caption"]] == [f"number {i}" for i in (1, 3, 5, 7, 9, 1, 3, 5)]
    assert batches[0]["image"].shape == (2, 3, 8, 8) and len(module.val_set) == COUNT
    assert Hub("org/name", streaming=True, workers=4).workers == 1  # the library shares streams out by their files


def test_a_stream_is_gone_over_in_order_as_it_comes(library, monkeypatch):
    """By nobody's number: what measures all pictures once sees what the map-style one shows, of a long stream its beginning."""
    stream, whole = (opened(Hub("org/name", size=8, batch=4, streaming=streaming)) for streaming in (True, False))
    for rank in (0, 1):
        for a, b in zip(stream.ordered("train", 4, rank, 2), whole.ordered("train", 4, rank, 2), strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["position"], b["position"])
            assert a["caption"] == b["caption"]
    assert stream.train_set.captions() == whole.train_set.captions() and len(whole.train_set) == COUNT
    assert stream.train_set.index.fingerprint() == "org/name, a stream"
    with pytest.raises(Refusal, match=r"asked for by number, .* onto this machine, data\.streaming=false, all or a part"):
        len(stream.train_set)
    monkeypatch.setattr(hub_module, "MEASURED", 5)
    assert len(stream.train_set.captions()) == 5 and sum(len(batch["caption"]) for batch in stream.ordered("train", 4)) == 5


@pytest.mark.skipif(find_spec("datasets") is not None, reason="the library is here")
def test_without_the_library_it_says_what_to_install():
    with pytest.raises(Refusal, match="pip install datasets"):
        opened(Hub("org/name"))
