"""Shards of edits for the emoji model, Unicode's own skin tones:  python -m benchmarks.tones

Writes runs/tones/{train,val}: a person or hand in yellow as source.png, the same in one of five tones as jpg, and as its
caption what to make of it, "dark skin tone"; the two splits share no person. Then python train.py experiment=emoji/edit.
"""

import hashlib
from pathlib import Path

from benchmarks.edges import file
from ldm.build import build
from ldm.compose import compose_config
from ldm.data.shard.write import write_shards
from ldm.files.picture import to_bytes

HOME = Path("runs/tones")
HELD_OUT = 0.1  # of the persons


def pairs(names):
    """Captions -> (source, target, edit) of each emoji that is there in yellow and in one tone."""
    places = {name: i for i, name in enumerate(names)}
    for name, place in places.items():
        person, colon, edit = name.partition(": ")
        if colon and edit.endswith("skin tone") and "," not in edit and person in places:
            yield person, places[person], place, edit


def samples(images, names, held_out):
    """What a shard holds of each sample of one split."""
    for person, source, target, edit in pairs(names):
        if (hashlib.sha256(person.encode()).digest()[0] < HELD_OUT * 256) is held_out:
            jpg = file(images[target], "JPEG", quality=95, subsampling=0)
            yield {"__key__": f"{target:09d}", "jpg": jpg, "source.png": file(images[source], "PNG"), "txt": edit}


if __name__ == "__main__":
    emoji = build(compose_config("train", ["data=emoji", "data.groups=all", "data.val_fraction=0"]).data)
    emoji.prepare_data()
    emoji.setup("fit")
    pictures, captions = [], []
    for batch in map(emoji.on_after_batch_transfer, emoji.ordered("train", 256)):
        pictures += list(to_bytes(batch["image"]))
        captions += batch["caption"]
    for split, held_out in (("train", False), ("val", True)):
        write_shards(samples(pictures, captions, held_out), HOME / split)
