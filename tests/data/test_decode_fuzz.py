"""Whatever is in a file, reading it gives a value or says that it cannot be read; no other error leaves."""

import io
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.condition._files import read_pictures
from ldm.data.shard.decode import BadSample, View, decode
from ldm.data.shard.record import describe
from ldm.data.shard.tar import Damaged, salvage
from ldm.evaluation.real import Folder
from ldm.files.picture import open_picture, picture_size, to_srgb

FEW, MANY = 240, 10_000
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TAGS = [0x010E, 0x0112, 0x011A, 0x011B, 0x0128, 0x0132, 0x8769, 0x8825, 0xA005, 0x9286, 0x927C, 0x0201, 0x0202, 0x02BC, 0x501B]


def exif(rng):
    """An EXIF block whose entries have any tag, type, count and value."""
    order = "<>"[rng.integers(2)]
    entries = b""
    for tag in rng.choice(TAGS, rng.integers(1, 7)):
        kind, count = rng.integers(0, 15), rng.choice([0, 1, 1, 1, 2, 3, 4, 2**16, 2**31])
        entries += struct.pack(f"{order}HHI", tag, kind, count) + rng.choice(
            [rng.bytes(4), struct.pack(f"{order}I", 6), b"72\0\0"]
        )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, rng.choice([len(entries) // 12, 999]))
    return b"Exif\0\0" + head + entries + struct.pack(f"{order}I", rng.choice([0, 8, 2**31])) + rng.bytes(40)


def png(chunks):
    """A file of chunks, each with its right sum."""
    body = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def chunks_of(data):
    """(kind, data) of a PNG."""
    at, found = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pictures():
    """Small files of many kinds, to be broken."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    others = [rgb.transpose(Image.Transpose.ROTATE_180)]
    alpha = rgb.copy()
    alpha.putalpha(100)
    return {
        "jpg": [
            saved(rgb, "JPEG", exif=exif(rng), icc_profile=ICC),
            saved(rgb, "JPEG", progressive=True, comment=b"words"),
            saved(rgb.convert("CMYK"), "JPEG"),
            saved(rgb.convert("L"), "JPEG", restart_marker_rows=1),
            saved(rgb, "MPO", save_all=True, append_images=others),
        ],
        "png": [
            saved(rgb, "PNG", exif=exif(rng), icc_profile=ICC),
            saved(alpha, "PNG", save_all=True, append_images=[alpha.transpose(Image.Transpose.ROTATE_180)], duration=5),
            saved(rgb.quantize(9), "PNG", transparency=3),
            saved(rgb.convert("L").convert("I;16"), "PNG"),
            saved(rgb.convert("1"), "PNG"),
        ],
        "webp": [
            saved(rgb, "WEBP", exif=exif(rng), icc_profile=ICC),
            saved(alpha, "WEBP", lossless=True),
            saved(rgb, "WEBP", save_all=True, append_images=others),
        ],
        "npy": [npy(np.arange(12).reshape(3, 4).astype(kind)) for kind in ("f4", ">i2", "?", "c8", "U3")],
        "json": [b'{"width": 3, "sha256": "ab", "n": [1.5e3, null, "\\u00e4"]}'],
        "txt": ["\ufeffein Apfel\u2028rot".encode()],
        "cls": [b"17"],
    }


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def spoilt(data, rng):
    """The bytes with a few of them changed, taken out, put in, or cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(data) + 1)) if rng.integers(2) else int(rng.integers(min(len(data), 200) + 1))
        how = rng.integers(7)
        if how < 3:
            data[at : at + 1] = rng.choice([rng.bytes(1), b"\0", b"\xff", b"\x7f", b"\x80"])
        elif how == 3:
            data[at : at + 4] = struct.pack(">I", rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
        elif how == 4:
            del data[at : at + int(rng.integers(1, 40))]
        elif how == 5:
            data[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif rng.integers(4) == 0:
            del data[at:]
    return bytes(data)


def member(rng, whole):
    """-> a member's name and its broken bytes."""
    kind = rng.choice(["jpg", "jpg", "jpg", "png", "png", "webp", "webp", "npy", "json", "txt", "cls"])
    data = whole[kind][rng.integers(len(whole[kind]))]
    how = rng.integers(4)
    if kind == "jpg" and how < 2:
        data = saved(Image.open(io.BytesIO(data)), "JPEG", exif=exif(rng), icc_profile=spoilt(ICC, rng))
    elif kind == "webp" and how == 0:
        data = saved(Image.open(io.BytesIO(data)), "WEBP", exif=exif(rng), icc_profile=spoilt(ICC, rng))
    elif kind == "png" and how < 3:
        chunks = chunks_of(data)
        at = int(rng.integers(len(chunks)))
        new = (
            rng.choice([b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"pHYs", b"gAMA", b"acTL", b"fcTL"]),
            rng.bytes(20),
        )
        new = (b"eXIf", exif(rng)[6:]) if how == 0 else new if how == 1 else (chunks[at][0], spoilt(chunks[at][1], rng))
        return kind, png([*chunks[:at], new, *chunks[at + (how == 2) :]])
    return kind, data if how == 0 and kind in ("jpg", "webp") else spoilt(data, rng)


def archive(rng, path):
    """A broken tar of members, long names, links, folders and what else a header can say."""
    with tarfile.open(path, "w", format=[tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT][rng.integers(3)]) as tar:
        for i in range(4):
            info = tarfile.TarInfo(rng.choice([f"{i}.jpg", f"./a/{i}.txt", f"{'long/' * 25}{i}.json", f"{i}"]))
            info.type = rng.choice([b"0", b"0", b"0", b"1", b"2", b"5", b"6", b"7", b"S", b"V", b"M"])
            info.linkname = rng.choice(["0.jpg", "./a/1.txt", "nowhere", info.name[-99:]])
            info.size = 700 if info.type in (b"0", b"7") else 0
            tar.addfile(info, io.BytesIO(b"7" * 700))
    data = bytearray(path.read_bytes())
    for header in rng.choice(range(0, len(data), 512), 2):
        field, width = [(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155), (0, 512)][rng.integers(7)]
        at = header + field + rng.integers(width)
        values = [rng.bytes(8), b"\0" * 8, b"\x80" + b"\0" * 10 + b"\xff", b"\xff" * 12, b"77777777777\0", b"-0000000001\0"]
        value = values[rng.integers(6)][: header + field + width - at]
        data[at : at + len(value)] = value
        if rng.integers(4) and len(data) > header + 512:  # a sum that is right lets the rest be read
            block = data[header : header + 512]
            block[148:156] = b" " * 8
            data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(data if rng.integers(4) else data[: rng.integers(len(data))])


def read(number, whole, folder):
    """Breaks one file and reads it in every way; -> whether it could be read."""
    rng = np.random.default_rng(number)
    if number % 10 == 0:
        path = folder / "a.tar"
        archive(rng, path)
        salvage(path)
        try:
            return len(describe(path)) > 0
        except Damaged:
            return False
    kind, data = member(rng, whole)
    if kind in ("jpg", "png", "webp"):
        for measure in (picture_size, lambda data: to_srgb(open_picture(data))):
            try:
                measure(data)
            except ValueError:
                pass
    try:
        decode(kind, data, View(8, 8))
    except BadSample:
        return False
    return True


def broken(numbers, folder):
    """Reads broken files, -> how many could be read."""
    whole, good = pictures(), 0
    for number in numbers:
        try:
            good += read(number, whole, folder)
        except Exception as error:
            raise AssertionError(f"file {number}: {error!r}") from error
    return good


def test_broken_files_end_no_program(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good = broken(range(FEW), tmp_path)
    assert FEW / 10 < good < FEW, "some are read, some are not"


@pytest.mark.slow
def test_ten_thousand_broken_files_end_no_program(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert MANY / 10 < broken(range(FEW, FEW + MANY), tmp_path) < MANY


def test_broken_files_of_a_folder_are_counted_and_of_a_request_are_named(tmp_path):
    rng = np.random.default_rng(1)
    whole = pictures()
    for i in range(20):
        (tmp_path / f"{i}.{'jpg' if i % 2 else 'tif'}").write_bytes(
            spoilt(whole["jpg"][0], rng) if i else b"II*\0" + rng.bytes(60)
        )
    fields = Folder(str(tmp_path), 8, "cpu", limit=1).fields(range(20))
    assert 0 < fields["corrupt"].sum() < 20
    with pytest.raises(ValueError, match=r"ask\.image=.*0\.tif is no whole picture"):
        read_pictures("image", [tmp_path / "0.tif"], (8, 8))
