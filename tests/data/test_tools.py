"""Pictures into shards, shards to the doctor, latents ahead of time."""

import csv
import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.data import damages, picture, samples
from ldm.command import doctor, pack
from ldm.data.shard import repair
from ldm.data.shard.index import Index
from ldm.data.shard.source import expand
from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards

# ---- pack


def draw(path, size=(24, 16), colour=(200, 10, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def test_a_folder_of_pictures_with_captions_beside_them(tmp_path):
    for i in range(3):
        draw(tmp_path / "in" / f"{i}.jpg", quality=95)
        (tmp_path / "in" / f"{i}.txt").write_text(f"picture {i}\n")
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    data = Shards(tmp_path / "out", size=16)
    assert data.train_set.captions() == [f"picture {i}" for i in range(3)]
    index = data.train_set.index
    offset, size = index.table(0).span(1, "jpg")
    bytes_ = (tmp_path / "in" / "1.jpg").read_bytes()
    assert open(index.shards[0], "rb").read()[offset : offset + size] == bytes_, "a JPEG goes in as it is"
    assert index.table(0).column("hash")[1] == int(hashlib.sha256(bytes_).hexdigest()[:16], 16)
    assert index.table(0).column("original_width").tolist() == [24] * 3


def test_class_folders_become_labels_and_a_share_is_held_out(tmp_path):
    for name in ("red_fox", "apple"):
        for i in range(20):
            draw(tmp_path / "in" / name / f"{i}.png", size=(40, 20), colour=(9 * i, len(name), 0))
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out"), "--size", "10", "--val", "0.3"]) == 0
    fields = {"image": "jpg", "caption": "txt", "label": "cls"}
    data = Shards(tmp_path / "out" / "train", tmp_path / "out" / "val", fields=fields, size=10)
    assert len(data.train_set) + len(data.val_set) == 40 and 4 <= len(data.val_set) <= 20
    assert not set(data.train_set.keys) & set(data.val_set.keys)
    assert not {path.name for path in tmp_path.iterdir()} - {"in", "out"}
    assert {(data.train_set[i]["caption"], data.train_set[i]["label"]) for i in range(len(data.train_set))} == {
        ("apple", 0),
        ("red fox", 1),
    }
    assert (tmp_path / "out" / "classes.txt").read_text() == "apple\nred_fox\n"
    table = data.train_set.index.table(0)
    assert table.column("width")[0] == 20 and table.column("original_width")[0] == 40


def test_a_picture_that_is_there_twice_is_on_one_side(tmp_path):
    for i in range(40):
        draw(tmp_path / "in" / f"{i}.png", colour=(20 * (i // 4), 0, 0))  # each four times
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out"), "--val", "0.3"]) == 0
    hashes = [set(Index(expand(tmp_path / "out" / split)).table(0).column("hash").tolist()) for split in ("train", "val")]
    assert len(hashes[0]) + len(hashes[1]) == 10 and not hashes[0] & hashes[1]
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "few"), "--val", "0.0001"]) == 0
    assert len(Index(expand(tmp_path / "few" / "val"))) == 4, "one picture at least is held out"


@pytest.mark.parametrize(("form", "comma"), [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("jsonl", "")])
def test_a_table_of_captions(tmp_path, form, comma):
    rows = [{"file_name": f"{i}.png", "text": f"n° {i},\u2028bright", "aesthetic": i / 2} for i in range(3)]
    for row in rows:
        draw(tmp_path / row["file_name"])
    table = tmp_path / f"captions.{form}"
    with table.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        if comma:
            writer = csv.DictWriter(file, rows[0], delimiter=comma)
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert pack.main([str(table), str(tmp_path / "out")]) == 0
    data = Shards(tmp_path / "out", size=16, filters={"aesthetic": [0.5, None]}, batch=1)
    assert data.train_set.captions() == ["n° 1,\u2028bright", "n° 2,\u2028bright"]


def test_what_cannot_be_packed_is_said(tmp_path, capsys):
    draw(tmp_path / "in" / "good.jpg")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no picture")
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "left out: bad.jpg: no picture in JPEG, PNG, WEBP" in capsys.readouterr().err
    assert len(Index(expand(tmp_path / "out"))) == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    for source, said in (("empty", "No pictures"), ("t.csv", "columns a, b; wanted one that names"), ("nowhere", "no ")):
        assert pack.main([str(tmp_path / source), str(tmp_path / "x")]) == 2
        assert said in capsys.readouterr().err


def test_what_lies_among_the_pictures_is_named_or_counted(tmp_path, capsys):
    """Captions that are no text, links to nowhere and in circles, other files, hidden ones too."""
    home = tmp_path / "in"
    for i, name in enumerate(("a", "ü 🦊", "latin", "sub/a")):
        draw(home / f"{name}.jpg", colour=(i, 0, 0))
    for name, caption in (("a", "\ufeffone"), ("ü 🦊", "eine Übung 🦊")):
        (home / f"{name}.txt").write_text(caption, encoding="utf-8")
    (home / "latin.txt").write_bytes("café".encode("latin-1"))
    for name in ("._a.jpg", "film.mp4", "lonely.txt"):
        (home / name).write_bytes(b"x")
    (home / "broken.png").symlink_to("nowhere.png")
    (home / "sub" / "circle").symlink_to("..")
    assert pack.main([str(home), str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    left_out = [line.partition(": ")[2] for line in told.err.splitlines() if line.startswith("left out")]
    assert left_out[0] == f"broken.png: FileNotFoundError: [Errno 2] No such file or directory: '{home}/broken.png'"
    assert left_out[1].startswith("latin.jpg: what lies beside it cannot be read") and "UTF-8: line 1" in left_out[1]
    assert "3 pictures; 1 without a caption\n2 left out, each named above\n" in told.out
    for line in ("1 .mp4: no picture that is read", "1 .txt beside no picture", "1 hidden files and folders"):
        assert f"passed over: {line}\n" in told.out
    packed = Shards(tmp_path / "out", fields={"record": "json"}).train_set
    assert [(s["record"]["url"], s["record"]["caption"]) for s in map(packed.__getitem__, range(3))] == [
        ("a.jpg", "one"),
        ("sub/a.jpg", ""),
        ("ü 🦊.jpg", "eine Übung 🦊"),
    ]


def test_rows_that_name_nothing_are_left_out(tmp_path, capsys):
    draw(tmp_path / "0.jpg")
    rows = ['{"image": "0.jpg", "text": "zero", "clip": NaN, "tags": ["a"], "n": 2}', "{oops", '{"text": "no picture"}']
    rows += ['{"image": "absent.jpg", "text": "gone"}', '{"image": "0.jpg"}', '{"image": "0.jpg", "text": ["one", "two"]}']
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    assert pack.main([str(tmp_path / "t.jsonl"), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    for line in (
        "line 2 of t.jsonl: no JSON",
        "line 3 of t.jsonl: it names no",
        "absent.jpg: line 4",
        "0.jpg: line 6 of t.jsonl: its",
    ):
        assert f"left out: {line}" in told
    packed = Shards(tmp_path / "out", fields={"record": "json"}, batch=1).train_set
    assert [s["record"]["caption"] for s in map(packed.__getitem__, range(len(packed)))] == ["zero", ""]
    assert packed[0]["record"].items() >= {"clip": None, "tags": ["a"], "n": 2}.items()
    (tmp_path / "t.csv").write_bytes("file_name,caption\n0.jpg,café".encode("latin-1"))
    (tmp_path / "none.jsonl").write_text('{"image": "absent.jpg", "text": "gone"}')
    for source, said in (
        ("t.csv", "t.csv cannot be read as text in UTF-8"),
        ("none.jsonl", "None of the pictures"),
        ("0.jpg", "no table"),
    ):
        assert pack.main([str(tmp_path / source), str(tmp_path / "x")]) == 2 and not (tmp_path / "x").exists()
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--size", "0"], ["--per-shard", "0"], ["--val", "1"], ["--val", "0.9999"]])
def test_options_of_packing_that_leave_nothing_are_refused(tmp_path, option, capsys):
    draw(tmp_path / "in" / "0.jpg")
    try:
        assert pack.main([str(tmp_path / "in"), str(tmp_path / "out"), *option]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert option[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- doctor


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4: the first is whole, the second cut in its third sample, the third has a picture that is none."""
    rotten = ({**s, "jpg": b"\xff\xd8 no"} if i == 9 else s for i, s in enumerate(samples(12)))
    write_shards(rotten, tmp_path / "shards", per_shard=4)
    second = tmp_path / "shards" / "00001.tar"
    header = Index([str(second)]).table(0).span(2, "cls")[0] - 512
    second.write_bytes(damages(second.read_bytes(), header)["header of 0xff"])
    return tmp_path / "shards"


def test_the_doctor_finds_what_is_broken_and_mends_it(shards, tmp_path, capsys):
    arguments = [str(shards), "--size", "16", "--out", str(tmp_path / "doctor")]
    rules = ["--filters", '{"aesthetic": [2, null], "unique": true}', "--buckets", "[[16, 16], [16, 32]]"]
    assert doctor.main([*arguments, *rules, "--repair", str(tmp_path / "clean")]) == 1
    told = capsys.readouterr().out
    assert f"DAMAGED {shards}/00001.tar" in told and "bad header at byte" in told
    assert "BAD sample '000000009'" in told and "NOT healthy" in told
    assert [line.split() for line in told.splitlines() if line.startswith("aesthetic: [2")] == [
        ["aesthetic:", "[2,", "None]", "2", "6"]
    ]
    report = json.loads((tmp_path / "doctor" / "report.json").read_text())
    assert (report["shards"], report["samples"], report["duplicates"]) == (3, 8, 3) and not report["healthy"]
    assert all((tmp_path / "doctor" / name).stat().st_size > 5000 for name in ("histograms.png", "samples.png"))
    clean = Shards(tmp_path / "clean", size=16).train_set
    keys = [int(key) for key in clean.keys]
    assert set(keys) >= {0, 1, 2, 3, 4, 5, 7, 8, 10, 11} and 9 not in keys, "what lies behind the damage is found again"
    assert clean.captions() == [f"red {i}" for i in keys]
    lost = (tmp_path / "clean" / "left-out.txt").read_text().splitlines()
    assert [line.split()[1:] for line in lost[:1]] == [["sample", "'000000006':", "lacks", "cls"]]
    assert len(lost) == 2 and "00002.tar sample '000000009': " in lost[1]
    assert doctor.main([str(tmp_path / "clean"), "--size", "16", "--out", str(tmp_path / "again")]) == 0


def test_a_repair_that_was_stopped_goes_on(shards, tmp_path, monkeypatch):
    repaired, write = [], repair.write_shard

    def stopped(samples, path):
        repaired.append(path.name)
        if len(repaired) == 2:
            raise KeyboardInterrupt
        return write(samples, path)

    monkeypatch.setattr(repair, "write_shard", stopped)
    index, fields = Index(expand(shards), damaged="leave_out"), {"image": "jpg", "caption": "txt"}
    with pytest.raises(KeyboardInterrupt):
        repair.claim(tmp_path / "clean", index, fields)
        repair.repair(index, fields, tmp_path / "clean")
    repair.claim(tmp_path / "clean", index, fields)
    for _ in range(2):
        assert repair.repair(index, fields, tmp_path / "clean") == (11, 1)
    assert repaired == [f"0000{i}.tar" for i in (0, 1, 1, 2)] and len(Index(expand(tmp_path / "clean"))) == 11
    for out, other in ((tmp_path / "clean", {"image": "jpg"}), (shards, fields)):
        with pytest.raises(FileExistsError, match="no repair of these shards"):
            repair.claim(out, index, other)


def test_a_repair_takes_along_what_lay_beside_the_shards(tmp_path):
    """img2dataset's records may be in Parquet files alone: clean shards can be filtered as the old ones were."""
    write_shards(({k: v for k, v in s.items() if k != "json"} for s in samples(3)), tmp_path / "shards")
    rows = [{"key": f"{i:09d}", "aesthetic": i / 2, "status": "success", "md5": None} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / "00000.parquet")
    fields = {"image": "jpg", "caption": "txt"}
    (tmp_path / "clean").mkdir()
    assert repair.repair(Index(expand(tmp_path / "shards")), fields, tmp_path / "clean") == (3, 0)
    clean = Shards(tmp_path / "clean", size=16, batch=1, filters={"aesthetic": [0.5, None]}).train_set
    assert clean.captions() == ["red 1", "red 2"]


def test_the_doctor_asks_for_what_most_samples_have(tmp_path, capsys):
    """PNG or latents, with captions or without: what is there, and a record that is none."""
    rows = [{"__key__": f"{i}", "png": picture("PNG"), "json": b"{" if i == 2 else {"a": i}} for i in range(4)]
    write_shards(rows, tmp_path / "png")
    assert doctor.main([str(tmp_path / "png"), "--size", "16", "--out", str(tmp_path / "x")]) == 1
    told = capsys.readouterr().out
    assert "BAD sample '2'" in told and "LACKING" not in told and (tmp_path / "x" / "samples.png").is_file()
    write_shards([{"__key__": "0", "moments.npy": np.zeros((4, 2, 2)), "txt": "a"}], tmp_path / "npy")
    assert doctor.main([str(tmp_path / "npy"), "--out", str(tmp_path / "y")]) == 0


def test_the_doctor_names_pictures_that_no_training_reads(tmp_path, capsys, undrawn):
    """Of several endings, none of which most samples have, and of endings that shards do not hold."""
    forms = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    write_shards(({"__key__": key, key: picture(form), "txt": "a"} for key, form in forms.items()), tmp_path / "a")
    assert doctor.main([str(tmp_path / "a"), "--quick", "--out", str(tmp_path / "x")]) == 1
    assert "LACKING 'jpg': 2 samples" in capsys.readouterr().out
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name in ("0.tif", "0.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert doctor.main([str(tmp_path / "00000.tar"), "--quick", "--out", str(tmp_path / "x")]) == 0
    assert "NOT READ, being of no kind that shards hold: tif 1" in capsys.readouterr().out


@pytest.fixture
def undrawn(monkeypatch):
    """The doctor without its pictures, which take the time."""
    for name in ("_draw", "_show"):
        monkeypatch.setattr(doctor, name, lambda *_: None)


def test_the_doctor_counts_what_training_would_refuse(tmp_path, capsys, undrawn):
    write_shards([*samples(3), *({**s, "__key__": "9", "txt": " "} for s in samples(1))], tmp_path / "a")
    arguments = [str(tmp_path / "a"), "--quick", "--out", str(tmp_path / "x"), "--filters"]
    assert doctor.main([*arguments, "{aesthetic: [1, null]}"]) == 0, "as data.filters is written"
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["caption_length:", "[1,", "None]", "1", "3"] in lines and ["aesthetic:", "[1,", "None]", "1", "2"] in lines
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    assert len(report["would_keep"]) == 4 and report["empty_captions"] == 1


def test_the_doctor_answers_wrong_questions(tmp_path, capsys):
    (tmp_path / "00000.TAR").touch()
    assert doctor.main([str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "No shards" in (said := capsys.readouterr().err) and "not read, as it is no *.tar in this folder: 00000.TAR" in said
    write_shards(samples(1), tmp_path / "a")
    for wrong, said in (
        ("--filters {watermark: [null, 0.5]}", "watermark: 1 of 1 samples"),
        ("--filters {side: 256}", "wanted the least and the most"),
        ("--filters [1]", "wanted {name: value"),
        ("--filters {side: [", "is no YAML"),
        ("--buckets {step: 0.5", "is no YAML"),
        ("--buckets [[3]]", "data.buckets"),
        ("--fields image=pickle", "such as image=jpg"),
        ("--size 0", "size=0: wanted 1 or more"),
        ("--fields image", "such as image=jpg"),
    ):
        try:
            assert doctor.main([str(tmp_path / "a"), "--out", str(tmp_path / "x"), *wrong.split(" ", 1)]) == 2
        except SystemExit as stop:
            assert stop.code == 2
        assert said in capsys.readouterr().err and not (tmp_path / "x").exists(), "before any picture is decoded"


def test_a_healthy_shard_need_not_be_decoded(tmp_path, undrawn):
    write_shards(samples(3), tmp_path / "a")
    assert doctor.main([str(tmp_path / "a"), "--quick", "--out", str(tmp_path / "x")]) == 0


def test_the_doctor_counts_files_that_no_sample_has(tmp_path, capsys, undrawn):
    """For want of an ending; what is hidden is meant to be none."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.txt", "LICENSE", "more/0001", ".hidden", ".git/HEAD"):
            data = picture() if name.endswith("jpg") else b"words"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert doctor.main([str(tmp_path), "--quick", "--out", str(tmp_path / "out")]) == 0
    assert (
        "UNREAD" in (said := capsys.readouterr().out)
        and "a.tar: 2 files without an ending are of no sample, such as LICENSE" in said
    )
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["unread"].values()) == [["LICENSE", "more/0001"]]
