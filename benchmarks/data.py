"""Samples per CPU-second, beside WebDataset's, and an epoch of 400 million samples:  python -m benchmarks.data

One process, one thread, files in the page cache, process time, medians of interleaved rounds. The peer is WebDataset's
decode("pil") with torchvision's resize, crop and PILToTensor, and WebDataset's decode() of .npy, both batched by 32.
"""

import argparse
import io
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torchvision.transforms import v2
from webdataset import WebDataset

from ldm.data.order.order import Batches, Steps, Stream
from ldm.data.shard.decode import View, decode
from ldm.data.shard.index import Index
from ldm.data.shard.record import describe
from ldm.data.shard.selection import Selection
from ldm.data.shard.source import expand
from ldm.data.shard.write import write_shard
from ldm.data.shards import Shards
from ldm.files.picture import picture_size

BATCH = 32


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        index(Path(folder) / "index")
        colours()
        for side, size in (((512, 512), 512), ((512, 512), 256), ((1024, 768), 512)):
            pictures(Path(folder) / f"{side[0]}-{size}", side, size, asked)
        latents(Path(folder) / "latents", {"moments.npy": (8, 64, 64)}, asked)
        latents(Path(folder) / "embeddings", {"moments.npy": (8, 64, 64), "text.npy": (77, 1024)}, asked)
    scale()


def race(name, ours, theirs, rounds):
    """Runs both, one after the other, `rounds` times."""
    seconds = {ours: [], theirs: []}
    for _ in range(rounds + 1):
        for run in seconds:
            start = time.process_time()
            count = run()
            seconds[run].append((time.process_time() - start) / count)
    ours, theirs = (1 / statistics.median(times[1:]) for times in seconds.values())
    print(f"{name:32s} ours {ours:9,.0f}/s  webdataset {theirs:9,.0f}/s  {ours / theirs:5.1f} x", flush=True)


def photograph(size, seed):
    """Smooth shapes and some grain, as a JPEG of quality 90."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def pictures(folder, side, size, asked):
    """Decoded, resized, cropped, batched; and how far the pixels differ."""
    files = [photograph(side, seed) for seed in range(16)]
    write_shard(({"__key__": f"{i:05d}", "jpg": files[i % 16], "txt": "a"} for i in range(asked.samples)), folder / "00000.tar")
    data = Shards(folder, size=size, batch=BATCH)
    shape = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])

    def ours():
        return sum(len(batch["key"]) for batch in data.ordered("train", BATCH))

    def theirs():
        urls = expand(folder)
        pipeline = WebDataset(urls, shardshuffle=False).decode("pil").map_dict(jpg=shape).to_tuple("jpg", "txt").batched(BATCH)
        return sum(len(images) for images, _ in pipeline)

    mine = next(iter(data.ordered("train", 1)))["image"][0].int()
    peer = shape(Image.open(io.BytesIO(files[0]))).int()
    race(f"{side[0]} x {side[1]} JPEG to {size}", ours, theirs, asked.rounds)
    print(f"{'':32s} pixels differ by {(mine - peer).abs().float().mean():.4f} on average, {(mine - peer).abs().max()} at most")


def colours(side=1024, size=256, rounds=15):
    """What reading a size costs, and a colour profile: none, sRGB's own, and one of other primaries."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    foreign = plain.replace(b"rXYZ", b"xXYZ").replace(b"gXYZ", b"rXYZ").replace(b"xXYZ", b"gXYZ")  # red and green changed
    image = Image.open(io.BytesIO(photograph((side, side), 0)))
    for form, member in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        files = []
        for profile in (None, plain, foreign):
            files.append(io.BytesIO())
            image.save(files[-1], form, **({"icc_profile": profile} if profile else {}))
        seconds = [[] for _ in range(4)]
        for _ in range(rounds + 1):
            for times, file in zip(seconds, [*files, files[0]]):
                start = time.process_time()
                picture_size(file.getvalue()) if times is seconds[3] else decode(member, file.getvalue(), View(size, size))
                times.append(time.process_time() - start)
        none, own, other, header = (1e3 * statistics.median(times[1:]) for times in seconds)
        print(
            f"{f'{side} x {side} {form} to {size}':32s} {none:.1f} ms without a colour profile, {own:.1f} with sRGB's, "
            f"{other:.1f} with another; its size alone {header:.2f} ms",
            flush=True,
        )


def latents(folder, shapes, asked):
    """Arrays of float16 and a caption."""
    rng, count = np.random.default_rng(0), 16 * asked.samples
    arrays = [{name: rng.normal(size=shape).astype("f2") for name, shape in shapes.items()} for _ in range(8)]
    write_shard(({"__key__": f"{i:05d}", "txt": "a red fox", **arrays[i % 8]} for i in range(count)), folder / "00000.tar")
    data = Shards(folder, fields={"caption": "txt"} | {name.split(".")[0]: name for name in shapes}, batch=BATCH)

    def ours():
        return sum(len(batch["key"]) for batch in data.ordered("train", BATCH))

    def theirs():
        pipeline = WebDataset(expand(folder), shardshuffle=False).decode().to_tuple(*shapes, "txt").batched(BATCH)
        return sum(len(torch.as_tensor(moments)) for moments, *_ in pipeline)

    race(f"{', '.join(shapes)}, {sum(a.nbytes for a in arrays[0].values()) / 1000:.0f} kB", ours, theirs, asked.rounds)


def index(folder):
    """Headers, records and captions of 10,000 samples."""
    record = {"caption": "a", "width": 256, "height": 256, "original_width": 640, "original_height": 480, "sha256": "ab" * 32}
    rows = ({"__key__": f"{i:09d}", "jpg": bytes(2000), "txt": "a red fox", "json": record} for i in range(10_000))
    write_shard(rows, folder / "00000.tar")
    start = time.process_time()
    describe(folder / "00000.tar")
    print(f"{'index of 10,000 samples':32s} {time.process_time() - start:.2f} s of one core", flush=True)
    made = Index(expand(folder))
    size = (made.folder / "00000.tar.arrow").stat().st_size
    print(f"{'':32s} {size / 10_000:.0f} bytes a sample on disk, {size * 40_000 / 1e9:.0f} GB for 400 million")


def scale(shards=40_000, per_shard=10_000, batch=8192, world=1024, window=16):
    """The order of 400 million samples, sought on a rank out of 1,024."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for lanes in (1, 128):
        stream = Stream(Selection(np.full(shards, per_shard)), 0, window, lanes)
        steps = Steps([stream], [(512, 512)], [shards * per_shard], batch, 0)
        start = time.process_time()
        first = next(iter(Batches(steps, world - 1, world, start=steps.first_step(1) - 3)))
        sought = time.process_time() - start
        loader = iter(Batches(steps, 0, world, start=1000))
        start, taken = time.process_time(), [next(loader) for _ in range(50)]
        each = (time.process_time() - start) / 50
        read = len({place.shard for places in taken for place in places})
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"{f'400 million samples, lanes={lanes}':32s} sought {sought:.2f} s, {each * 1e3:.1f} ms a step of {batch}, "
            f"{peak:.0f} MB more; a rank's {len(first) * 50} samples of 50 steps lie in {read} shards",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
