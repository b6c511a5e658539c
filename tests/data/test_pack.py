"""Every row of a table and every file of a folder ends as a sample, or in a printed line that says why not."""

import csv
import json
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from helpers.data import ODD, picture, samples
from ldm.command import doctor, pack
from ldm.compose import compose_config
from ldm.data.order.filter import numbers
from ldm.data.packing.gather import find
from ldm.data.packing.packed import Packed
from ldm.data.shard.index import Index
from ldm.data.shard.repair import repair
from ldm.data.shard.source import expand
from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards

CLIP = Path(__file__).parents[2] / "configs/experiment/emoji/clip.yaml"


def put(folder, *names, **options):
    """Pictures, each of a colour of its own."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (20 * number % 256, 9, len(name))).save(path, **options)
    return folder


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def home(tmp_path):
    return put(tmp_path / "in", *(f"{i}.jpg" for i in range(4)))


def captions(source):
    """-> file name and caption of each row that can be packed, the faults of the others, and what is printed."""
    packed = Packed()
    rows = find(source, packed)
    good = [(row.name, row.caption) for row in rows if not row.fault]
    return good, [f"{row.name}: {row.fault}" for row in rows if row.fault], packed


READ = {
    "tsv, doubled marks": ("a.tsv", 'image\tcaption\n0.jpg\t"a ""stop"" sign"\n1.jpg\tb\n', ['a "stop" sign', "b"]),
    "tsv, an unclosed mark": ("a.tsv", 'image\tcaption\n0.jpg\t"open\n1.jpg\tsay "b"\n', ['"open', 'say "b"']),
    "csv, an unclosed mark": ("a.csv", 'image,caption\n0.jpg,"open\n1.jpg,b\n', ['"open', "b"]),
    "commas in the last of two": (
        "a.csv",
        "image,caption\n0.jpg,a dog, running, happy\n1.jpg,b\n",
        ["a dog, running, happy", "b"],
    ),
    "a caption of two lines": ("a.csv", 'image,caption\n0.jpg,"a dog,\nhappy"\n1.jpg,b\n', ["a dog,\nhappy", "b"]),
    "two lines, the picture behind": ("a.csv", 'caption,image\n"a,\nb",0.jpg\nb,1.jpg\n', ["a,\nb", "b"]),
    "Windows": ("A.CSV", "image,caption\r\n0.jpg,a\r\n1.jpg,b\r\n", ["a", "b"]),
    "an old Mac": ("a.csv", "image;caption\r0.jpg;a, b\r1.jpg;b\r", ["a, b", "b"]),
    "spaces, empty columns and rows": ("a.csv", ",Image, Caption,\n0,0.jpg, a,\n,,,\n\n1,1.jpg,b,\n", ["a", "b"]),
    "a list": ("a.json", json.dumps([{"image": f"{i}.jpg", "text": "ab"[i]} for i in range(2)], indent=1), ["a", "b"]),
    "a list in a jsonl": ("a.jsonl", '[{"image": "0.jpg", "text": "a"},\n{"image": "1.jpg", "text": "b"}]', ["a", "b"]),
    "columns by row": ("a.jsonl", '{"image": "0.jpg", "text": "a"}\n{"file_name": "1.jpg", "Caption": "b"}', ["a", "b"]),
    "a table in a .txt": ("captions.txt", "image,caption\n0.jpg,a dog, running\n1.jpg,b\n", ["a dog, running", "b"]),
    "numbers": ("a.jsonl", '{"image": "0.jpg", "text": 5}\n{"image": "1.jpg", "text": null}', ["5", ""]),
}


@pytest.mark.parametrize("case", READ)
def test_a_table_that_can_be_read_in_one_way_is(home, case):
    name, text, wanted = READ[case]
    good, faults, _ = captions(write(home / name, text))
    assert good == [(f"{i}.jpg", caption) for i, caption in enumerate(wanted)] and not faults


def test_a_table_in_utf_16_is_read(home):
    assert captions(write(home / "a.tsv", "image\tcaption\n0.jpg\tÜbung", "utf-16"))[0] == [("0.jpg", "Übung")]


REFUSED = {
    "unclosed among closed": ("a.tsv", 'image\tcaption\n0.jpg\t"a"\n1.jpg\t"open\n2.jpg\tc\n', "line 3 cannot be read"),
    "two unclosed": (
        "a.csv",
        'image,caption\n0.jpg,"open\n1.jpg,b\n2.jpg,close"\n',
        "line 2 opens a quotation mark .* takes in 1.jpg",
    ),
    "the picture behind": ("a.csv", 'caption,image\n"open,0.jpg\nb",1.jpg\n', "line 2 opens .* takes in 0.jpg"),
    "a stray mark": ("a.csv", 'image,caption\n0.jpg,"a" dog, running\n1.jpg,"b"\n', "line 2 cannot be read"),
    "commas in one of three": ("a.csv", "image,caption,n\n0.jpg,a,1\n1.jpg,a, b,2\n", "line 3 has 4 cells, .* 3 columns"),
    "a line break": ("a.csv", "image,caption\n0.jpg,a dog\nrunning\n1.jpg,b\n", "line 3 has 1 cells"),
    "a column twice": ("a.csv", "image,caption,caption\n0.jpg,a,b\n", "line 1 names the column caption twice"),
    "in two cases": ("a.csv", "image,caption,Caption\n0.jpg,a,b\n", "line 1 names the column .aption twice"),
    "no header": ("a.csv", "0.jpg,a\n1.jpg,b\n", "columns 0.jpg, a; wanted one that names the picture"),
    "no rows": ("a.csv", "image,caption\n", "has no rows"),
    "Latin-1": ("a.csv", "image,caption\n0.jpg,a\n1.jpg,caf\xe9\n", "UTF-8: line 3"),
    "UTF-16 without a mark": ("a.csv", "i\0m\0", "line 1 holds a zero byte"),
    "an object": ("a.json", '{"0.jpg": "a"}', "no list of objects, but dict"),
    "half a list": ("a.jsonl", '[{"image": "0.jpg"},\n', "is no JSON: .* line 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_can_be_read_in_two_ways_is_refused_with_its_line(home, case):
    name, text, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        captions(write(home / name, text, "latin-1" if case == "Latin-1" else "utf-8"))


def test_each_row_is_a_sample_or_has_a_fault(home):
    rows = [
        {"image": str(home / "0.jpg"), "text": "absolute"},
        {"image": "../in/1.jpg", "text": "dots"},
        {"image": "sub\\..\\1.jpg", "text": "Windows"},
        {"image": "1.jpg", "text": "again"},
        {"image": "gone.jpg", "text": "a"},
        {"image": "gone.jpg", "text": "b"},
        {"image": "https://there/0.jpg", "text": "a"},
        {"image": 5, "text": "a"},
        {"image": "0.jpg", "text": ["one", "two"]},
        {"image": "0.jpg", "text": "a", "Text": "b"},
        ["0.jpg", "a"],
    ]
    (home / "sub").mkdir()
    text = "\n".join(map(json.dumps, rows)) + '\n{"image": "0.jpg", "text": "a", "text": "b"}\n{oops\n'
    good, faults, packed = captions(write(home / "a.jsonl", text))
    assert [caption for _, caption in good] == ["absolute", "dots", "Windows", "again"]
    wanted = ["no such file"] * 2 + ["an address", "names no picture", "but a list", "text and Text", "no JSON object"]
    wanted += ["says 'text' twice", "no JSON"]
    assert len(faults) == len(wanted) and all(word in fault for word, fault in zip(wanted, faults))
    assert [f"line {n} of a.jsonl" in fault for n, fault in enumerate(faults, 5)] == [True] * len(faults)
    assert packed.passed_over["pictures that no row of a.jsonl names"] == 2
    assert any("pictures that several rows name: 1" in note for note in packed.notes)


def test_names_that_no_file_can_have_and_half_characters_are_faults_of_their_rows(home, capsys):
    rows = [{"image": "x" * 300, "text": "a"}, {"image": "0.jpg", "text": "b", "key\ud83d:": 1, "side": 2}]
    write(home / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert pack.main([str(home / "a.jsonl"), str(home / "out")]) == 1
    said = capsys.readouterr()
    assert (
        "line 1 of a.jsonl: File name too long" in said.err
        and "key\\ud83d: -> source_key\\ud83d_, side -> source_side" in said.out
    )
    assert packed_records(home / "out")[0]["record"]["source_side"] == 2, "data.filters has a side of its own"


def packed_records(out, **fields):
    data = Shards(out, fields={"record": "json", **fields}, size=16, batch=1).train_set
    return [data[i] for i in range(len(data))]


def test_columns_of_ones_own_stay_beside_ours(home, capsys):
    row = {"file_name": "0.jpg", "caption": "a", "width": 1, "WIDTH": 2, "key": 3, "hash": 4, "caption_length": 5}
    row |= {"crop_top": 6} | {
        "status": "x",
        "class": 7,
        "fault": "none",
        "name": "n",
        "file": "f",
        "boxes": [[0, 0.5]],
        "deep": {"a": [None]},
    }
    write(home / "a.jsonl", json.dumps(row) + "\n" + json.dumps({**row, "file_name": "1.jpg", "score": float("nan")}))
    assert pack.main([str(home / "a.jsonl"), str(home / "out")]) == 0
    assert "width -> source_width, WIDTH -> source_WIDTH, key -> source_key" in capsys.readouterr().out
    records = [sample["record"] for sample in packed_records(home / "out")]
    same = {k: row[k] for k in ("class", "fault", "name", "file", "boxes", "deep")}
    for record in records:
        assert record.items() >= {**same, "source_width": 1, "source_WIDTH": 2, "source_key": 3, "width": 24}.items()
    assert records[1]["score"] is None
    table = Index(expand(home / "out")).table(0)
    assert table.keys == ["000000000", "000000001"] and table.column("caption_length").tolist() == [1, 1]
    assert [numbers(table, n).tolist() for n in ("width", "WIDTH", "class")] == [[24, 24], [24, 24], [7, 7]]


def test_records_of_other_shards_cannot_take_our_columns(tmp_path):
    own = {"key": 5, "hash": 6, "caption_length": 7, "jpg:offset": 8, "source_key": 9, "Score": 1, "score": 2}
    write_shards(({**s, "json": own} for s in samples(2)), tmp_path / "a")
    table = Index(expand(tmp_path / "a")).table(0)
    assert table.keys == ["000000000", "000000001"] and table.column("caption_length").tolist() == [5, 5]
    found = {name: table.column(name)[0] for name in table.numbers if name.startswith("source_")}
    assert found == {
        "source_source_key": 5,
        "source_hash": 6,
        "source_caption_length": 7,
        "source_jpg_offset": 8,
        "source_key": 9,
    }
    assert numbers(table, "score")[0] == 2 and numbers(table, "Score")[0] == 1
    with pytest.raises(ValueError, match="the columns Score, score; name one"):
        numbers(table, "SCORE")


def test_numbers_and_words_of_a_csv_stay_what_they_are(home):
    cells = {"a": "007", "b": "NaN", "c": "null", "d": "1e3", "e": "true", "f": "[1, 2]", "g": "", "h": '"x"'}
    with (home / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "text", *cells])
        writer.writeheader()
        writer.writerow({"image": "0.jpg", "text": "12", **cells})
    row = find(home / "a.csv", Packed())[0]
    assert row.caption == "12" and row.columns == cells | {"d": 1000.0, "e": True, "f": [1, 2]}


# ---- folders


def test_sub_folders_are_classes_and_numbers_stay_themselves(tmp_path):
    put(tmp_path / "in", *(f"{c}/{i}.png" for c in (1, 2, 10) for i in range(2)))
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    found = [(s["record"]["url"][:-6], s["label"]) for s in packed_records(tmp_path / "out", label="cls")]
    assert set(found) == {("1", 1), ("2", 2), ("10", 10)}
    assert (tmp_path / "out" / "classes.txt").read_text().split("\n")[10] == "10", "line i names class i"
    put(tmp_path / "one", "train/b/0.png", "train/a/0.png")
    assert {row.label for row in find(tmp_path / "one", Packed())} == {"a", "b"}, "what all share is no class"


def test_numbers_before_a_class_are_no_words_of_its_captions(tmp_path):
    """Kohya's folders say how often a picture is repeated; those of birds are numbered."""
    for names, captions in (
        (("10_sks dog", "1_dog"), {"sks dog", "dog"}),
        (("001.Sooty_Gull", "002.Kite"), {"Sooty Gull", "Kite"}),
        (("2 cats", "3 cats"), {"2 cats", "3 cats"}),
        (("3_a", "b"), {"3 a", "b"}),
    ):
        packed = Packed()
        rows = find(put(tmp_path / names[0], *(f"{name}/0.jpg" for name in names)), packed)
        assert {row.caption for row in rows} == captions and {row.label for row in rows} == {*names}
        assert bool(packed.notes) == (captions in ({"sks dog", "dog"}, {"Sooty Gull", "Kite"}))


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("cat/0.png", "dog/0.png", "0.png"), "1 pictures lie outside of them"),
        (("00000/0.png", "01000/0.png"), "their names are numbers of chunks"),
        (("cat/0.png", "dog/0.png", "cat/0.txt"), "captions or records lie beside pictures"),
        (("00000/0.png", "00001/0.png", "00000/0.json", "00001/0.json"), "captions or records lie beside pictures"),
    ],
)
def test_sub_folders_that_are_no_classes_are_said(tmp_path, names, why):
    put(tmp_path, *(name for name in names if name.endswith("png")))
    for name in names:
        if not name.endswith("png"):
            write(tmp_path / name, '{"caption": "a", "aesthetic": 5}')
    packed = Packed()
    rows = find(tmp_path, packed)
    assert all(row.label is None for row in rows) and not packed.classes and any(why in note for note in packed.notes)
    if names[-1].endswith("json"):
        assert [(row.caption, row.columns) for row in rows] == [("a", {"aesthetic": 5})] * 2


@pytest.mark.parametrize(
    "splits", [("train", "test"), ("Train", "Dev"), ("data/train2017", "data/val2017"), ("a/train", "a/val")]
)
def test_splits_are_no_classes(tmp_path, splits, capsys):
    put(tmp_path / "in", *(["b/0.jpg"] if splits[0] == "a/train" else []))  # classes that hold splits
    for split in splits:
        put(tmp_path / "in", f"{split}/0.jpg")
        write(tmp_path / "in" / split / "metadata.jsonl", '{"file_name": "0.jpg", "text": "a"}')
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert all(f"python -m ldm pack {tmp_path / 'in' / split} OUT/" in said for split in splits)
    assert captions(tmp_path / "in" / splits[0])[0] == [("0.jpg", "a")]
    put(tmp_path / "rails", "train_station/0.png", "train_track/0.png")
    assert len({row.label for row in find(tmp_path / "rails", Packed())}) == 2


def test_metadata_speaks_of_its_folder(tmp_path):
    home = put(tmp_path, "a/0.jpg", "a/1.jpg", "b/0.jpg")
    write(home / "a/metadata.csv", "file_name,text\n0.jpg,in a\n")
    write(home / "a/0.txt", "other words")
    write(home / "b/0.txt", "in b")
    good, faults, packed = captions(home)
    assert good == [("0.jpg", "in a"), ("b/0.jpg", "in b")] and not faults
    assert packed.passed_over == {
        "pictures that no row of a/metadata.csv names": 1,
        ".txt: the pictures there have their captions from a/metadata.csv": 1,
    }
    write(home / "metadata.jsonl", '{"file_name": "a/0.jpg", "text": "b"}')
    with pytest.raises(ValueError, match=r"both name .*a/0\.jpg; keep it in one"):
        captions(home)
    write(home / "a/metadata.jsonl", "{}")
    with pytest.raises(ValueError, match=r"metadata\.csv and .*metadata\.jsonl both speak"):
        captions(home)


def test_what_lies_beside_a_picture_is_its_own_in_any_case(tmp_path):
    put(tmp_path, "A.JPG", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg", format="JPEG")
    for name, text in {"A.TXT": "a", "B.Txt": "b", "c.jpg.txt": "c", "d.caption": "d"}.items():
        write(tmp_path / name, text)
    for name in ("e.txt", "e.TXT"):
        write(tmp_path / name, name)
    write(tmp_path / "f.json", "[1]")
    put(tmp_path, "g.jpg")
    write(tmp_path / "g.jpg.json", '{"title": "g.jpg"}')  # as Google's Takeout has it
    good, faults, packed = captions(tmp_path)
    assert good == [("A.JPG", "a"), ("b.jpg", "b"), ("c.jpg", "c"), ("d.jpg", "d"), ("g.jpg", "")] and not packed.passed_over
    assert "e.TXT and e.txt lie beside it" in faults[0] and "f.json is no JSON object" in faults[1]


def test_accents_may_be_spelt_as_another_system_does(tmp_path):
    """macOS writes e and an accent for one letter."""
    put(tmp_path, "caf\u00e9.jpg", "\u00fcber.jpg")
    write(tmp_path / "cafe\u0301.txt", "a caf\u00e9")
    assert captions(tmp_path)[0][0] == ("caf\u00e9.jpg", "a caf\u00e9")
    rows = [{"file_name": name, "text": name[0]} for name in ("cafe\u0301.jpg", "u\u0308ber.jpg", "caf\u00e9.jpg")]
    good, faults, _ = captions(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [caption for _, caption in good] == ["c", "u", "c"] and not faults


def test_parquet_is_a_table_like_others(home, tmp_path):
    """As imagefolder takes it; one that holds the pictures themselves is read elsewhere."""
    when = datetime(2026, 1, 1, tzinfo=UTC)
    names = pa.array(["0.jpg", "1.jpg", None]).dictionary_encode()  # as pandas keeps categories
    columns = {"file_name": names, "text": ["a", None, "c"], "n": [1.5, None, 3.0], "when": [when] * 3}
    pq.write_table(pa.table(columns), home / "metadata.parquet")
    good, faults, packed = captions(home)
    assert good == [("0.jpg", "a"), ("1.jpg", "")] and "row 3 of metadata.parquet: it names no picture" in faults[0]
    assert packed.passed_over == {"pictures that no row of metadata.parquet names": 2}
    assert pack.main([str(home), str(tmp_path / "out")]) == 1
    assert [s["record"].get("n", "-") for s in packed_records(tmp_path / "out")] == [1.5, None]
    within = pa.table({"image": [{"bytes": b"x", "path": "0.jpg"}], "text": ["a"]})
    pq.write_table(within, tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=rf"column image is of the type struct.*data\.data_dir={tmp_path}"):
        captions(tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        captions(write(tmp_path / "1.parquet", "x"))


def test_what_a_source_without_pictures_holds_is_said(tmp_path, capsys):
    write_shards(samples(1), tmp_path / "in")
    assert pack.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "Found 1 .tar: no picture; shards are read as they are, by data=shards; 1 .json" in capsys.readouterr().err
    coco = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    assert pack.main([str(write(tmp_path / "coco.json", json.dumps(coco))), str(tmp_path / "out")]) == 2
    assert "of COCO's annotations write such a list" in capsys.readouterr().err


def test_shards_that_cannot_be_written_are_one_line(home, tmp_path, capsys):
    write(tmp_path / "file", "x")
    assert pack.main([str(home), str(tmp_path / "file" / "out")]) == 2
    assert "out could not be written (Not a directory)" in capsys.readouterr().err


def test_every_other_file_is_counted(tmp_path):
    home = put(tmp_path / "in", "a/0.png", "b/0.png")
    for name in (
        ".hidden",
        "._0.png",
        ".ipynb_checkpoints/0.png",
        "@eaDir/0.png/THUMB.jpg",
        "__MACOSX/0.png",
        "x.npz",
        "y.heic",
        "alone.txt",
        "list.csv",
        "README",
    ):
        write(home / name, "x")
    (home / "c").symlink_to(home / "a")
    (home / "a" / "up").symlink_to("..")
    for name in ("drawn/00000.png", "drawn/00000.edges.png", "drawn/grid.png", "drawn/request.json"):
        write(home / name, "x")
    packed = Packed()
    assert [row.name for row in find(home, packed)] == ["a/0.png", "b/0.png", "drawn/00000.png"]
    assert packed.passed_over == {
        "sheets that `ldm sample` wrote beside its pictures": 2,
        ".json beside no picture": 1,
        "hidden files and folders": 5,
        "folders that are read already, by another link": 2,
        ".npz: no picture that is read": 1,
        ".heic: no picture that is read": 1,
        "README: no picture that is read": 1,
        ".txt beside no picture": 1,
        ".csv: a table; name it as the source, and its captions are read": 1,
    }


def test_other_formats_are_packed_and_what_is_no_picture_is_named(tmp_path, capsys):
    home = put(tmp_path / "in", "a.bmp", "b.tif", "c.gif", "d.jpeg")
    frames = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    frames[0].save(home / "e.gif", save_all=True, append_images=frames[1:])
    Image.new("F", (8, 8)).save(home / "f.tif")
    Image.new("RGB", (8, 8)).save(home / os.fsdecode(b"g\xe9.png"))
    os.mkfifo(home / "h.jpg")
    assert pack.main([str(home), str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "6 pictures" in said.out and "1 pictures have several frames or pages: the first is packed" in said.out
    assert [line.split(": ")[1] for line in said.err.splitlines() if line.startswith("left out")] == ["f.tif", "h.jpg"]
    assert {s["record"]["url"] for s in packed_records(tmp_path / "out")} >= {"a.bmp", "b.tif", "c.gif", "g\\xe9.png"}


# ---- what pack prints to train with


def said_commands(source, out, capsys, *options):
    assert pack.main([str(source), str(out), *options]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("python train.py")]
    return [dict(word.split("=", 1) for word in line[2:]) for line in lines]


def test_the_three_commands_are_filled_in(home, tmp_path, capsys):
    for i in range(1, 4):
        write(home / f"{i}.txt", f"number {i}")
    out = tmp_path / ODD
    clip, autoencoder, diffusion = said_commands(home, out, capsys, "--val", "0.1")
    assert [c["experiment"] for c in (clip, autoencoder, diffusion)] == ["emoji/clip", "emoji/autoencoder", "emoji/text"]
    assert clip.pop("data.size") == "32" == str(yaml.safe_load(CLIP.read_text())["clip"]["vision_cfg"]["image_size"])
    assert autoencoder["data.size"] == diffusion["data.size"] == "16"
    for command in (clip, autoencoder, diffusion):
        data = compose_config("train", [f"{key}={command[key]}" for key in ("data", "data.train", "data.val")]).data
        assert [command["data.train"], data.train, data.val] == [f"{out}/{split}" for split in ("train", "train", "val")]
        assert command["data"] == "shards"
    assert autoencoder["loss.model"] == diffusion["condition.text.model"] == f"local-dir:runs/{clip['run_id']}"
    assert diffusion["autoencoder.path"] == f"runs/{autoencoder['run_id']}" and clip["run_id"] == "a-b-c-d-e-f-g-h/clip"
    assert clip["+data.filters.caption_length"] == "[1,null]", "one picture has no caption"


def test_pictures_without_captions_get_commands_that_need_none(home, tmp_path, capsys):
    autoencoder, diffusion = said_commands(home, tmp_path / "out", capsys)
    assert diffusion["experiment"] == "emoji/unconditional" and "data.val" not in diffusion
    assert autoencoder["training.perceptual"] == "null" and diffusion["autoencoder.path"] == f"runs/{autoencoder['run_id']}"


# ---- shards of others


def test_parquet_beside_json_is_seen(tmp_path):
    tmp_path = tmp_path / "a"
    write_shards(samples(3), tmp_path)
    (tmp_path / "clean").mkdir()
    rows = [{"key": f"{i:09d}", "aesthetic": value, "new": i} for i, value in enumerate((7.0, None, float("nan")))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    table = Index(expand(tmp_path)).table(0)
    assert table.column("aesthetic").tolist() == [7, 1, 2] and table.column("new").tolist() == [0, 1, 2]
    repair(Index(expand(tmp_path)), {"image": "jpg"}, tmp_path / "clean")
    clean = Index(expand(tmp_path / "clean")).table(0)
    assert clean.column("aesthetic").tolist() == [7, 1, 2] and clean.column("new").tolist() == [0, 1, 2]
    pq.write_table(pa.Table.from_pylist([{"key": "other", "new": 1}]), tmp_path / "00000.parquet")
    with pytest.raises(ValueError, match=r"00000\.parquet whose column `key` names none of its samples"):
        Index(expand(tmp_path))
    twice = [{"key": "000000001", "new": 1}, {"key": "000000001", "new": 2}, {"key": None}, {"key": None}]
    pq.write_table(pa.Table.from_pylist(twice), tmp_path / "00000.parquet")
    with pytest.raises(ValueError, match=r"00000\.parquet with 1 keys of several rows, such as 000000001"):
        Index(expand(tmp_path))


def test_hidden_files_are_no_shards(tmp_path):
    write_shards(samples(2), tmp_path / "a")
    write(tmp_path / "a" / "._00000.tar", "x")
    assert len(Index(expand(tmp_path / "a"))) == 2


FOLDED = {
    "frames": ([f"{v}.{i:04d}" for v in range(2) for i in range(3)], ("jpg",), True),
    "one sample": ([f"img.{i}x" for i in range(3)], ("jpg", "txt"), True),
    "versions": ([f"a{i} v1.{i}" for i in range(3)], ("jpg", "txt"), True),
    "two views": ([f"{i}.{side}" for i in range(3) for side in ("left", "right")], ("jpg",), False),
}


@pytest.mark.parametrize("case", FOLDED)
def test_the_doctor_names_keys_with_dots(tmp_path, capsys, monkeypatch, case):
    names, endings, is_folded = FOLDED[case]
    for name in ("_draw", "_show"):
        monkeypatch.setattr(doctor, name, lambda *_: None)
    members: dict[str, dict] = {}
    for name in names:
        key, _, first = name.partition(".")
        values = {"jpg": picture(), "txt": "a"}
        members.setdefault(key, {"__key__": key}).update({f"{first}.{ending}": values[ending] for ending in endings})
    write_shards(members.values(), tmp_path / "a")
    assert doctor.main([str(tmp_path / "a"), "--quick", "--out", str(tmp_path / "x")]) == int(is_folded)
    assert ("FOLDED" in capsys.readouterr().out) == is_folded
