"""Shards of the emoji with their edges, for a ControlNet to learn from:  python benchmarks/edges.py

Writes runs/edges/{train,val} with a member edges.png, white on black, beside each picture and its caption; then
python train.py experiment=emoji/controlnet run_id=edges, and python evaluate.py as the experiment says.
"""

import io
from pathlib import Path

from PIL import Image

from ldm.build import build
from ldm.compose import compose_config
from ldm.data.shard.write import write_shards
from ldm.edges import drawn, edges
from ldm.files.picture import to_bytes

HOME = Path("runs/edges")


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


if __name__ == "__main__":
    emoji = build(compose_config("train", ["data=emoji"]).data)
    emoji.prepare_data()
    emoji.setup("fit")
    for split in ("train", "val"):
        write_shards(samples(emoji, split), HOME / split)
