"""A style taught to the emoji model by a LoRA, and what it cost:  python -m benchmarks.blueprint make|measure [RUN ...]

`make` writes 512 training pictures in blue duotone, captioned "... <blueprint>", into runs/blueprint/pictures and the base's own
drawings of these and 128 other captions into runs/blueprint/prior; then python train.py experiment=emoji/lora; `measure RUN` says
whether 128 captions of neither come out blue and in their own shape, and what the LoRA did to captions without the word.
"""

import io
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.utils import make_grid, save_image

from ldm.build import build, load_model
from ldm.compose import compose_config
from ldm.data.shard.write import write_shards
from ldm.drawing.generate import draw_all
from ldm.files.folder import write_json
from ldm.files.picture import to_bytes

HOME, BASE = Path("runs/blueprint"), "runs/quickstart/diffusion"
DARK, LIGHT = torch.tensor([10.0, 36.0, 99.0]) / 127.5 - 1, torch.tensor([235.0, 245.0, 255.0]) / 127.5 - 1
GREY = torch.tensor([0.299, 0.587, 0.114])
WORD = "<blueprint>"  # that the recipe teaches; beginning as "with", which leaves most captions what they are
INSTANCES, PRIOR, ASKED, FIRST = 512, 128, 128, 160
CLOSE = 0.1  # of [-1, 1]: the mean distance to the ramp below which a picture counts as blue; photographs have 0.3 and more


def duotone(images):
    """(N, 3, h, w) in [-1, 1] -> the same between DARK and LIGHT, by lightness."""
    level = (images.add(1).div(2) * GREY[:, None, None]).sum(1, keepdim=True)
    return DARK[:, None, None] + level * (LIGHT - DARK)[:, None, None]


def distance(images):
    """(N, 3, h, w) -> (N): how far the colours lie from the ramp, on average."""
    way = LIGHT - DARK
    place = ((images - DARK[:, None, None]) * way[:, None, None]).sum(1, keepdim=True) / (way @ way)
    return (images - DARK[:, None, None] - place * way[:, None, None]).norm(dim=1).mean((1, 2))


def emoji():
    """-> the training pictures (N, 3, 32, 32) and their captions."""
    data = build(compose_config("train", ["data=emoji"]).data)
    data.prepare_data()
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch) for batch in data.ordered("train", 256)]
    return torch.cat([batch["image"] for batch in batches]), [caption for batch in batches for caption in batch["caption"]]


def parts(captions):
    """-> which captions are taught in blue, drawn as the prior, and asked for."""
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    ends = (FIRST + ASKED, FIRST + ASKED + INSTANCES, FIRST + ASKED + INSTANCES + PRIOR)
    return order[ends[0] : ends[1]], order[ends[1] : ends[2]], order[FIRST : ends[0]]


def drawn(model, captions, seed=0):
    """-> (N, 3, 32, 32), as sample.py draws them."""
    config = compose_config("sample", ["model=x", "sampler=dpmpp", "sampler/grid=uniform", "guidance=cfg"])
    sampler, guidance = build(config.sampler), build(config.guidance)
    return draw_all(model, {"caption": captions}, sampler, guidance, range(seed, seed + len(captions)), (32, 32), 32)


def shards(images, captions, folder):
    """Writes pictures with their captions."""

    def samples():
        for i, (pixels, caption) in enumerate(zip(to_bytes(images), captions)):
            jpg = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(jpg, "JPEG", quality=95, subsampling=0)
            yield {"__key__": f"{i:09d}", "jpg": jpg.getvalue(), "txt": caption}

    write_shards(samples(), folder)


def make():
    """Writes both sets."""
    images, captions = emoji()
    taught, prior, _ = parts(captions)
    shards(duotone(images[taught]), [f"{captions[i]} {WORD}" for i in taught], HOME / "pictures")
    words = [captions[i] for i in (*taught, *prior)]  # the taught ones too, so that the word alone makes them blue
    shards(drawn(load_model(BASE), words, seed=1000), words, HOME / "prior")


def nearest(images, among):
    """(N, 3, h, w), (M, 3, h, w) -> (N): which one each is nearest to, pooled to 16 x 16."""
    a, b = (adaptive_avg_pool2d(x, 16).flatten(1) for x in (images, among))
    return torch.cdist(a, b).argmin(1)


def measure(run):
    """-> numbers by name, and a picture of strengths in a row."""
    images, captions = emoji()
    asked = parts(captions)[2]
    words, blue = [captions[i] for i in asked], [f"{captions[i]} {WORD}" for i in asked]
    wanted, found, rows = torch.tensor(asked), {}, []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        pictures = drawn(load_model(BASE, adapters=f"{run}:{strength}"), blue)
        found[f"distance at {strength}"] = distance(pictures).mean().item()
        rows.append(pictures[:8])
    model = load_model(run)
    plain = drawn(model, words)
    found["blue"] = (distance(pictures) < CLOSE).float().mean().item()
    found["shape"] = (nearest(pictures, duotone(images)) == wanted).float().mean().item()
    found["both"] = ((distance(pictures) < CLOSE) & (nearest(pictures, duotone(images)) == wanted)).float().mean().item()
    found["text match without the word"] = (nearest(plain, images) == wanted).float().mean().item()
    found["the base's"] = (nearest(drawn(load_model(BASE), words), images) == wanted).float().mean().item()
    grid = make_grid(torch.cat((*rows, plain[:8])).add(1).div(2).clamp(0, 1), nrow=8, padding=1, pad_value=1.0)
    save_image(grid, Path(run) / "blueprint.png")
    write_json(found, Path(run) / "blueprint.json")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        make()
    for name in sys.argv[2:]:
        print(name, {key: round(value, 3) for key, value in measure(name).items()}, flush=True)
