"""Pictures and lines in files: which they are, in which order, how they stand, and what colours they have."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ldm.command import pack
from ldm.data.shard.decode import View, decode
from ldm.files.lines import read_lines
from ldm.files.picture import (
    MAX_PIXELS,
    colour_transform,
    files_in,
    from_bytes,
    natural,
    open_picture,
    picture_size,
    pictures_in,
    to_bytes,
    to_grey,
    to_srgb,
    upright,
)

D50 = (0.9642, 1, 0.8249)
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])  # RGB -> XYZ, D50
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_GAMMA = 563 / 256
PLAIN = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(space, matrix=None, gamma=ADOBE_GAMMA):
    """A colour profile in bytes: three primaries, or a grey, and a gamma (ICC.1:2001, 6.1 to 6.5)."""
    words = {b"cprt": b"text\0\0\0\0none\0\0\0\0", b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"a\0" + b"\0" * 78}
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    words |= {b"wtpt": _xyz(D50)} | ({b"kTRC": curve} if matrix is None else {})
    for name, column in zip(b"rgb", [] if matrix is None else matrix.T):
        words |= {bytes([name]) + b"XYZ": _xyz(column), bytes([name]) + b"TRC": curve}
    begin, table, body = 132 + 12 * len(words), b"", b""
    for name, value in words.items():
        table += name + struct.pack(">II", begin + len(body), len(value))
        body += value
    head = struct.pack(">I4xI4s4s4s12x4s28x", begin + len(body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp") + _xyz(D50)[8:]
    return head + bytes(48) + struct.pack(">I", len(words)) + table + body


def _xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


def encoded(linear):
    """sRGB's curve (IEC 61966-2-1), 0 to 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def flat(colour, mode="RGB", size=(8, 8)):
    return Image.new(mode, size, colour)


# ---- colour


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("colour", [(180, 90, 80), (20, 200, 30), (128, 128, 128)])
def test_adobe_rgb_becomes_srgb(form, colour):
    """x -> x^gamma -> XYZ -> sRGB's primaries -> sRGB's curve, clipped."""
    wanted = encoded(np.linalg.inv(SRGB) @ ADOBE @ (np.array(colour) / 255) ** ADOBE_GAMMA)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    data = saved(flat(colour), form, icc_profile=profile(b"RGB ", ADOBE), **options)
    found = np.array(to_srgb(open_picture(data)))[4, 4]
    assert np.abs(found - wanted).max() <= (3 if form == "JPEG" else 1.5)
    if form != "TIFF":
        assert np.abs(decode(form.lower(), data, View(8, 8))[:, 4, 4].numpy() - found.astype(int)).max() <= 1


def test_colours_of_every_mode_follow_its_profile():
    linear, grey = profile(b"RGB ", SRGB, 1.0), profile(b"GRAY", gamma=1.0)
    bright = int(encoded(np.array(100 / 255)).round())
    for image, icc, wanted in (
        (flat(100, "L"), grey, (bright,) * 3),
        (flat((100, 255), "LA"), grey, (bright,) * 3),
        (flat((100, 0), "LA"), grey, (255,) * 3),
        (flat((100, 100, 0, 255), "RGBA"), linear, (bright, bright, 0)),
        (flat((100, 100, 0, 0), "RGBA"), linear, (255,) * 3),
        (flat((100, 100, 0)).quantize(2), linear, (bright, bright, 0)),
        (flat(100 * 257, "I;16"), grey, (bright,) * 3),
    ):
        found = to_srgb(open_picture(saved(image, "PNG", icc_profile=icc)))
        assert found.mode == "RGB" and np.abs(np.array(found)[4, 4].astype(int) - wanted).max() <= 1, image.mode
        assert not found.info


@pytest.mark.parametrize("icc", [PLAIN, PLAIN[:200], b"none", profile(b"GRAY"), profile(b"CMYK"), profile(b"RGB ", ADOBE)[:-60]])
def test_profiles_that_change_nothing_or_cannot_be_read_are_passed_over(icc):
    data = saved(flat((10, 200, 30)), "PNG", icc_profile=icc)
    assert colour_transform(open_picture(data)) is None
    assert to_srgb(open_picture(data)).getpixel((0, 0)) == (10, 200, 30)


def test_packed_pictures_are_in_srgb_and_those_that_were_keep_their_bytes(tmp_path):
    for i, icc in enumerate((PLAIN, profile(b"RGB ", SRGB, 1.0))):
        (tmp_path / f"{i}.jpg").write_bytes(saved(flat((100, 100, 0)), "JPEG", quality=100, icc_profile=icc))
    assert pack.main([str(tmp_path), str(tmp_path / "out")]) == 0
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        plain, linear = (tar.extractfile(info).read() for info in tar if info.name.endswith("jpg"))
    assert plain == (tmp_path / "0.jpg").read_bytes()
    image, bright = Image.open(io.BytesIO(linear)), encoded(np.array(100 / 255))
    assert "icc_profile" not in image.info and np.abs(np.array(image)[4, 4] - [bright, bright, 0]).max() <= 3


def test_greys_of_16_bits_keep_their_brightness_and_their_transparency():
    dark, data = 200, saved(flat(200, "I;16"), "PNG", transparency=7)
    assert to_grey(open_picture(data)).getpixel((0, 0)) == dark >> 8, "of 65,535, no white in a mask"
    assert to_srgb(open_picture(data)).getpixel((0, 0)) == (0, 0, 0)
    clear = saved(flat(200, "I;16"), "PNG", transparency=200)
    assert to_srgb(open_picture(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert to_grey(open_picture(clear)).getpixel((0, 0)) == 0, "transparency apart"


def test_cmyk_is_read_with_and_without_adobes_mark():
    data = saved(flat((0, 255, 255, 0), "CMYK"), "JPEG", quality=100)
    mark = data.index(b"Adobe") - 4
    for one in (data, data[:mark] + data[mark + 2 + int.from_bytes(data[mark + 2 : mark + 4], "big") :]):
        assert np.abs(np.array(to_srgb(open_picture(one)))[4, 4].astype(int) - (255, 0, 0)).max() <= 3


def test_numbers_of_no_known_range_are_no_colours():
    for mode, colour in (("I", 7), ("F", 7), ("LAB", (128, 20, 20))):
        with pytest.raises(ValueError, match="no known range"):
            to_srgb(open_picture(saved(flat(colour, mode), "TIFF")))


# ---- how it stands


def turned(form, orientation, **options):
    """16 x 8, its upper half white; with the EXIF orientation."""
    image, exif = flat("black", size=(16, 8)), Image.Exif()
    image.paste("white", (0, 0, 16, 4))
    exif[0x0112] = orientation
    return saved(image, form, exif=exif, **options)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright_in_every_format(form):
    for orientation, white in ((1, "top"), (3, "bottom"), (6, "right"), (8, "left")):
        data = turned(form, orientation)
        image = to_srgb(open_picture(data))
        again = to_srgb(upright(open_picture(data)))
        assert image.size == picture_size(data) == ((8, 16) if orientation > 4 else (16, 8))
        assert np.array_equal(image, again), "turned once, however often it is asked"
        pixels = np.array(image)[:, :, 0]
        edges = {"top": pixels[0], "bottom": pixels[-1], "left": pixels[:, 0], "right": pixels[:, -1]}
        assert edges[white].min() > 200 and next(e for k, e in edges.items() if k != white).min() < 60


def test_tags_of_wrong_type_change_no_pixel():
    """XResolution as text, and orientations that are none."""
    whole = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI", 0x11A, 2, 3) + b"72\0\0"
    none = struct.pack("<HHI", 0x112, 2, 2) + b"6\0\0\0" + struct.pack("<HHIHH", 0x11A, 3, 2, 1, 1)
    for entries, size in ((whole, (8, 16)), (none, (16, 8))):
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
        data = saved(flat("red", size=(16, 8)), "JPEG", exif=exif)
        assert to_srgb(open_picture(data)).size == picture_size(data) == size
        assert decode("jpg", data, View(8, 8)).shape == (3, 8, 8)


def test_the_size_of_a_png_is_in_its_header_and_its_turn_anywhere():
    data = turned("PNG", 6)
    begin, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    behind = data[:begin] + data[end:-12] + data[begin:end] + data[-12:]
    assert picture_size(behind) == (8, 16) and to_srgb(open_picture(behind)).size == (8, 16)
    at = behind.index(b"IDAT") + 8
    assert picture_size(behind[:at] + b"\xff" * 9 + behind[at + 9 :]) == (8, 16), "without a look at the pixels"
    for cut in (20, at, len(behind) - 12):
        with pytest.raises(ValueError, match="cut off"):
            picture_size(behind[:cut])
    frames = saved(flat("red"), "PNG", save_all=True, append_images=[flat("blue")], duration=5)
    assert picture_size(frames) == (8, 8) and to_srgb(open_picture(frames)).getpixel((0, 0)) == (255, 0, 0)
    words = PngInfo()
    words.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    assert picture_size(saved(flat("red", size=(16, 8)), "PNG", pnginfo=words)) == (8, 16)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "MPO", "TIFF"])
def test_of_several_pictures_in_a_file_it_is_the_first(form):
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(flat((250, 0, 0)), form, save_all=True, append_images=[flat((0, 0, 250))], **options)
    assert np.abs(np.array(to_srgb(open_picture(data)))[4, 4].astype(int) - (250, 0, 0)).max() <= 3


def test_what_is_no_picture_is_an_error_of_one_kind():
    png = saved(flat("red", size=(64, 64)), "PNG")
    bomb = png[:16] + struct.pack(">II", 2**13, MAX_PIXELS // 2**13 + 1) + png[24:]
    for data in (b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0\0\0\x20ftypheic", bomb, png[:60], png[:-30]):
        with pytest.raises(ValueError, match=r"."):
            to_srgb(open_picture(data))
    with pytest.raises(ValueError, match="git lfs pull"):
        open_picture(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")


def test_bytes_go_to_numbers_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(pixels)), pixels) and from_bytes(pixels)[[0, 255]].tolist() == [-1, 1]


# ---- folders and lines


def test_pictures_of_a_folder_in_natural_order(tmp_path):
    names = ["10.png", "9.PNG", "a2/1.jpg", "a10/0.jpg", "b.tiff", "b.bmp"]
    hidden = ["._9.png", ".ipynb_checkpoints/9-checkpoint.png", ".DS_Store"]
    for name in (*names, *hidden, "film.gif", "9.txt", "10.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a2" / "circle").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a2")
    pictures, others = pictures_in(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in pictures] == [
        "9.PNG",
        "10.png",
        "a2/1.jpg",
        "a10/0.jpg",
        "b.bmp",
        "b.tiff",
        "linked/1.jpg",
    ]
    assert others == {".gif": 1, ".txt": 2, "README": 1} and len(files_in(tmp_path)) == 11
    for name in ("d/00000.png", "d/00001.png", "d/00001.edges.png", "d/grid.png", "d/request.json", "e/grid.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    drawn, more = pictures_in(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in {*drawn} - {*pictures}} == {"d/00000.png", "d/00001.png", "e/grid.png"}
    assert more - others == {".json": 1, "sheets of ldm sample": 2}
    padded = [Path(f"x/{i:05d}_{i % 7:02d}.png") for i in range(30)]
    assert sorted(padded, key=natural) == sorted(padded), "with equally many digits, the alphabet's order"


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red\u2028apple\r\nb\x0bc\x85d\n\ne\rf".encode())
    assert read_lines(path) == ["a red\u2028apple", "b\x0bc\x85d", "", "e\rf"]
    path.write_bytes(b"a\n")
    assert read_lines(path) == ["a"]
    path.write_bytes(b"")
    assert read_lines(path) == []
    for ending in (".csv", ".JSONL", ".json", ".tsv", ".parquet"):
        path.with_suffix(ending).write_bytes(b"image,caption\n")
        with pytest.raises(ValueError, match=r"prompts=.* is a table; wanted a text file with one prompt a line"):
            read_lines(path.with_suffix(ending))
    path.write_bytes("a".encode("utf-16"))
    with pytest.raises(ValueError, match=r"prompts=.*no text in UTF-8"):
        read_lines(path)
    with pytest.raises(FileNotFoundError, match=r"init=.*no such file"):
        read_lines(tmp_path / "none", "init")
