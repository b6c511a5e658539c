"""Shards of the emoji with their edges, for a ControlNet to learn from:  python -m benchmarks.edges [measure RUN ...]

Without words it writes runs/edges/{train,val} with a member edges.png, white on black, beside each picture and its caption; then
python train.py experiment=emoji/controlnet run_id=follow. `measure RUN` says how well the edges of held-out pictures are kept
(metric=edge_f1's F1), told the right edges, another picture's, or none, and puts hints and answers into RUN/edges.png.
"""

import io
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid, save_image

from ldm.build import build, load_model
from ldm.compose import compose_config
from ldm.data.shard.write import write_shards
from ldm.drawing.generate import draw_all
from ldm.edges import drawn, edges
from ldm.evaluation.pictures import another, on_grid
from ldm.files.folder import write_json
from ldm.files.picture import to_bytes
from ldm.metric.edge_f1 import EdgeF1

HOME, BASE = Path("runs/edges"), "runs/quickstart/diffusion"


def file(pixels, ending, **settings):
    """uint8 (3, h, w) -> the bytes of a picture file."""
    held = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(held, ending, **settings)
    return held.getvalue()


def samples(data, split):
    """What a shard holds of each sample."""
    for batch in map(data.on_after_batch_transfer, data.ordered(split, 256)):
        hints = to_bytes(drawn(edges(batch["image"])))
        for i, hint, caption in zip(range(len(hints)), hints, batch["caption"]):
            jpg = file(to_bytes(batch["image"][i]), "JPEG", quality=95, subsampling=0)
            yield {"__key__": f"{int(batch['position'][i]):09d}", "jpg": jpg, "edges.png": file(hint, "PNG"), "txt": caption}


def emoji():
    """-> the data module, read."""
    data = build(compose_config("train", ["data=emoji"]).data)
    data.prepare_data()
    data.setup("fit")
    return data


def pictures(model, scale, captions, hints, strength=1.0):
    """-> (N, 3, 32, 32), as sample.py draws them, picture i from seed i."""
    config = compose_config(
        "sample", ["model=x", "sampler=dpmpp", "sampler/grid=uniform", "guidance=cfg", f"guidance.scale={scale}"]
    )
    ask = {"caption": captions, "edges": hints, "edges_strength": torch.full((len(hints),), strength)}
    sampler, guide = build(config.sampler), build(config.guidance)
    return on_grid(draw_all(model, ask, sampler, guide, range(len(hints)), (32, 32), 32))


def measure(run):
    """-> F1 by name, each a mean over the held-out pictures and its standard error; and a picture of hints and answers."""
    data = emoji()
    batches = [data.on_after_batch_transfer(batch) for batch in data.ordered("val", 256)]
    images, captions = torch.cat([b["image"] for b in batches]), [caption for b in batches for caption in b["caption"]]
    hints = drawn(edges(images))
    others = hints[[another(i, len(hints), 0) for i in range(len(hints))]]
    model, guessing = load_model(run), load_model(BASE, adapters=f"edges={run}:1:guess")
    shown, found = [hints, images], {}

    def put(name, images):
        f1 = EdgeF1().look(images, {"edges": hints, "image": images})["f1"].double()
        found[name] = [f1.mean().item(), f1.std().item() / len(f1) ** 0.5]
        print(name, *(f"{value:.3f}" for value in found[name]), flush=True)
        return images

    with torch.no_grad():
        put("the autoencoder's", on_grid(model.autoencoder.decode(model.autoencoder.encode(images).mean).clamp(-1, 1)))
    for scale, strengths in ((1, (0.0, 1.0)), (2, (0.0, 0.5, 1.0))):
        put(f"guidance {scale}, shuffled", pictures(model, scale, captions, others))
        for strength in strengths:
            answer = put(f"guidance {scale}, strength {strength}", pictures(model, scale, captions, hints, strength))
            shown += [answer] if scale > 1 else []
    put("guess", pictures(guessing, 2, captions, hints))
    put("guess, shuffled", pictures(guessing, 2, captions, others))
    empty = [""] * len(captions)
    shown.append(put("guess, no caption", pictures(guessing, 2, empty, hints)))
    put("guess, no caption, shuffled", pictures(guessing, 2, empty, others))
    rows = torch.cat([row[::8][:8] for row in shown]).add(1).div(2).clamp(0, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    save_image(make_grid(rows, nrow=8, padding=2, pad_value=1.0), Path(run) / "edges.png")
    write_json(found, Path(run) / "edges.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["measure"]:
        for name in sys.argv[2:]:
            measure(name)
    else:
        both = emoji()
        for split in ("train", "val"):
            write_shards(samples(both, split), HOME / split)
