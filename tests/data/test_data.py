"""What the data room promises: no damage unseen, every sample once, the same order on any machine and after a restart."""

import io
import json
import math
import pickle
import shutil
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from webdataset import WebDataset

from helpers.data import COUNT, damages, fit, picture, samples
from ldm.data import emoji
from ldm.data.emoji import CLASSES, PALETTE, Emoji
from ldm.data.order.order import Batches, Mixture, Once, Steps, Stream
from ldm.data.shard.decode import BadSample, View, decode
from ldm.data.shard.index import Index
from ldm.data.shard.record import describe
from ldm.data.shard.selection import Selection
from ldm.data.shard.source import expand
from ldm.data.shard.write import write_shard, write_shards
from ldm.data.shards import Shards
from ldm.data.stream import Streamed
from ldm.files.picture import MAX_PIXELS

GOLDEN = [(2, 0), (1, 1), (2, 1), (2, 2), (1, 0), (2, 3), (0, 2), (0, 1), (0, 0), (1, 0), (0, 2), (0, 1)]


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
    index = Index(expand(folder))
    assert [key for s in (0, 1) for key in index.table(s).keys] == [f"{i:09d}" for i in range(COUNT)]
    assert index.counts.tolist() == [6, 4] and len(index) == COUNT
    offset, size = index.table(1).span(1, "txt")
    assert open(index.shards[1], "rb").read()[offset : offset + size] == b"red 7"


def test_index_knows_sizes_captions_and_what_the_records_say(folder):
    table = Index(expand(folder)).table(0)
    assert table.column("width").tolist() == [16] * 6 and table.column("height").tolist() == [16] * 6, (
        "from the pictures' headers"
    )
    assert table.column("original_width").tolist() == [64] * 6 and table.column("original_height").tolist() == [16] * 6
    assert table.column("caption_length").tolist() == [5] * 6
    assert table.column("aesthetic").tolist() == list(range(6)) and table.column("note") is None
    assert table.column("hash")[3] == int("4" * 16, 16)


def test_index_is_kept_and_made_anew_when_a_shard_changes(folder, monkeypatch):
    before = Index(expand(folder)).fingerprint()
    read = []
    monkeypatch.setattr("ldm.data.shard.index.describe", lambda path: read.append(path) or describe(path))
    assert Index(expand(folder)).fingerprint() == before and not read
    write_shard(samples(3), folder / "00001.tar")
    assert Index(expand(folder)).fingerprint() != before and [path[-9:] for path in read] == ["00001.tar"]


def test_index_lies_elsewhere_where_shards_are_read_only(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert len(Index(expand(folder), cache=tmp_path / "cache")) == COUNT
    assert not (folder / ".index").exists() and list((tmp_path / "cache").rglob("00000.tar.arrow"))


def test_records_come_from_parquet_where_the_shards_have_none(tmp_path):
    write_shard(({"__key__": f"{i}", "txt": "a", "jpg": picture()} for i in range(3)), tmp_path / "00000.tar")
    rows = [{"key": f"{i}", "similarity": i / 10, "width": 9, "height": 8} for i in (2, 0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    table = Index(expand(tmp_path)).table(0)
    assert table.column("width").tolist() == [9, 16, 9] and table.column("similarity")[[0, 2]].tolist() == [0, 0.2]
    assert np.isnan(table.column("similarity")[1])


def test_many_shards_are_read_in_parallel_as_in_turn(tmp_path, monkeypatch):
    write_shards(samples(20), tmp_path / "a", per_shard=1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # one more process shows what several would
    parallel = Index(expand(tmp_path / "a"))
    monkeypatch.setattr("ldm.data.shard.index.FEW", 100)
    shutil.rmtree(tmp_path / "a" / ".index")
    assert Index(expand(tmp_path / "a")).fingerprint() == parallel.fingerprint() and len(parallel) == 20


def test_key_ends_at_the_first_dot_of_the_last_part(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./v1.0/x.map.png", "./v1.0/x.JPG", "./v1.0/._x.jpg", "nodot"):
            tar.addfile(tarfile.TarInfo(name))
        tar.addfile(tarfile.TarInfo("deep/" * 40 + "y.jpg"))  # longer than a header holds
    table = Index([str(tmp_path / "a.tar")]).table(0)
    assert table.keys == ["./v1.0/x", "deep/" * 40 + "y"]
    assert table.members == ["jpg", "map.png"]
    assert table.span(1, "map.png")[0] == -1


@pytest.mark.parametrize("damage", damages(b"a", 0))
def test_damaged_shard_is_refused_by_name_or_left_out(folder, damage):
    shard = folder / "00000.tar"
    header = Index([str(shard)]).table(0).span(3, "cls")[0] - 512
    shard.write_bytes(damages(shard.read_bytes(), header)[damage])
    with pytest.raises(ValueError, match=r"1 of 2 shards are damaged: .*00000\.tar.*doctor.*data\.damaged=leave_out"):
        Index(expand(folder))
    left = Index(expand(folder), damaged="leave_out")
    assert list(left.damage) == [str(shard)] and len(left) == 4
    assert Shards(folder, size=16, batch=2, damaged="leave_out").train_set.keys == [f"{i:09d}" for i in range(6, 10)]


def test_expand(folder):
    both = [str(folder / "00000.tar"), str(folder / "00001.tar")]
    for source in (folder, str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00001}}.tar", f"{folder}/0000{{0,1}}.tar", both):
        assert expand(source) == both
    assert expand(both[1]) == both[1:]
    with pytest.raises(FileNotFoundError, match=r"00002\.tar.*data=emoji.*img2dataset"):
        expand(f"{folder}/{{00000..00002}}.tar")
    with pytest.raises(FileNotFoundError, match=r"data\.val"):
        expand(folder / "nowhere", "data.val")
    for address in ("pipe:cat x.tar", "ftp://bucket/x.tar"):
        with pytest.raises(ValueError, match=r"local paths.*never from a command"):
            expand(address)
    assert expand("https://host/{00..01}.tar") == ["https://host/00.tar", "https://host/01.tar"]


def test_fingerprint_tells_data_sets_apart(folder):
    whole, part = Index(expand(folder)), Index(expand(folder / "00000.tar"))
    assert whole.fingerprint() == Index(expand(f"{folder}/*.tar")).fingerprint() != part.fingerprint()


# ---- order


def stream(counts=(6, 1, 9, 2, 7), seed=0, window=2, lanes=1, number=0):
    return Stream(Selection(np.array(counts)), seed, window, lanes, number)


def taken(stream, first, last):
    return list(zip(*(x.tolist() for x in stream(np.arange(first, last)))))


@pytest.mark.parametrize("window, lanes", [(1, 1), (2, 1), (9, 1), (2, 3), (1, 30)])
def test_each_sample_once_an_epoch(window, lanes):
    everything = [(shard, row) for shard, count in enumerate((6, 1, 9, 2, 7)) for row in range(count)]
    epochs = [taken(stream(window=window, lanes=lanes), e * 25, e * 25 + 25) for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != taken(stream(seed=1, window=window, lanes=lanes), 0, 25)
    assert epochs[0] + epochs[1] == taken(stream(window=window, lanes=lanes), 0, 50)


def test_only_the_shards_of_a_window_are_read_together():
    epoch = [shard for shard, _ in taken(stream([10] * 8, window=2), 0, 80)]
    windows = [set(epoch[i : i + 20]) for i in range(0, 80, 20)]
    assert all(len(window) == 2 for window in windows) and set.union(*windows) == set(range(8))


def test_lanes_read_shards_of_their_own():
    places = Steps([stream([10] * 8, window=1, lanes=4)], [(1, 1)], [80], 8, 0)
    read = [{place.shard for step in range(10) for place in places(step)[2 * r : 2 * r + 2]} for r in range(4)]
    assert all(len(shards) == 2 for shards in read) and set.union(*read) == set(range(8))


def test_order_is_uniform():
    """How often each of 12 samples comes at each place over 6,000 epochs, windows and all: chi-square, 121 degrees."""
    order, table = stream([3, 4, 5], window=3), np.zeros((12, 12))
    for epoch in range(6000):
        shard, row = order(np.arange(epoch * 12, epoch * 12 + 12))
        table[np.arange(12), np.array([0, 3, 7])[shard] + row] += 1
    assert abs(((table - 500) ** 2 / 500).sum() - 121) < 5 * math.sqrt(2 * 121)


def test_order_stays_what_it_was():
    """Checkpoints count on it; a NumPy that shuffles otherwise must not pass unseen."""
    assert taken(stream([3, 2, 4], window=2), 0, 12) == GOLDEN


def test_an_epoch_of_hundreds_of_millions_is_sought_in_place():
    huge = stream([10_000] * 40_000, window=16)
    tracemalloc.start()
    shard, row = huge(np.arange(399_000_000, 399_000_256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(zip(shard, row))) == 256 and peak < 50e6


def steps(world, accumulate, start=0, count=9, lanes=1):
    """What each optimizer step takes, over all ranks: [sorted places]."""
    order = Steps([stream(lanes=lanes)], [(4, 4)], [25], 8, seed=3)
    ranks = [iter(Batches(order, rank, world, accumulate, start)) for rank in range(world)]
    return [sorted(place for _ in range(accumulate) for rank in ranks for place in next(rank)) for _ in range(count)]


@pytest.mark.parametrize("lanes", [1, 4])
def test_global_batches_are_the_same_on_any_machine(lanes):
    alone = steps(1, 1, lanes=lanes)
    assert [place.position for step in alone for place in step] == list(range(72))
    for world in (1, 2, 4):
        for accumulate in (1, 2):
            assert steps(world, accumulate, lanes=lanes) == alone


def test_going_on_continues_the_sequence():
    assert steps(2, 1, start=5, count=4) == steps(1, 2)[5:]


def test_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match=r"data\.batch=8.*trainer\.devices.*trainer\.accumulate_grad_batches.*multiple of 6"):
        Batches(Steps([stream()], [(1, 1)], [25], 8, 0), world=3, accumulate=2)


def test_buckets_use_every_sample_once_an_epoch_of_theirs():
    """Two buckets of 21 and 10 samples, batches of 4: after e epochs floor(21 e / 4) + floor(10 e / 4) batches."""
    order = Steps([stream([21]), stream([4, 6], number=1)], [(4, 2), (2, 4)], [21, 10], 4, seed=0)
    assert [order.first_step(e) for e in range(4)] == [0, 7, 15, 22]
    assert [order.epoch_of(s) for s in (0, 6, 7, 14, 15, 22)] == [0, 0, 1, 1, 2, 3]
    assert [order.use(e) for e in range(4)] == [[5, 2], [5, 3], [5, 2], [6, 3]]
    taken = {(4, 2): [], (2, 4): []}
    for step in range(4 * 31 // 4):
        places = order(step)
        assert len({(p.height, p.width) for p in places}) == 1
        taken[places[0].height, places[0].width] += [(p.shard, p.row) for p in places]
    for size, count in (((4, 2), 21), ((2, 4), 10)):
        assert len(taken[size]) == 4 * count
        assert all(len(set(taken[size][e * count : (e + 1) * count])) == count for e in range(4))


def test_mixtures_keep_their_shares_and_their_epochs():
    whole = Selection(np.array([50, 7, 9]))
    streams = [Stream(whole.within(np.arange(3) == i), 0, 2, number=i) for i in range(3)]
    mixture = Mixture(streams, [0.7, 0.2, 0.1], batch=10, seed=0)
    batches = [taken(mixture, k * 10, k * 10 + 10) for k in range(63)]
    assert all([shard for shard, _ in batch].count(s) == n for batch in batches for s, n in ((0, 7), (1, 2), (2, 1)))
    for shard, epochs, count in ((1, 18, 7), (2, 7, 9)):
        rows = Counter(row for batch in batches for s, row in batch if s == shard)
        assert rows == dict.fromkeys(range(count), epochs)
    assert taken(mixture, 20, 30) == batches[2], "no memory"
    with pytest.raises(ValueError, match=r"data\.weights.*at least one sample of a batch of 4"):
        Mixture(streams, [0.7, 0.2, 0.1], batch=4, seed=0)


def once(counts, sizes, batch, rank, world):
    return Once([Selection(np.array([c])) for c in counts], sizes, batch, rank, world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_each_sample_once(world):
    ranks = [once([17, 5], [(1, 1), (2, 1)], 6, rank, world) for rank in range(world)]
    assert sorted(place.position for rank in ranks for batch in rank for place in batch) == list(range(22))
    assert all(len({place.height for place in batch}) == 1 for rank in ranks for batch in rank)
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
    image = decode("webp", data, View(8, 8))
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert (image.int() - torch.tensor(colour)[:, None, None]).abs().max() <= 2


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}])
def test_jpegs_have_pillows_very_pixels(options):
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    image, file, out = Image.fromarray(pixels).convert(options.pop("mode", "RGB")), io.BytesIO(), np.empty_like(pixels)
    image.save(file, "JPEG", **options)
    decoded = decode("jpg", file.getvalue(), View(21, 34), out=out)
    assert np.array_equal(decoded.permute(1, 2, 0), np.array(Image.open(file).convert("RGB")))
    assert np.shares_memory(decoded.numpy(), out), "straight into the batch"
    assert torch.equal(decode("jpg", file.getvalue(), View(21, 34, flip=True), out=out), decoded.flip(2))
    assert torch.equal(decode("jpg", file.getvalue() + b"rest", View(21, 34)), decoded), "as Pillow, which does not mind"


def test_pictures_stand_upright_and_keep_their_middle():
    image = Image.new("RGB", (48, 16), "red")
    image.paste("blue", (16, 0, 32, 16))
    image.paste("white", (16, 0, 32, 4))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored at the top belongs to the right
    image.save(file, "PNG", exif=exif)
    decoded = decode("png", file.getvalue(), View(16, 16))
    assert decoded[:, :, 12:].min() == 255
    assert decoded[0, :, :12].max() == 0 and decoded[2, :, :12].min() == 255


def test_label_map_keeps_its_numbers():
    labels = np.repeat(np.repeat(np.arange(4, dtype=np.uint8).reshape(2, 2), 4, 0), 4, 1)
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    small = decode("map.png", file.getvalue(), View(2, 2))
    assert small.dtype == torch.int64 and small.tolist() == [[0, 1], [2, 3]]


def test_other_members():
    assert decode("txt", "crème brûlée \n".encode(), View(8, 8)) == "crème brûlée"
    assert decode("json", b'{"a": 1}', View(8, 8)) == {"a": 1}
    assert decode("cls", b"7", View(8, 8)) == 7
    file = io.BytesIO()
    np.save(file, np.ones((2, 3), np.float16))
    assert decode("moments.npy", file.getvalue(), View(8, 8)).dtype == torch.float16


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
        with pytest.raises(BadSample, match=f"'{member}' of sample 'k' in s.tar"):
            decode(member, data, View(8, 8), where="sample 'k' in s.tar")
    for member in ("pyd", "pickle", "pth", "txt.gz", "npz"):
        with pytest.raises(ValueError, match=r"not read.*data\.fields"):
            decode(member, b"", View(8, 8))


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
    assert len(Index(expand(tmp_path / "a"))) == 2
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
    with pytest.raises(ValueError, match=r"10 of 10 samples lack .*'webp'.*000000000.*jpg.*data\.fields\.image"):
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
    anew = fit(data(seed=5, on_mismatch="restart_epoch"), tmp_path / "4.ckpt", 5, resume=tmp_path / "2.ckpt")
    assert [position for position, _ in anew.seen] == [8, 9, 10, 11], "the second epoch begins with the third step"
    again = fit(data(seed=5), tmp_path / "5.ckpt", 6, resume=tmp_path / "4.ckpt")
    assert [position for position, _ in again.seen] == [12, 13, 14, 15]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_another_kind_of_data_is_refused(folder, tmp_path):
    fit(Shards(folder, size=16, batch=4), tmp_path / "1.ckpt", 3)
    streamed = fit(Streamed(folder, size=16, batch=4), tmp_path / "2.ckpt", 4, resume=tmp_path / "1.ckpt")
    assert [position for position, _ in streamed.seen] == [12, 13, 14, 15], "other samples, but noise goes on"
    with pytest.raises(ValueError, match=r"step 4 .*another kind of data than Shards.*data\.on_mismatch=restart_epoch"):
        fit(Shards(folder, size=16, batch=4), tmp_path / "x.ckpt", 5, resume=tmp_path / "2.ckpt")
    anew = fit(Shards(folder, size=16, batch=4, on_mismatch="restart_epoch"), tmp_path / "3.ckpt", 5, resume=tmp_path / "2.ckpt")
    assert [position for position, _ in anew.seen] == [8, 9, 10, 11], "the second epoch begins with the third step"


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_was_cut_short_begins_anew(folder, tmp_path):
    """A checkpoint written after 2 of 4 micro-batches has lost their gradients, so all 4 are taken again."""

    def leg(steps, *callbacks, resume=None):
        return fit(Shards(folder, size=16, batch=8), tmp_path / "end.ckpt", steps, 4, resume, callbacks).seen

    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole = leg(3, Cut())
    assert [position for position, _ in whole] == list(range(24))
    assert leg(3, resume=tmp_path / "cut.ckpt") == whole[8:]


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
