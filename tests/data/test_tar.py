"""Links, sparse members, hidden files and odd names in a shard: read, or named."""

import io
import os
import tarfile

import pytest

from ldm.data.shard.index import Index
from ldm.data.shard.record import describe
from ldm.data.shard.source import expand, passed_over
from ldm.data.shard.tar import Damaged, read_headers, salvage
from ldm.data.shards import Shards
from ldm.data.stream import Streamed


def write(path, *members, form=tarfile.GNU_FORMAT):
    """members: a name with bytes, or with the type of another member and where it leads."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, *what in members:
            info = tarfile.TarInfo(name)
            if isinstance(what[0], bytes) and len(what) == 1:
                info.size = len(what[0])
                tar.addfile(info, io.BytesIO(what[0]))
            else:
                info.type, info.linkname = what
                tar.addfile(info)
    return path


def contents(path, read=read_headers):
    """-> key -> member -> bytes."""
    data = path.read_bytes()
    return {key: {m: data[at : at + size] for m, (at, size) in found.items()} for key, found in read(path).items()}


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize("read", [read_headers, salvage])
def test_links_are_what_they_lead_to(tmp_path, read):
    path = write(
        tmp_path / "a.tar",
        ("./0.txt", SOFT, "a/1.txt"),
        ("./a/1.txt", b"one"),
        ("./a/2.txt", SOFT, "1.txt"),
        ("./3.txt", HARD, "./a/1.txt"),
        ("./b/4.txt", SOFT, "../a/../3.txt"),
        ("./blob", b"no dot"),
        ("./5.txt", SOFT, "blob"),
    )
    found = contents(path, read)
    assert list(found) == ["./0", "./a/1", "./a/2", "./3", "./b/4", "./5"], "in the shard's order"
    assert {found[key]["txt"] for key in list(found)[:-1]} == {b"one"} and found["./5"]["txt"] == b"no dot"
    assert describe(path)["caption_length"].to_pylist() == [3] * 5 + [6]


def test_what_tar_makes_of_equal_files_is_all_there(tmp_path):
    for name in ("0.txt", "1.txt"):
        (tmp_path / name).write_text(name)
    os.link(tmp_path / "0.txt", tmp_path / "2.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.txt", "1.txt", "2.txt"):
            tar.add(tmp_path / name, name)
    assert contents(tmp_path / "a.tar") == {"0": {"txt": b"0.txt"}, "1": {"txt": b"1.txt"}, "2": {"txt": b"0.txt"}}


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (
            ("1.txt", SOFT, "../elsewhere/1.txt"),
            r"1 links lead to nothing in it, such as 1\.txt, a link to \.\./elsewhere/1\.txt",
        ),
        (("1.txt", HARD, "9.txt"), "a link to 9.txt"),
        (("1.txt", SOFT, "1.txt"), "lead to nothing"),
        (("1.txt", tarfile.GNUTYPE_SPARSE, ""), r"member 1\.txt is sparse or no file"),
        (("1.txt", tarfile.FIFOTYPE, ""), r"member 1\.txt is sparse or no file"),
        (("0.txt", SOFT, "0.txt"), "there twice"),
    ],
)
def test_links_to_nothing_and_sparse_members_are_damage(tmp_path, member, said):
    path = write(tmp_path / "a.tar", ("0.txt", b"zero"), member)
    with pytest.raises(Damaged, match=said):
        read_headers(path)
    assert contents(path, salvage) == {"0": {"txt": b"zero"}}


def test_a_negative_size_ends_no_reading(tmp_path):
    path = write(tmp_path / "a.tar", ("0.txt", b"zero"), ("1.txt", b"one"))
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\xff" * 10 + b"\xfc\0"  # -1024, in base 256
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024 : 1024 + 512])
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"below 0|invalid"):
        read_headers(path)
    assert contents(path, salvage) == {"0": {"txt": b"zero"}}


def test_hidden_files_and_folders_are_no_samples_and_no_shards(tmp_path):
    names = ("./0.txt", "._0.txt", "./.ipynb_checkpoints/0-checkpoint.txt", "a/.b/c.txt", "../1.txt")
    path = write(tmp_path / "a.tar", *((name, b"x") for name in names))
    assert list(contents(path)) == ["./0", "../1"] == list(contents(path, salvage))
    (tmp_path / "._a.tar").write_bytes(b"\0\5\26\7")
    assert expand(tmp_path) == [str(path)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_no_utf8_are_names(tmp_path, form):
    path = write(tmp_path / "a.tar", ("caf\udce9.txt", b"one"), form=form)
    assert Index([str(path)]).table(0).keys == ["caf\\udce9"]
    write(path, ("caf\udce9.txt", SOFT, "no\udcff"), form=form)
    assert "caf\\udce9" in Index([str(path)], damaged="leave_out").damage[str(path)]


@pytest.mark.filterwarnings("ignore")
def test_the_stream_names_links_that_it_does_not_follow(tmp_path):
    path = write(tmp_path / "a.tar", ("0.txt", b"zero"), ("1.txt", HARD, "0.txt"))
    assert Shards(path, fields={"caption": "txt"}).train_set.captions() == ["zero", "zero"]
    with pytest.raises(Damaged, match=r"1\.txt is a link"):
        next(iter(Streamed(path, fields={"caption": "txt"}, batch=1).train_dataloader()))


def test_a_mark_at_a_captions_beginning_is_no_part_of_it(tmp_path):
    path = write(
        tmp_path / "a.tar", *((f"{i}.txt", text.encode()) for i, text in enumerate(("red", "\ufeffred", "\ufeff", "r\ufeff")))
    )
    assert Shards(path, fields={"caption": "txt"}, filters={"caption_length": [1, None]}).train_set.captions() == [
        "red",
        "red",
        "r\ufeff",
    ]
    assert describe(path)["caption_length"].to_pylist() == [3, 3, 0, 2]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["0", "é", f"{'deep/' * 40}0"])
def test_a_damaged_shard_is_read_with_its_long_headers(tmp_path, form, key):
    """webdataset and Python's tarfile write one before each member: of its time, of a name that is long or no ASCII."""
    path, body = tmp_path / "a.tar", {"jpg": b"\xff" * 700, "txt": b"red", "cls": b"7"}
    with tarfile.open(path, "w", format=form) as tar:
        for member, data in body.items():
            info = tarfile.TarInfo(f"{key}.{member}")
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    whole, data = read_headers(path), path.read_bytes()
    assert salvage(path) == whole and list(whole) == [key]
    path.write_bytes(data[: whole[key]["cls"][0]])  # cut off before the last member's bytes
    assert salvage(path) == {key: {member: place for member, place in whole[key].items() if member != "cls"}}


def test_a_member_whose_long_header_is_broken_has_no_name(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key in ("é", "b"):
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"red"))
    path.write_bytes(path.read_bytes().replace("path=é.txt\n".encode(), "path=é.txt ".encode()))
    assert list(salvage(path)) == ["b"]


def test_folders_with_signs_of_a_pattern_are_folders_and_what_is_no_shard_is_said(tmp_path):
    folder = tmp_path / "a [b]{1,2}=c ~"
    for name in ("0.tar", "1.tar", "part/2.tar", "3.tar.gz", "4.TAR"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    both = [f"{folder}/0.tar", f"{folder}/1.tar"]
    assert expand(folder) == expand(f"{folder}/*.tar") == expand(f"{folder}/{{0..1}}.tar") == both
    assert expand(both[0]) == both[:1] and expand(f"{tmp_path}/*/0.tar") == both[:1]
    [line] = passed_over(folder)
    assert "3.tar.gz, 4.TAR, part/ (3 in all)" in line and not passed_over(both[0])
