"""The data module from end to end: what filters and buckets keep, bad and hostile samples, exact resume."""

import gzip
import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import ShardWriter, WebDataset

from helpers.data import COUNT, fit, picture, samples
from helpers.processes import together, torchrun
from helpers.shards import train
from ldm.data.order.bucket import SDXL_TALL, assign, generate, sizes_of
from ldm.data.order.filter import ALIASES
from ldm.data.shard.index import Index
from ldm.data.shard.selection import Selection
from ldm.data.shard.source import expand
from ldm.data.shard.write import write_shard, write_shards
from ldm.data.shards import Shards
from ldm.data.stream import Streamed
from ldm.tower import counter

QUIET = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path):
    write_shards(samples(), tmp_path / "shards", per_shard=6)
    return tmp_path / "shards"


def first(loader, count):
    return [batch for _, batch in zip(range(count), loader)]


def kept(folder, **rules):
    return [int(key) for key in Shards(folder, size=16, batch=1, filters=rules).train_set.keys]


# ---- filters


def test_filters_keep_what_lies_in_their_range(folder):
    assert kept(folder, aesthetic=[3, 7]) == [3, 4, 5, 6, 7]
    assert kept(folder, AESTHETIC=[None, 2], caption_length=[1, 5]) == [0, 1, 2], "whatever the case"
    assert kept(folder, unique=True) == [0, 1, 2, 3, 4, 5, 6], "7, 8 and 9 have the hashes of 0, 1 and 2"
    assert kept(folder, aesthetic=[1, None], unique=True) == [1, 2, 3, 4, 5, 6, 7]
    assert kept(folder, side=[16, None], aspect=[None, 1.0], original_side=[None, 16]) == list(range(10))
    assert "pwatermark" in ALIASES["watermark"]


def test_what_filters_drop_is_told(folder, capsys):
    Shards(folder, size=16, filters={"aesthetic": [5, None], "unique": True}).setup()
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["aesthetic:", "[5,", "None]", "5", "5"] in table and ["unique:", "true", "0", "5"] in table


def test_filters_on_what_is_not_known_are_refused_unless_said(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data\.filters\.watermark: 6 of 6 samples in .*00000\.tar.*aesthetic.*missing=drop"):
        kept(folder, watermark=[None, 0.5])
    with pytest.raises(ValueError, match=r"no samples to train on.*data\.filters"):
        Shards(folder, size=16, filters={"watermark": [None, 0.5], "missing": "drop"}).train_dataloader()
    assert len(kept(folder, watermark=[None, 0.5], missing="keep")) == COUNT
    with pytest.raises(ValueError, match=r"data\.filters\.side=256: wanted the least and the most"):
        kept(folder, side=256)


def test_incomplete_and_silent_samples_can_be_left_out(tmp_path):
    write_shards([*samples(2), {"__key__": "a", "txt": " ", "jpg": b""}, {"__key__": "b", "txt": "b"}], tmp_path / "a")
    assert Shards(tmp_path / "a", batch=1, filters={"complete": True, "caption_length": [1, None]}).train_set.keys == [
        "000000000",
        "000000001",
    ]


# ---- buckets


def test_sdxls_sizes_are_the_papers():
    sizes = sizes_of("sdxl", 1024)
    assert len(sizes) == 2 * sum(map(len, SDXL_TALL.values())) - 1
    assert (512, 2048) in sizes and (1024, 1024) in sizes and all(h % 64 == w % 64 == 0 for h, w in sizes)
    assert all(0.9 < h * w / 1024**2 <= 1.0 for h, w in sizes)


def test_generated_sizes_keep_the_area():
    sizes = generate(512, 64, 2.0)
    assert (512, 512) in sizes and len(sizes) > 4
    assert all(h * w <= 512**2 and max(h, w) <= 2 * min(h, w) and h % 64 == w % 64 == 0 for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)


@pytest.fixture
def shapes(tmp_path):
    """Pictures of three shapes: 24 wide, 12 square, 3 tall."""
    sides = [(32, 16)] * 24 + [(16, 16)] * 12 + [(16, 40)] * 3
    write_shards(
        ({"__key__": f"{i:03d}", "jpg": picture(size=side), "txt": "a"} for i, side in enumerate(sides)), tmp_path / "a", 10
    )
    return tmp_path / "a"


def test_each_batch_is_of_one_size_and_each_picture_goes_to_the_nearest(shapes):
    data = Shards(shapes, shapes, size=16, batch=4, buckets=[[16, 32], [16, 16], [32, 16]])
    sizes = Counter()
    for batch in first(data.train_dataloader(), 9):
        keys = [int(key) for key in batch["key"]]
        height, width = batch["image"].shape[2:]
        sizes[height, width] += 1
        assert (height, width) == ((16, 32) if max(keys) < 24 else (16, 16)) and (max(keys) < 24 or min(keys) >= 24)
    assert sizes == {(16, 32): 6, (16, 16): 3}, "three tall pictures make no batch of 4: they go with the squares"
    assert sum(data.steps.use(0)) == 9
    assert sorted(p for b in data.val_dataloader() for p in b["position"].tolist()) == list(range(39))
    index = Index(expand(shapes))
    parts = assign(index, Selection(index.counts), [(16, 32), (16, 16), (32, 16)])
    assert [len(part) for part in parts] == [24, 12, 3]


@QUIET
def test_buckets_go_on_bitwise_and_their_use_is_reported(shapes, tmp_path, capsys):
    """Twice stopped and gone on, over an epoch's end: the very same batches and weights."""

    def leg(steps, resume=None):
        data = Shards(shapes, size=16, batch=4, buckets=[[16, 32], [16, 16], [32, 16]], crop="random", flip=0.5)
        return fit(data, tmp_path / f"{steps}.ckpt", steps, resume=resume)

    whole = leg(13)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"Epoch {epoch} of data.buckets, batches of each height x width: 16x16 {n} (15 pictures), 16x32 6 (24 pictures)"
        for epoch, n in ((0, 3), (1, 4))
    ]
    legs = [leg(3), leg(8, tmp_path / "3.ckpt"), leg(13, tmp_path / "8.ckpt")]
    assert [sample for leg in legs for sample in leg.seen] == whole.seen
    assert torch.equal(legs[-1].weight, whole.weight)


def test_sdxl_is_told_sizes_and_crops(tmp_path):
    """A 64 x 32 picture, once 128 x 64, brought to 16 x 16: scaled to 32 x 16, cut at 8 from the left."""
    record = {"width": 64, "height": 32, "original_width": 128, "original_height": 64}
    write_shard([{"__key__": "0", "jpg": picture(size=(64, 32)), "txt": "a", "json": record}], tmp_path / "0.tar")
    batch = first(Shards(tmp_path, size=16, batch=1).train_dataloader(), 1)[0]
    told = {name: batch[name].tolist() for name in batch if name.split("_")[0] in ("original", "crop", "target")}
    assert told == {
        "original_height": [64],
        "original_width": [128],
        "crop_top": [0],
        "crop_left": [8],
        "target_height": [16],
        "target_width": [16],
    }
    lefts = [b["crop_left"].item() for b in first(Shards(tmp_path, size=16, batch=1, crop="random").train_dataloader(), 50)]
    assert min(lefts) <= 2 and max(lefts) >= 13


@pytest.mark.parametrize("kind", [Shards, Streamed])
def test_records_that_lie_about_sizes_are_not_believed(tmp_path, kind):
    for i, wild in enumerate((1e300, 10**400, -5, 0, math.nan)):
        record = {"width": wild, "height": wild, "original_width": wild, "original_height": 2.0**40}
        write_shard([{"__key__": f"{i}", "jpg": picture(), "txt": "a", "json": record}], tmp_path / f"{i}.tar")
        batch = first(kind(tmp_path / f"{i}.tar", size=16, batch=1).train_dataloader(), 1)[0]
        assert batch["original_height"].item() == batch["crop_top"].item() == batch["crop_left"].item() == 0
        assert batch["original_width"].item() in (0, 16, -5)


def test_augmentation_follows_the_position(folder):
    def images(seed, workers=0):
        data = Shards(folder, size=12, batch=5, crop="random", flip=0.5, seed=seed, workers=workers)
        return torch.cat([batch["image"] for batch in first(data.train_dataloader(), 3)])

    assert torch.equal(images(0), images(0, workers=2))


@pytest.mark.parametrize("wrong", [{"size": 0}, {"batch": 0}, {"flip": 2.0}, {"flip": -0.1}, {"crop": "centre"}], ids=str)
def test_settings_that_mean_nothing_are_refused_before_anything_is_read(wrong, tmp_path):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(wrong))}=.*wanted"):
        Shards(tmp_path / "none", **wrong)


def test_what_samples_lack_names_the_members_that_could_take_its_place(tmp_path):
    rows = [{"__key__": f"{i}", "png": picture("PNG"), "jpg": picture(), "json": {"caption": "a"}} for i in range(2)]
    write_shards(rows, tmp_path / "a")
    with pytest.raises(ValueError, match=r"have jpg, json, png; none is read as txt is: remove the field"):
        _ = Shards(tmp_path / "a", size=16, batch=1).train_set
    with pytest.raises(ValueError, match=r"set data\.fields\.image to jpg or png, remove"):
        _ = Shards(tmp_path / "a", fields={"image": "webp"}, size=16, batch=1).train_set


# ---- mixtures


def test_mixtures_take_their_share_of_every_batch(tmp_path):
    for name, count in (("a", 8), ("b", 5)):
        write_shards(({**s, "txt": name} for s in samples(count)), tmp_path / name, per_shard=3)
    data = Shards([tmp_path / "a", tmp_path / "b"], size=16, batch=4, weights=[3, 1])
    assert all(Counter(batch["caption"]) == {"a": 3, "b": 1} for batch in first(data.train_dataloader(), 8))
    with pytest.raises(ValueError, match=r"data\.weights with data\.buckets"):
        Shards([tmp_path / "a", tmp_path / "b"], size=16, weights=[3, 1], buckets=[[16, 16], [8, 8]])
    for weights in ([3, 0], [0, 0], [3, -1], [3, math.nan]):
        with pytest.raises(ValueError, match=r"data\.weights=.* each must be above 0"):
            Shards([tmp_path / "a", tmp_path / "b"], size=16, weights=weights)
    with pytest.raises(ValueError, match=r"data\.weights: .*a/00000\.tar belongs to .*a and .*\{a,b\}/00000\.tar"):
        _ = Shards([tmp_path / "a", f"{tmp_path}/{{a,b}}/00000.tar"], size=16, batch=4, weights=[3, 1]).steps
    rules = {"aesthetic": [5, None]}  # of which the second set has none
    with pytest.raises(ValueError, match=r"data\.weights: there is nothing to train on in .*b; look at data\.filters"):
        _ = Shards([tmp_path / "a", tmp_path / "b"], size=16, batch=4, weights=[3, 1], filters=rules).steps


# ---- bad and hostile samples


def spoilt(tmp_path, every):
    rotten = ({**s, "jpg": b"\xff\xd8\xff no picture"} if i % every == 0 else s for i, s in enumerate(samples()))
    write_shards(rotten, tmp_path / "bad", per_shard=6)
    return tmp_path / "bad"


@QUIET
def test_bad_samples_are_replaced_the_same_way_every_time_and_named(tmp_path):
    folder = spoilt(tmp_path, 5)
    one, two = (first(Shards(folder, size=16, batch=5, workers=w).train_dataloader(), 4) for w in (0, 2))
    assert [b["key"] for b in one] == [b["key"] for b in two] and all(len(b["key"]) == 5 for b in one)
    assert not {"000000000", "000000005"} & {key for b in one for key in b["key"]}
    bad = [line for b in one for line in b.get("bad", ())]
    assert len(bad) >= 4 and all("00000" in line and "'jpg'" in line and ".tar" in line for line in bad)
    data = Shards(folder, size=16)
    seen = [data.on_after_batch_transfer(b) for b in data.ordered("train", 4)]
    assert [p for b in seen for p in b["position"].tolist()] == [1, 2, 3, 4, 6, 7, 8, 9] and data.bad.count == 2
    assert all("bad" not in b for b in seen)
    with pytest.raises(ValueError, match=r"'000000005'.*doctor"):
        data.rows("train", [4, 5])


@QUIET
def test_training_stops_beyond_the_fraction(tmp_path):
    data = Shards(spoilt(tmp_path, 5), size=16, batch=10, max_bad_fraction=0.01)
    with pytest.raises(ValueError, match=r"of \d+ samples cannot be read, more than data\.max_bad_fraction=0\.01"):
        for batch in data.train_dataloader():
            data.on_after_batch_transfer(batch)
    assert 10 < data.bad.count < 20


def test_errors_of_the_program_are_not_taken_for_bad_samples(folder, monkeypatch):
    monkeypatch.setattr("ldm.data.batch.samples.decode", lambda *_, **__: undefined)  # noqa: F821
    with pytest.raises(NameError):
        first(Shards(folder, size=16).train_dataloader(), 1)


def test_a_hostile_shard_runs_nothing_and_fills_no_memory(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")  # 12 kB that unpack to 100 megapixels
    deep = b"[" * 100_000
    members = {
        "../../escape.jpg": picture(),
        "../../escape.txt": b"a",
        "code.pyd": b"import os",
        "code.pth": b"cos\nsystem\n(S'touch owned'\ntR.",
        "code.pickle": b"cos\nsystem\n(S'touch owned'\ntR.",
        "bomb.jpg": bomb.getvalue(),
        "bomb.txt": b"a",
        "bomb.json": deep,
        "long.jpg": picture(),
        "long.txt": b"x" * 2_000_000,
        "good.jpg": picture(),
        "good.txt": b"good",
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = Shards(tmp_path / "a.tar", size=16, batch=2, filters={"complete": True})
    keys = [key for batch in first(data.train_dataloader(), 6) for key in batch["key"]]
    assert set(keys) == {"../../escape", "good"}
    bad = [line for batch in data.ordered("train", 4) for line in batch["bad"]]
    assert len(bad) == 2 and "67108864 pixels" in bad[0] and "1048576 bytes" in bad[1]
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", ".index"}


@QUIET
def test_bad_samples_are_counted_by_reason(tmp_path):
    pictures = [b"GIF89a", b"nothing", b"", picture()[:200]]
    spoilt = ({**s, "jpg": [*pictures, s["jpg"]][i % 5]} for i, s in enumerate(samples()))
    write_shards(spoilt, tmp_path / "a")
    data = Shards(tmp_path / "a", size=16)
    for batch in data.ordered("train", COUNT):
        data.bad.note(batch, None)
    assert sorted(data.bad.reasons.values()) == [2, 6] and any("no picture in JPEG, PNG, WEBP" in why for why in data.bad.reasons)


# ---- other readers and writers, other ways to start workers


def test_webdataset_reads_ours_and_we_read_its(folder, tmp_path):
    theirs = list(WebDataset(expand(folder), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == Shards(folder, size=16).train_set.keys
    with ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as sink:
        for sample in theirs:
            sink.write({k: v for k, v in sample.items() if not k.startswith("__") or k == "__key__"})
    ours = Shards(tmp_path / "{00000..00002}.tar", size=16)
    assert ours.train_set.captions() == Shards(folder, size=16).train_set.captions()


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_that_inherit_nothing_read_the_same(folder, start):
    wanted = first(Shards(folder, size=16, batch=4).train_dataloader(), 3)
    loader = Shards(folder, size=16, batch=4, workers=1).train_dataloader()
    loader.multiprocessing_context = start
    found = first(loader, 3)
    assert [b["key"] for b in found] == [b["key"] for b in wanted]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, wanted))


def test_an_error_ends_a_process_whose_workers_are_under_way():
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from torch.utils.data import DataLoader
from ldm.data.batch.samples import loading
batches = iter(DataLoader(range(8), **loading(1, again=True)))
next(batches)
raise ValueError("the end")
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 1 and "the end" in ended.stderr


def test_fewer_shards_than_ranks_and_workers_and_shards_of_one_sample(tmp_path):
    write_shards(samples(), tmp_path / "one", per_shard=1)
    write_shards(samples(), tmp_path / "all", per_shard=COUNT)
    for folder in ("one", "all"):
        data = Shards(tmp_path / folder, tmp_path / folder, size=16, batch=10, window=2, workers=3)
        data.share = lambda: (4, 5, 1)
        assert [len(b["key"]) for b in first(data.train_dataloader(), 4)] == [2] * 4
        assert [p for b in data.val_dataloader() for p in b["position"].tolist()] == [8, 9]


def test_arrays_go_straight_into_the_batch(tmp_path):
    arrays = [np.random.default_rng(i).normal(size=(3, 4)).astype(np.float16) for i in range(6)]
    write_shards([{"__key__": f"{i}", "m.npy": a} for i, a in enumerate(arrays)], tmp_path / "a")
    data = Shards(tmp_path / "a", fields={"moments": "m.npy"}, batch=2, workers=1)
    batch = next(iter(data.ordered("train", 6)))
    assert batch["moments"].dtype == torch.float16 and np.array_equal(batch["moments"].numpy(), arrays)
    assert data.on_after_batch_transfer(batch)["moments"].dtype == torch.float32
    write_shards([{"__key__": f"{i}", "m.npy": np.ones(2 + i)} for i in range(2)], tmp_path / "b")
    with pytest.raises(ValueError, match=r"arrays of shapes \[\(2,\), \(3,\)\], which share no batch"):
        next(iter(Shards(tmp_path / "b", fields={"moments": "m.npy"}).ordered("train", 2)))


def test_an_array_that_is_cut_off_after_the_index_was_made_is_left_out(tmp_path):
    write_shard(({"__key__": f"{i}", "m.npy": np.full(500, i)} for i in range(3)), tmp_path / "0.tar")
    data = Shards(tmp_path, fields={"moments": "m.npy"})
    offset, _ = data.train_set.index.table(0).span(2, "m.npy")
    os.truncate(tmp_path / "0.tar", offset + 300)
    batch = next(iter(data.ordered("train", 3)))
    assert batch["key"] == ["0", "1"] and "ends after 300 of 4128 bytes" in batch["bad"][0]


@QUIET
def test_the_stream_has_the_same_fields(folder):
    data = Streamed(folder, size=16, batch=4, shuffle=5)
    batch = first(data.train_dataloader(), 3)[2]
    whole = Shards(folder, size=16).train_set
    assert batch["position"].tolist() == [8, 9, 10, 11]
    for image, caption, key in zip(batch["image"], batch["caption"], batch["key"]):
        sample = whole[int(key)]
        assert torch.equal(image, sample["image"]) and caption == sample["caption"]
    ranks = []
    for rank in range(2):
        data.share = lambda rank=rank: (rank, 2, 1)
        ranks.append([(p, key) for b in first(data.train_dataloader(), 9) for p, key in zip(b["position"].tolist(), b["key"])])
    assert sorted(p for rank in ranks for p, _ in rank) == list(range(36)) and ranks[0] != ranks[1]
    assert [key for _, key in ranks[0]] != [key for _, key in ranks[1]]


@QUIET
@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_tells_sizes_and_crops_as_the_index_does(tmp_path, workers):
    write_shard(
        [{"__key__": "0", "jpg": picture(size=(64, 32)), "txt": "a", "json": {"original_width": 128}}], tmp_path / "0.tar"
    )
    options = {"size": 16, "batch": 2, "crop": "random", "flip": 0.5, "workers": workers}
    for ours, theirs in zip(*(first(kind(tmp_path, **options).train_dataloader(), 3) for kind in (Shards, Streamed))):
        assert ours.keys() == theirs.keys() and "crop_left" in ours
        for field, value in ours.items():
            assert torch.equal(value, theirs[field]) if isinstance(value, torch.Tensor) else value == theirs[field], field


@QUIET
def test_the_stream_ends_where_nothing_can_be_read(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be filled.* Member 'webp' of sample '\d+' in .*tar is missing"):
        first(Streamed(folder, fields={"image": "webp"}, size=16).train_dataloader(), 1)
    with pytest.raises(ValueError, match=r"data\.filters=.*data=stream has no index"):
        Streamed(folder, filters={"side": [1, None]})
    whole, bomb = (folder / "00000.tar").read_bytes(), tarfile.TarInfo("a.jpg")
    bomb.type, bomb.size = tarfile.GNUTYPE_SPARSE, 2**50
    for damaged in (whole[:1800], bytes(10240), gzip.compress(whole), bomb.tobuf(tarfile.GNU_FORMAT)):
        (folder / "00000.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"00000\.tar is damaged or no plain tar.*doctor.*data\.damaged=leave_out"):
            first(Streamed(folder, size=16, batch=4).train_dataloader(), 4)
        batches = first(Streamed(folder, size=16, batch=4, damaged="leave_out").train_dataloader(), 4)
        assert {key for b in batches for key in b["key"] if int(key) >= 6} == {f"{i:09d}" for i in range(6, 10)}
        assert any("00000.tar is damaged" in line for b in batches for line in b.get("bad", ()))


# ---- exact resume over processes


PROCESS = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from helpers.shards import train
if __name__ == "__main__":
    train(Path({shards!r}), Path(sys.argv[1]), *map(int, sys.argv[2:]))
"""


@pytest.fixture
def numbered(tmp_path):
    """21 pictures of 6 x 4 pixels, all different, in 5 shards."""
    pixels = np.random.default_rng(0).integers(0, 256, (21, 4, 6, 3), dtype=np.uint8)
    files = [io.BytesIO() for _ in pixels]
    for image, file in zip(pixels, files):
        Image.fromarray(image).save(file, "PNG")
    write_shards(({"__key__": f"{i:03d}", "jpg": file.getvalue()} for i, file in enumerate(files)), tmp_path / "numbered", 5)
    return tmp_path / "numbered"


def start(shards, out, *numbers):
    """The same as `train`, as a process of its own, in a group of its own."""
    path = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    script = out.parent / "train.py"
    script.write_text(PROCESS.format(path=path, shards=str(shards)))
    command = [sys.executable, "-W", "ignore", str(script), str(out), *map(str, numbers)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def run(shards, out, *numbers):
    process = start(shards, out, *numbers)
    errors = process.communicate(timeout=1800)[1]
    assert process.returncode == 0, errors[-3000:]


def train_forked(shards, out, *numbers):
    """The same as `train` in two processes, which need not import all anew."""
    codes, _ = together(lambda: train(shards, out, *numbers), torchrun(2), shards.parent)
    assert codes == [0, 0]


def weights(out):
    return torch.load(out / "end.pt", weights_only=True)


def seen(out):
    """step -> what was seen in it, sorted by position; the last to see a step tells."""
    found = {}
    for file in sorted((out / "seen").iterdir()):
        for line in file.read_text().splitlines():
            if line.endswith("]"):
                step, position, *what = json.loads(line)
                found.setdefault(step, {})[position] = what
    return {step: sorted(what.items()) for step, what in found.items()}


@QUIET
def test_resuming_with_another_number_of_processes_is_exact(numbered, tmp_path):
    """1 -> 2 gloo processes -> 1, other workers and micro-batches, over an epoch's end: all that is seen, noise and dropout."""
    train(numbered, tmp_path / "whole", 9)
    train(numbered, tmp_path / "legs", 2, accumulate=4)
    train_forked(numbered, tmp_path / "legs", 6, 2, 2, 1)
    train(numbered, tmp_path / "legs", 9, workers=1)
    lines = sorted(len(file.read_text().splitlines()) for file in (tmp_path / "legs" / "seen").iterdir())
    assert lines == [16, 16, 16, 24], "one process, two with half of each batch, one"
    whole = seen(tmp_path / "whole")
    assert whole == seen(tmp_path / "legs") and [len(step) for step in whole.values()] == [8] * 9
    torch.testing.assert_close(weights(tmp_path / "legs"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_resuming_from_two_processes_to_one_and_back_is_exact(numbered, tmp_path):
    run(numbered, tmp_path / "whole", 9)
    for numbers in ((2, 2), (6, 1, 4, 1), (9, 2, 2)):
        run(numbered, tmp_path / "legs", *numbers)
    assert seen(tmp_path / "legs") == seen(tmp_path / "whole")
    torch.testing.assert_close(weights(tmp_path / "legs"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_runs_end_with_the_very_same_weights(numbered, tmp_path, devices):
    """kill -9 of the whole process group at seeded moments, then once more to the end: bitwise an uninterrupted run."""
    run(numbered, tmp_path / "whole", 300, devices)
    random, killed = np.random.default_rng(devices), tmp_path / "killed"
    for _ in range(3):
        process = start(numbered, killed, 300, devices, 1, 1)
        before, deadline = len(list(killed.glob("seen/*"))), time.time() + 200
        while len(list(killed.glob("seen/*"))) == before and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(random.uniform(0.5, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    run(numbered, killed, 300, devices)
    assert all(torch.equal(weights(killed)[name], weight) for name, weight in weights(tmp_path / "whole").items())
    assert seen(killed) == seen(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_of_several_lengths_share_a_batch(tmp_path, workers):
    """Filled up with zeros to the longest of it, and their masks with False; whatever came before them."""
    lengths = [3, 3, 1, 5, 2, 4]
    rows = [{"t.npy": np.full((n, 4), n, np.float16), "m.npy": np.ones(n, bool)} for n in lengths]
    write_shards([{"__key__": str(i), "txt": "x", **row} for i, row in enumerate(rows)], tmp_path / "s")
    data = Shards(tmp_path / "s", fields={"tokens": "t.npy", "mask": "m.npy", "caption": "txt"}, batch=2, workers=workers)
    data.setup()
    for _ in range(2):
        for i, batch in enumerate(data.ordered("train", 2)):
            pair = lengths[2 * i : 2 * i + 2]
            assert batch["tokens"].shape == (2, max(pair), 4) and batch["mask"].sum(1).tolist() == pair
            assert batch["tokens"][..., 0].sum(1).tolist() == [n * n for n in pair]
    wide = [{"__key__": str(i), "t.npy": np.zeros((n, d), np.float16)} for i, (n, d) in enumerate([(3, 4), (2, 4), (2, 5)])]
    write_shards(wide, tmp_path / "w")
    data = Shards(tmp_path / "w", fields={"tokens": "t.npy"}, batch=3)
    data.setup()
    with pytest.raises(ValueError, match=r"arrays of shapes \[\(2, 5\), \(3, 4\)\], which share no batch"):
        data.rows("train", range(3))


def test_captions_that_a_tower_would_cut_are_left_out(tmp_path, capsys):
    """Of ends and three byte pairs, by CLIP's own tokenizer; another one's selection is another."""
    captions = ["a red fox", "a red fox jumps", "", "a red fox, and what it does"]
    write_shards([{"__key__": str(i), "txt": caption} for i, caption in enumerate(captions)], tmp_path / "s")
    rules = {"tokens": [None, 5], "caption_length": [1, None]}
    data = Shards(tmp_path / "s", fields={"caption": "txt"}, filters=rules, tokens=counter.Counter())
    assert data.train_set.keys == ["0"] and "tokens: [None, 5]" in capsys.readouterr().out
    letters = counter.Counter()
    letters.model, letters.rows = "letters", list
    other = Shards(tmp_path / "s", fields={"caption": "txt"}, filters={**rules, "tokens": [None, 15]}, tokens=letters)
    assert other.train_set.keys == ["0", "1"]
    with pytest.raises(ValueError, match=r"data\.filters\.tokens: data\.tokens, which counts them, is null.*Counter"):
        Shards(tmp_path / "s", fields={"caption": "txt"}, filters=rules).setup()
