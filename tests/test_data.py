"""What the data room promises: no damage unseen, every sample once, the same order on any machine and after a restart."""

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from webdataset import WebDataset

from ldm.data import emoji
from ldm.data.decode import MAX_PIXELS, decode
from ldm.data.emoji import CLASSES, PALETTE, Emoji
from ldm.data.index import build, expand
from ldm.data.order import Batches, Once, sample_at
from ldm.data.shards import Shards
from ldm.data.write import write_shards

COUNT = 10


def picture(form="JPEG", mode="RGB", size=(16, 16), colour=None, **options):
    """The bytes of a picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour if colour is not None else 0).save(file, form, **options)
    return file.getvalue()


def samples(count=COUNT, **members):
    """Red pictures that grow darker, with captions."""
    for i in range(count):
        jpg = picture(colour=(250 - 20 * i, 0, 0), quality=95)
        yield {"__key__": f"{i:09d}", "jpg": jpg, "txt": f"red {i}", "cls": i, "json": {"width": 16}, **members}


@pytest.fixture
def folder(tmp_path):
    write_shards(samples(), tmp_path / "shards", per_shard=6)
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def emojis(tmp_path_factory):
    fields = {"image": "jpg", "caption": "txt", "label": "cls", "map": "map.png", "json": "json"}
    data = Emoji(root=tmp_path_factory.mktemp("emoji"), fields=fields)
    data.prepare_data()
    data.setup()
    return data


# ---- index


def test_index_finds_every_member(folder):
    index = build(expand(folder))
    assert index.keys == [f"{i:09d}" for i in range(COUNT)]
    assert index.shard.tolist() == [0] * 6 + [1] * 4
    offset, size = index.spans["txt"][7]
    assert open(index.shards[1], "rb").read()[offset : offset + size] == b"red 7"


def test_key_ends_at_the_first_dot_of_the_last_part(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./v1.0/x.map.png", "./v1.0/x.JPG", "./v1.0/._x.jpg", "nodot"):
            tar.addfile(tarfile.TarInfo(name))
        tar.addfile(tarfile.TarInfo("deep/" * 40 + "y.jpg"))  # longer than a header holds
    index = build([str(tmp_path / "a.tar")])
    assert index.keys == ["./v1.0/x", "deep/" * 40 + "y"]
    assert list(index.spans) == ["jpg", "map.png"]
    assert index.spans["map.png"][1].tolist() == [-1, -1]


def damages(data, header):
    """Ways to spoil a tar of which a sample's first header lies at `header`."""
    zeros, ones = bytes(512), b"\xff" * 512
    return {
        "cut inside data": data[: header + 600],
        "cut inside a header": data[: header + 100],
        "cut at a member": data[:header],
        "header of 0xff": data[:header] + ones + data[header + 512 :],
        "header zeroed": data[:header] + zeros + data[header + 512 :],
        "two zero blocks in the middle": data[:header] + zeros + zeros + data[header:],
        "no end mark": data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512),
        "ends early, cleanly": data[:header] + bytes(10240),
        "empty file": b"",
        "error page": b"<html><body>503 Service Unavailable</body></html>" * 40,
        "gzip": gzip.compress(data),
    }


@pytest.mark.parametrize("damage", damages(b"a", 0))
def test_damaged_shard_is_refused_by_name(folder, damage):
    shard = folder / "00000.tar"
    header = int(build([str(shard)]).spans["cls"][3][0]) - 512
    shard.write_bytes(damages(shard.read_bytes(), header)[damage])
    with pytest.raises(ValueError, match=r"00000\.tar"):
        build(expand(folder))


def test_expand(folder):
    both = [str(folder / "00000.tar"), str(folder / "00001.tar")]
    for source in (folder, str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00001}}.tar", f"{folder}/0000{{0,1}}.tar", both):
        assert expand(source) == both
    assert expand(both[1]) == both[1:]
    with pytest.raises(FileNotFoundError, match=r"00002\.tar.*data=emoji.*img2dataset"):
        expand(f"{folder}/{{00000..00002}}.tar")
    with pytest.raises(FileNotFoundError, match=r"data\.val"):
        expand(folder / "nowhere", "data.val")
    for address in ("pipe:cat x.tar", "s3://bucket/x.tar"):
        with pytest.raises(ValueError, match="local paths"):
            expand(address)


def test_fingerprint_tells_data_sets_apart(folder):
    whole, part = build(expand(folder)), build(expand(folder / "00000.tar"))
    assert whole.fingerprint() == build(expand(f"{folder}/*.tar")).fingerprint() != part.fingerprint()


# ---- order


def test_each_sample_once_an_epoch():
    epochs = [[sample_at(e * 50 + i, 50, seed=1) for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [sample_at(i, 50, seed=2) for i in range(50)]


def test_order_stays_what_it_was():
    """Checkpoints count on it; a NumPy that shuffles otherwise must not pass unseen."""
    assert [sample_at(p, 8, seed=0) for p in range(16)] == [5, 0, 6, 1, 7, 2, 4, 3, 2, 0, 4, 1, 7, 5, 3, 6]


def steps(count, world, accumulate, start=0, steps=9, batch=8):
    """What each optimizer step takes, over all ranks: [sorted (position, index)]."""
    ranks = [iter(Batches(count, batch, rank, world, accumulate, seed=3, start=start)) for rank in range(world)]
    return [sorted(place for _ in range(accumulate) for rank in ranks for place in next(rank)) for _ in range(steps)]


def test_global_batches_are_the_same_on_any_machine():
    alone = steps(21, 1, 1)
    assert [place[0] for step in alone for place in step] == list(range(72))
    for world in (1, 2, 4):
        for accumulate in (1, 2):
            assert steps(21, world, accumulate) == alone


def test_going_on_continues_the_sequence():
    assert steps(21, 2, 1, start=40, steps=4) == steps(21, 1, 2)[5:]


def test_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match=r"data\.batch=8.*trainer\.devices.*trainer\.accumulate_grad_batches.*multiple of 6"):
        Batches(10, 8, world=3, accumulate=2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_each_sample_once(world):
    ranks = [Once(17, 6, rank, world) for rank in range(world)]
    assert sorted(i for rank in ranks for batch in rank for i, _ in batch) == list(range(17))
    assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks]


# ---- decode


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (picture(mode="L", colour=100), (100, 100, 100)),
        (picture("PNG", "I;16", colour=100 * 257), (100, 100, 100)),
        (picture("PNG", "1", colour=1), (255, 255, 255)),
        (picture("PNG", "P", colour=0), (0, 0, 0)),
        (picture("PNG", "P", colour=0, transparency=0), (255, 255, 255)),
        (picture("PNG", "RGBA", colour=(0, 0, 255, 0)), (255, 255, 255)),
        (picture("PNG", "LA", colour=(0, 51)), (204, 204, 204)),
        (picture("JPEG", "CMYK", colour=(255, 0, 0, 0)), (0, 255, 255)),
        (picture("WEBP", "RGB", colour=(10, 20, 30), lossless=True), (10, 20, 30)),
    ],
)
def test_every_mode_becomes_rgb_over_white(data, colour):
    image = decode("webp", data, 8)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert (image.int() - torch.tensor(colour)[:, None, None]).abs().max() <= 2


def test_pictures_stand_upright_and_keep_their_middle():
    image = Image.new("RGB", (48, 16), "red")
    image.paste("blue", (16, 0, 32, 16))
    image.paste("white", (16, 0, 32, 4))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored at the top belongs to the right
    image.save(file, "PNG", exif=exif)
    decoded = decode("png", file.getvalue(), 16)
    assert decoded[:, :, 12:].min() == 255
    assert decoded[0, :, :12].max() == 0 and decoded[2, :, :12].min() == 255


def test_label_map_keeps_its_numbers():
    labels = np.repeat(np.repeat(np.arange(4, dtype=np.uint8).reshape(2, 2), 4, 0), 4, 1)
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    small = decode("map.png", file.getvalue(), 2)
    assert small.dtype == torch.int64 and small.tolist() == [[0, 1], [2, 3]]


def test_other_members():
    assert decode("txt", "crème brûlée \n".encode(), 8) == "crème brûlée"
    assert decode("json", b'{"a": 1}', 8) == {"a": 1}
    assert decode("cls", b"7", 8) == 7
    file = io.BytesIO()
    np.save(file, np.ones((2, 3), np.float16))
    assert decode("moments.npy", file.getvalue(), 8).dtype == torch.float32


def test_bad_members_are_refused_by_name():
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    bomb = picture("PNG", "1", size=(2**13, MAX_PIXELS // 2**13 + 1))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"
    bad = {
        "jpg": b"\xff\xd8 cut",
        "png": bomb,
        "webp": eps,
        "npy": pickled.getvalue(),
        "json": b"[1]",
        "cls": b"x",
        "txt": b"\xff",
    }
    for member, data in bad.items():
        with pytest.raises(ValueError, match=f"'{member}' of sample 'k' in s.tar"):
            decode(member, data, 8, where="sample 'k' in s.tar")
    for member in ("pyd", "pickle", "pth", "txt.gz", "npz"):
        with pytest.raises(ValueError, match=r"not read.*data\.fields"):
            decode(member, b"", 8)


# ---- write


def test_folder_appears_whole_or_not_at_all(tmp_path):
    def crash():
        yield from samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(crash(), tmp_path / "a", per_shard=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no samples"):
        write_shards([], tmp_path / "a")
    with pytest.raises(ValueError, match="pickle"):
        write_shards([{"__key__": "0", "pickle": b""}], tmp_path / "a")
    write_shards(samples(1), tmp_path / "a")
    with pytest.raises(FileExistsError):
        write_shards(samples(1), tmp_path / "a")


def test_faster_writer_wins(tmp_path):
    def slow():
        yield from samples(1)
        write_shards(samples(2), tmp_path / "a")

    assert write_shards(slow(), tmp_path / "a") == [str(tmp_path / "a" / "00000.tar")]
    assert len(build(expand(tmp_path / "a"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- shards


def test_batches_do_not_depend_on_workers(folder):
    loaders = [Shards(folder, size=16, batch=4, workers=workers).train_dataloader() for workers in (0, 2)]
    for _, here, there in zip(range(4), *loaders, strict=False):
        assert here["image"].shape == (4, 3, 16, 16) and here["position"].dtype == torch.int64
        assert torch.equal(here["image"], there["image"]) and torch.equal(here["position"], there["position"])
        assert here["caption"] == there["caption"] == [f"red {int(key)}" for key in here["key"]]


def test_samples_travel_to_spawned_workers(folder):
    data = Shards(folder, size=16)
    data.train_set[0]
    assert pickle.loads(pickle.dumps(data.train_set))[9]["caption"] == "red 9"


def test_pictures_reach_the_model_as_floats(folder):
    data = Shards(folder, size=16, fields={"image": "jpg", "label": "cls"})
    batch = data.on_after_batch_transfer(next(iter(data.ordered("train", 10))))
    assert batch["image"].dtype == torch.float32 and batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["image"][:, 1:].max() < -0.9 and batch["image"][0, 0].min() > 0.9
    assert batch["label"].tolist() == batch["position"].tolist() == list(range(10))


def test_missing_member_is_named(folder):
    with pytest.raises(ValueError, match=r"10 of 10 samples lack member 'webp'.*000000000.*jpg.*data\.fields\.image"):
        Shards(folder, fields={"image": "webp"}).setup()
    with pytest.raises(ValueError, match="not read from shards"):
        Shards(folder, fields={"image": "pickle"})


def test_empty_caption_is_named(tmp_path):
    write_shards([*samples(1), {"__key__": "empty", "txt": " ", "jpg": b""}], tmp_path / "a")
    with pytest.raises(ValueError, match=r"1 of 2 samples have an empty caption.*'empty'"):
        Shards(tmp_path / "a").setup()


def test_unreadable_picture_is_named(tmp_path):
    write_shards(samples(2, jpg=b"\xff\xd8\xff not a picture"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"'jpg' of sample '000000000' in .*00000\.tar"):
        Shards(tmp_path / "a").ordered("train", 2).__iter__().__next__()


def test_hostile_members_are_never_opened(tmp_path):
    """They lie in the tar and stay there: nothing asks for them, and nothing that asks for them is built."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"0.jpg": picture(), "0.txt": b"x", "0.pickle": b"cos\nsystem\n", "0.pyd": b"pipe:id"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = Shards(tmp_path / "a.tar", size=16)
    assert data.train_set[0].keys() == {"image", "caption", "key"}
    with pytest.raises(ValueError, match="not read from shards"):
        Shards(tmp_path / "a.tar", fields={"image": "pyd"})


class Recorder(pl.LightningModule):
    """Notes which positions it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen += list(zip(batch["position"].tolist(), batch["key"], strict=True))
        return self.weight.sum() * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["position"].tolist()

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches  # schedules ask for it, and so build the loader early
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, path, max_steps, accumulate=1, resume=None):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        val_check_interval=accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **quiet,
    )
    model = Recorder()
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(path)
    return model


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_where_it_stopped_twice(folder, tmp_path):
    def data(**options):
        return Shards(folder, folder, size=16, batch=4, **options)

    whole = fit(data(), tmp_path / "whole.ckpt", 7)
    first = fit(data(), tmp_path / "1.ckpt", 2, accumulate=2)
    second = fit(data(), tmp_path / "2.ckpt", 4, resume=tmp_path / "1.ckpt")
    third = fit(data(), tmp_path / "3.ckpt", 7, resume=tmp_path / "2.ckpt")
    assert first.seen + second.seen + third.seen == whole.seen
    assert [position for position, _ in whole.seen] == list(range(28))
    assert whole.validated == [*range(COUNT)] * 7
    assert fit(Shards(folder, size=16, batch=4), tmp_path / "x.ckpt", 1).validated == []

    for change in ({"seed": 5}, {"batch": 2}):
        options = {"batch": 4} | change
        with pytest.raises(ValueError, match=f"{next(iter(change))}.*data.on_mismatch=restart_epoch"):
            fit(Shards(folder, size=16, **options), tmp_path / "x.ckpt", 8, resume=tmp_path / "3.ckpt")
    anew = fit(data(seed=5, on_mismatch="restart_epoch"), tmp_path / "4.ckpt", 8, resume=tmp_path / "3.ckpt")
    assert [position for position, _ in anew.seen] == [20, 21, 22, 23]
    again = fit(data(seed=5), tmp_path / "5.ckpt", 9, resume=tmp_path / "4.ckpt")
    assert [position for position, _ in again.seen] == [24, 25, 26, 27]


# ---- emoji


def test_atlas_and_names_agree():
    rows = emoji._rows()
    assert len(rows) == 3655 and tuple(dict.fromkeys(row["group"] for row in rows)) == CLASSES
    with Image.open(emoji.ASSETS / "emoji.webp") as atlas:
        assert atlas.size == (64 * emoji.CELL, -(-len(rows) // 64) * emoji.CELL)
    assert sum(path.stat().st_size for path in emoji.ASSETS.iterdir()) < 8_000_000


def test_emoji_subset(emojis):
    assert len(emojis.train_set) + len(emojis.val_set) == 1015
    assert 0.03 < len(emojis.val_set) / 1015 < 0.07
    assert not set(emojis.train_set.keys) & set(emojis.val_set.keys)
    assert emojis.train_set.fields["label"] == "cls" and CLASSES[3] == "Food & Drink"


def test_red_apple_is_red(emojis):
    split = next(s for s in (emojis.train_set, emojis.val_set) if "red apple" in s.captions())
    apple = split[split.captions().index("red apple")]
    assert apple["image"].shape == (3, 32, 32) and apple["map"].shape == (32, 32)
    assert CLASSES[apple["label"]] == apple["json"]["group"] == "Food & Drink"
    labels = apple["map"][apple["map"] > 0] - 1
    assert list(PALETTE)[labels.mode().values] == "red"
    red, green, blue = apple["image"][:, 16, 16].tolist()
    assert red > 200 and green < 120 and blue < 80
    assert apple["image"][:, 0, 0].min() > 250


def test_webdataset_reads_the_emoji_shards(emojis):
    theirs = list(WebDataset(expand(emojis.train), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == emojis.train_set.keys
    assert [sample["txt"].decode() for sample in theirs] == emojis.train_set.captions()
    record = json.loads(theirs[0]["json"])
    assert record["key"] == theirs[0]["__key__"] == "000000000" and record["status"] == "success"


def test_emoji_are_written_once(emojis):
    shard = emojis.folder / "train" / "00000.tar"
    before = shard.stat().st_mtime_ns
    emojis.prepare_data()
    assert shard.stat().st_mtime_ns == before


def test_emoji_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Food"):
        Emoji(root=tmp_path, groups=["Fod"])
    with pytest.raises(FileNotFoundError, match="No shards"):
        Emoji(root=tmp_path).setup()
    monkeypatch.setattr(emoji, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"emoji\.webp is missing"):
        Emoji(root=tmp_path)
