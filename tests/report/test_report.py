"""Reports: the very pixels, escaped text, merged curves, nothing to load from elsewhere, missing parts left out."""

import re
from base64 import b64decode
from io import BytesIO

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

from ldm.files.folder import write_text
from ldm.report.page import code, curves, page, picture, previews, read_curves, stacked_bar, table, tiles, wall
from ldm.report.quickstart import climbs, quickstart_page
from ldm.report.sweep import Setting, sweep_page

NASTY = "<b>&\"'<script>alert(1)</script>"
SECTIONS = ["In short", "Drawn from", "New prompts", "Held-out", "As the diffusion", "As the autoencoder", "Curves"]
SECTIONS += ["Measurements", "Seconds", "Hardware", "Go on"]


def pixels(text, which=0):
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', text)[which]
    return pil_to_tensor(Image.open(BytesIO(b64decode(data))))


def random_images(*shape):
    return torch.randint(0, 256, (*shape, 3, 8, 8), dtype=torch.uint8)


def log(run, version, text):
    path = run / "csv" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.fixture
def folder(tmp_path):
    """A quickstart of which only the report is missing."""
    for stage in ("clip", "autoencoder", "diffusion"):
        log(tmp_path / stage, 0, "epoch,step,train/loss,val/loss,val/psnr\n0,1,3.0,,\n0,2,,2.5,20\n0,2,2.0,,\n0,3,1.5,,\n")
    for stage in ("autoencoder", "diffusion"):
        (tmp_path / stage / "previews").mkdir()
        for step in range(100, 800, 100):
            images = random_images(16) / 255
            save_image(make_grid(images, nrow=8), tmp_path / stage / "previews" / f"{step:08d}.png")
    return tmp_path


METRICS = {
    "reconstruction_psnr": 25.0,
    "text_match_top1": 0.5,
    "clip_retrieval_top1": 0.8,
    "seconds": {"data": 1.0, "clip": 20.0, "diffusion": 39.0, "total": 60.0},
    "minutes": 8,
    "hardware": {"cpu": NASTY, "threads": 2, "gpu": None, "torch": "2.10"},
    "parameters": {"clip": 1234567},
    "steps": {"clip": 150},
    "commit": "abc1234",
}


def shown(count=3):
    images = {k: random_images(count) / 127.5 - 1 for k in ("held_out", "reconstructed", "real", "drawn", "samples")}
    matched = [i % 2 == 0 for i in range(count)]
    return images | {"captions": [NASTY] * count, "matched": matched, "prompts": [NASTY] * count}


def test_pictures_hold_the_very_pixels():
    images = random_images(5)
    assert torch.equal(pixels(picture(images[0] / 127.5 - 1)), images[0])
    grid = pixels(picture(images[:4] / 127.5 - 1, columns=2, zoom=3))
    assert torch.equal(grid, make_grid(images[:4], nrow=2, padding=0))
    assert 'width="48" height="48"' in picture(images[:4] / 127.5 - 1, columns=2, zoom=3)
    pairs = random_images(2, 2)
    assert torch.equal(pixels(wall(pairs / 127.5 - 1, ["a", "b"]), 1), torch.cat(list(pairs[1]), dim=1))


def test_pictures_clamp_what_is_out_of_range():
    assert pixels(picture(torch.full((3, 2, 2), 1.7))).unique().tolist() == [255]


def test_as_many_captions_as_pictures():
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="2 pictures and 3 captions"):
        wall(images, ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 pictures and 1 marks"):
        wall(images, ["a", "b"], [True])


def test_text_is_escaped_everywhere():
    one = torch.zeros(1, 3, 4, 4)
    parts = [wall(one, [NASTY], [True]), table([NASTY], [[NASTY]]), code([NASTY]), picture(one, alt=NASTY)]
    parts += [tiles([(NASTY, NASTY, NASTY, None)]), stacked_bar({NASTY: 1.0}), curves({NASTY: ([1], [1])}, NASTY, NASTY)]
    text = page(NASTY, NASTY, [(NASTY, part) for part in parts])
    assert "<script" not in text and "<b>&" not in text and "alert(1)&lt;/script&gt;" in text
    assert not re.search(r'alt="[^"]*[<>]', text)


def test_curves_merge_the_versions_of_a_resumed_run(tmp_path):
    log(tmp_path, 2, "step,train/loss\n10,0.25\n")
    log(tmp_path, 0, "step,train/loss\n1,3.0\n2,2.0\n10,9.0\n")
    log(tmp_path, 10, "epoch,step,train/loss,val/loss\n0,2,1.5,\n0,3,,0.5\n0,")  # the last row was cut off
    assert read_curves(tmp_path) == {"train/loss": ([1.0, 2.0, 10.0], [3.0, 1.5, 0.25]), "val/loss": ([3.0], [0.5])}
    assert read_curves(tmp_path / "none") == {} and curves({}, "step") == ""


def test_curves_are_transparent_svg():
    drawn = curves({"loss": ([1, 2, 3], [1.0, float("nan"), 0.1])}, "step", "loss", log_y=True)
    assert drawn.startswith("<svg") and drawn.rstrip().endswith("</svg>")
    assert "#ffffff" not in drawn and "#000000" not in drawn


def test_the_quickstart_page_is_self_contained_and_whole(folder):
    write_text(quickstart_page(folder, METRICS, shown()), folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    loaded = re.findall(r'\b(?:src|href|data|action|poster)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import', text)
    assert loaded and all((a or b).strip("'\"").startswith(("data:", "#")) for a, b in loaded)
    assert "<script" not in text and "<link" not in text
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert len(heads) == len(SECTIONS) and all(h.startswith(s) for h, s in zip(heads, SECTIONS))
    assert "bar 24.0, aim 26.0: the bar is reached" in text and "bar 0.60, aim 0.90: below the bar" in text
    assert "2 of 3" in text and text.count('title="match"') == 2 and text.count('title="no match"') == 1
    assert text.count("<svg") == 6 and "step 100" in text and "step 700" in text and "1,234,567" in text
    assert "prompt=&#x27;[red apple,fox]&#x27;" in text and "None" not in text


def test_missing_parts_are_left_out(tmp_path):
    text = quickstart_page(tmp_path, {}, {})
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Go on from here"]
    text = quickstart_page(tmp_path, METRICS, {k: v for k, v in shown().items() if k not in ("drawn", "samples")})
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert not any(h.startswith(("Drawn", "New", "As the", "Curves")) for h in heads) and len(heads) == 6


def test_a_click_enlarges_a_picture_and_chooses_a_command_without_a_script():
    text = page("t", "l", [("a", picture(torch.zeros(3, 2, 2))), ("b", code(["# why", "make it"])), ("none", "")])
    assert "<script" not in text and "onclick" not in text
    assert '<img tabindex="0"' in text and "img[tabindex]:focus" in text
    assert '<span class="soft"># why</span><code>make it</code>' in text and "user-select: all" in text
    assert re.findall(r'<a href="#(.*?)">(.)</a>', text) == [("part-0", "a"), ("part-1", "b")]
    assert re.findall(r'<section id="(.*?)">', text) == ["part-0", "part-1"]


@pytest.mark.parametrize(
    "val, train, said",
    [
        ([2.0, 1.0, 1.5], [3.0, 0.1], r"lowest at step 20 \(1\) and 1\.5 at the end: .* by heart"),
        ([2.0, 1.0, 1.5], [3.0, 4.0], "has gone astray"),
        ([2.0, 1.0, 1.01], [3.0, 0.1], None),
        ([], [3.0, 0.1], None),
    ],
)
def test_a_validation_loss_that_climbs_is_explained(val, train, said):
    found = {"val/loss": ([10.0, 20.0, 30.0][: len(val)], val), "train/loss": ([1.0, 2.0], train)}
    lines = climbs(found)
    assert len(lines) == (said is not None) and (said is None or re.search(said, lines[0]))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_previews_show_the_first_and_the_last_and_none_twice(tmp_path, count):
    (tmp_path / "previews").mkdir()
    for step in range(count):
        Image.new("RGB", (2, 2)).save(tmp_path / "previews" / f"{step:08d}.png")
    steps = [int(step) for step in re.findall(r"<figcaption>step (\d+)", previews(tmp_path))]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == count - 1 and len(steps) == min(count, 4)


def test_a_sweep_says_how_to_draw_as_its_best_setting():
    def setting(scale, value):
        entry = {"value": value, "error": 0.1, "protocol": {"count": 8}}
        return Setting([f"guidance.scale={scale}", "sampler={_target_: x}"], {"text_match_top1": entry})

    said = sweep_page([setting(1, 0.2), setting(3, 0.9), setting(9, 0.4)], [], "runs/a b")
    assert "python sample.py model=&#x27;runs/a b&#x27; guidance.scale=3 sampler=&#x27;{_target_: x}&#x27;" in said
    assert "ldm draw model=&#x27;runs/a b&#x27;" in said and "ldm draw" not in sweep_page([setting(1, 0.2)], [])
