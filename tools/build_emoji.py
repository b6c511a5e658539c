"""Builds the emoji data set that ships with the project, from two Debian packages; users never need it.

    apt-get install fonts-noto-color-emoji unicode-data libraqm0
    python tools/build_emoji.py

Writes ldm/data/assets/: `emoji.webp` (one RGBA atlas, 64 px a picture, row-major), `emoji.csv` (row i tells of picture i:
code points, name, group, subgroup), the two licences, and a README.md that says how they were made.
"""

from __future__ import annotations

import csv
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
DOC = Path("/usr/share/doc")
OUT = Path(__file__).resolve().parents[1] / "ldm" / "data" / "assets"

FONT_SIZE = 109  # the one size of the font's bitmaps, which are 136 x 128
GLYPH = 136
PICTURE = 64
COLUMNS = 64
STEP = 5  # of the colours; divides 255, so that white stays white
LIMIT = 8_000_000  # bytes, all assets together


class Emoji(NamedTuple):
    codepoints: str
    name: str
    group: str
    subgroup: str

    @property
    def text(self) -> str:
        return "".join(chr(int(point, 16)) for point in self.codepoints.split())


def read_names(path: Path) -> list[Emoji]:
    """Every fully-qualified sequence of Unicode's emoji-test.txt, in its order."""
    group = subgroup = ""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif match := re.match(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (.+)", line):
            found.append(Emoji(match[1], match[2].strip(), group, subgroup))
    return found


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The sequence's glyph, RGBA, 64 x 64 and centred; None where the font has no single glyph for it."""
    if not 0 < font.getlength(text) < 1.5 * GLYPH:
        return None
    glyph = Image.new("RGBA", (2 * GLYPH, 2 * GLYPH))
    ImageDraw.Draw(glyph).text((GLYPH // 2, GLYPH // 2), text, font=font, embedded_color=True)
    box = glyph.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) > GLYPH:
        return None
    drawn = glyph.crop(box)
    square = Image.new("RGBA", (GLYPH, GLYPH))
    square.paste(drawn, ((GLYPH - drawn.width) // 2, (GLYPH - drawn.height) // 2))
    return square.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)


def tile(pictures: list[Image.Image]) -> Image.Image:
    """Lays the pictures out row-major, 64 a row."""
    rows = -(-len(pictures) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * PICTURE, rows * PICTURE))
    for i, picture in enumerate(pictures):
        atlas.paste(picture, (i % COLUMNS * PICTURE, i // COLUMNS * PICTURE))
    return atlas


def save(atlas: Image.Image, path: Path) -> None:
    """Lossless WebP of colours rounded to multiples of STEP, alpha exact.

    Exact colours would take 13 MB. Lossy WebP of the same size has half the resolution in colour, and is 16 dB further off.
    """
    pixels = np.asarray(atlas).astype(np.int64)
    pixels[..., :3] = (pixels[..., :3] + STEP // 2) // STEP * STEP
    pixels[pixels[..., 3] == 0] = 0
    Image.fromarray(pixels.astype(np.uint8)).save(path, lossless=True, quality=100, method=6)


def licences() -> dict[str, str]:
    """The licence texts of font and names as Debian ships them."""
    font = (DOC / "fonts-noto-color-emoji" / "copyright").read_text(encoding="utf-8")
    text = font.split("License:   SIL-1.1\n This Font")[1]
    text = re.sub(r"^ ", "", "This Font" + text, flags=re.M)
    text = re.sub(r"^\.$", "", text, flags=re.M)
    head = "Noto Color Emoji, https://github.com/googlefonts/noto-emoji\nCopyright 2013-2017 Google Inc.\n\n"
    unicode = (DOC / "unicode-data" / "copyright").read_text(encoding="utf-8", errors="replace")
    return {"LICENSE-NotoColorEmoji": head + text.rstrip() + "\n", "LICENSE-Unicode": unicode.rstrip() + "\n"}


def version(package: str) -> str:
    return subprocess.run(["dpkg-query", "-W", "-f", "${Version}", package], check=True, capture_output=True, text=True).stdout


def readme(count: int, skipped: int) -> str:
    columns = f"{COLUMNS} a row, row-major"
    return f"""# Emoji

{count} pictures of Noto Color Emoji with Unicode's names, the data set that ships with the project (`data=emoji`).

- `emoji.webp`: one RGBA atlas, {PICTURE} px a picture, {columns}; lossless, of colours rounded to multiples of {STEP}
- `emoji.csv`: row i tells of picture i: code points, name, group, subgroup
- `LICENSE-NotoColorEmoji`: the pictures (SIL Open Font License 1.1); `LICENSE-Unicode`: the names and groups

Built by `python tools/build_emoji.py` from Debian's fonts-noto-color-emoji {version("fonts-noto-color-emoji")} and
unicode-data {version("unicode-data")} with Pillow {PIL.__version__} (raqm {features.version("raqm")}): every fully-qualified
sequence of `emoji-test.txt`, drawn at size {FONT_SIZE}, centred on {GLYPH} x {GLYPH}, reduced to {PICTURE} x {PICTURE} (Lanczos).
{skipped} sequences that the font cannot draw as one glyph were left out.
"""


def main() -> None:
    if not features.check("raqm"):
        raise SystemExit("Pillow finds no raqm library, without which joined sequences fall apart: apt-get install libraqm0")
    font = ImageFont.truetype(str(FONT), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    names = read_names(NAMES)
    drawn = [(emoji, picture) for emoji in names if (picture := render(emoji.text, font)) is not None]
    OUT.mkdir(parents=True, exist_ok=True)
    save(tile([picture for _, picture in drawn]), OUT / "emoji.webp")
    with (OUT / "emoji.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Emoji._fields)
        writer.writerows(emoji for emoji, _ in drawn)
    for name, text in licences().items():
        (OUT / name).write_text(text, encoding="utf-8")
    (OUT / "README.md").write_text(readme(len(drawn), len(names) - len(drawn)), encoding="utf-8")
    size = sum(path.stat().st_size for path in OUT.iterdir())
    print(f"{len(drawn)} pictures of {len(names)} sequences, {size} bytes in {OUT}")
    if size > LIMIT:
        raise SystemExit(f"That is more than {LIMIT} bytes; raise STEP.")


if __name__ == "__main__":
    main()
