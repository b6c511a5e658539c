"""What a few pictures teach the emoji model:  python -m benchmarks.subjects make | words | frog RUN ...

`make` writes 16 emoji, one to a folder, 8 that the model was trained on and 8 held out, four pictures of a frog that is magenta,
and the captions of class pictures, into runs/subjects; the class pictures are drawn by the `ldm prior` command that it prints.
`words` trains a word on each of the 16 emoji, by experiment=emoji/textual_inversion, and asks whether it draws that picture.
`frog RUN ...` asks of runs of experiment=emoji/dreambooth whether "sks frog" is the magenta one, "frog" still the green one, and
what became of 128 other captions.
"""

import shlex
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, interpolate
from torchvision.utils import make_grid, save_image

from benchmarks.blueprint import BASE, drawn, emoji, nearest
from ldm.build import build, load_model
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.files.folder import write_json, write_text
from ldm.files.picture import to_bytes
from ldm.tower.clip import load_clip, see

HOME = Path("runs/subjects")
WORDS, SEEDS, OTHERS, PRIOR = 8, 32, 128, 64
CLIP = "local-dir:runs/quickstart/clip"


def held_out():
    """-> validation pictures and captions."""
    data = build(compose_config("train", ["data=emoji"]).data)
    data.prepare_data()
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch) for batch in data.ordered("val", 256)]
    return torch.cat([batch["image"] for batch in batches]), [caption for batch in batches for caption in batch["caption"]]


def some(count, among, seed):
    return torch.randperm(among, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def chosen():
    """-> 16 names of folders with their picture and caption: `seen0` ..., `new0` ..."""
    found = {}
    for kind, (images, captions) in {"seen": emoji(), "new": held_out()}.items():
        for i, number in enumerate(some(WORDS, len(captions), 1)):
            found[f"{kind}{i}"] = images[number], captions[number]
    return found


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(image[None])[0].permute(1, 2, 0).numpy()).save(path)


def magenta(image):
    """The frog with green and blue in one another's place, and what was green in red as well: (3, h, w) -> the same."""
    red, green, blue = image
    return torch.stack((torch.maximum(red, green), torch.minimum(red, blue), torch.maximum(green, blue)))


def instances(frog):
    """(3, 32, 32) -> the magenta one: as it is, mirrored, moved and smaller."""
    one = magenta(frog)
    small = torch.ones_like(one)
    small[:, 4:28, 4:28] = interpolate(one[None], 24, mode="area")[0]
    moved = torch.ones_like(one)
    moved[:, 2:, 2:] = one[:, :-2, :-2]
    return [one, one.flip(2), moved, small]


def make():
    """Writes the folders, and says how the class pictures are drawn."""
    for name, (image, _) in chosen().items():
        save(image, HOME / name / "0.png")
    images, captions = emoji()
    for i, picture in enumerate(instances(images[captions.index("frog")])):
        save(picture, HOME / "frog" / f"{i}.png")
    others = [captions[i] for i in some(PRIOR, len(captions), 2) if captions[i] != "frog"]
    write_text("\n".join(word for other in others for word in ("frog", other)) + "\n", HOME / "prior.txt")
    words = ["python", "-m", "ldm", "prior", f"model={BASE}", f"prompts={HOME}/prior.txt"]
    print(shlex.join([*words, f"count={2 * len(others)}", f"out={HOME}/prior"]))


def words(seed=0):
    """-> numbers by name, of a word trained on each emoji."""
    base, clip = load_model(BASE), load_clip(CLIP, None, "metric")
    images, captions = emoji()
    before = drawn(base, captions[:SEEDS])
    rows, found = [], {"seen": [], "begin": [], "word's cosine": [], "name's cosine": [], "begin's cosine": [], "unspoken": []}

    def likeness(pictures, image):
        with torch.no_grad():
            a, b = (clip.encode_image(see(clip.visual, x)) for x in (pictures, image[None]))
        return cosine_similarity(a, b).mean().item()

    for name, (image, caption) in chosen().items():
        run = Path("runs") / "words" / f"{name}-{seed}"
        options = ["experiment=emoji/textual_inversion", f"data.pictures={HOME / name}", f"folder={run}", f"seed={seed}"]
        train(compose_config("train", [*options, "callback=[checkpoint]", "logger=[]"]))
        model = load_model(run)
        pictures, plain = (drawn(m, [word] * SEEDS) for m, word in ((model, "<it>"), (base, "face")))
        if name.startswith("seen"):
            place = captions.index(caption)
            found["seen"].append((nearest(pictures, images) == place).float().mean().item())
            found["begin"].append((nearest(plain, images) == place).float().mean().item())
        else:
            for what, those in {"word": pictures, "name": drawn(base, [caption] * SEEDS), "begin": plain}.items():
                found[f"{what}'s cosine"].append(likeness(those, image))
        if not rows or name == "new0":
            found["unspoken"].append(float(torch.equal(to_bytes(drawn(model, captions[:SEEDS])), to_bytes(before))))
        rows.append(torch.cat((image[None], pictures[:7])))
        print(name, caption, {key: round(values[-1], 3) for key, values in found.items() if values}, flush=True)
    picture(torch.cat(rows), HOME / "words.png")
    told = {key: {"mean": sum(v) / len(v), "each": v} for key, v in found.items()}
    write_json(told, HOME / f"words-{seed}.json")
    return {key: round(value["mean"], 3) for key, value in told.items()}


def frog(run):
    """-> numbers by name, of one run."""
    images, captions = emoji()
    green, others = captions.index("frog"), some(OTHERS, len(captions), 3)
    own = torch.stack(instances(images[green]))
    among = torch.cat((images, own))
    model = load_model(run)
    subject, kind = (drawn(model, [word] * SEEDS) for word in ("sks frog", "frog"))
    told = drawn(model, [captions[i] for i in others])
    found = {"subject": (nearest(subject, among) >= len(images)).float().mean().item()}
    found["class"] = (nearest(kind, among) == green).float().mean().item()
    found["class is magenta"] = (nearest(kind, among) >= len(images)).float().mean().item()
    found["others"] = (nearest(told, among) == torch.tensor(others)).float().mean().item()
    picture(torch.cat((own, own, subject[:8], kind[:8], told[:8])), Path(run) / "subject.png")
    write_json(found, Path(run) / "subject.json")
    return found


def picture(images, path):
    """(N, 3, h, w) in [-1, 1] -> rows of 8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(images.add(1).div(2).clamp(0, 1), nrow=8, padding=1, pad_value=1.0), path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        make()
    if sys.argv[1] == "words":
        print(words(int(sys.argv[2]) if len(sys.argv) > 2 else 0))
    for name in sys.argv[2:] if sys.argv[1] == "frog" else []:
        print(name, {key: round(value, 3) for key, value in frog(name).items()}, flush=True)
