"""The index beside shards that belong to others, what lies beside them that is broken or changes, and rules that are none."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.data import COUNT, samples
from ldm.compose import compose_config
from ldm.data.shard.index import Index
from ldm.data.shard.record import describe
from ldm.data.shard.source import expand
from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards


@pytest.fixture
def folder(tmp_path):
    """Two shards, 6 and 4 samples; what is known of them lies in Parquet files beside them, as img2dataset leaves it."""
    rows = ({k: v for k, v in sample.items() if k != "json"} for sample in samples())
    write_shards(rows, tmp_path / "shards", per_shard=6)
    score(tmp_path / "shards", 5)
    return tmp_path / "shards"


def score(folder, aesthetic):
    for s in (0, 1):
        rows = [{"key": f"{i:09d}", "aesthetic": float(aesthetic)} for i in range(6 * s, 6 * s + 6)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"0000{s}.parquet")


def shut(monkeypatch, *folders):
    """As another user: these folders, and what is in them, cannot be written to."""
    may = os.access
    inside = [os.fspath(folder) for folder in folders]
    monkeypatch.setattr("os.access", lambda path, mode: may(path, mode) and not os.fspath(path).startswith(tuple(inside)))


def test_an_index_that_somebody_else_left_beside_the_shards_is_read(folder, tmp_path, monkeypatch):
    theirs, read = Index(expand(folder)), []
    shut(monkeypatch, folder / ".index")
    monkeypatch.setattr("ldm.data.shard.index.describe", lambda path: read.append(path) or describe(path))
    mine = Shards(folder, size=16, batch=2, cache=tmp_path / "cache", filters={"aesthetic": [5, None]})
    assert mine.train_set.index.fingerprint() == theirs.fingerprint() and not read
    assert list((tmp_path / "cache").rglob("kept-*")) and not list(folder.rglob("kept-*")), "what is new is kept elsewhere"
    score(folder, 4)  # theirs is of yesterday
    assert len(Shards(folder, size=16, batch=2, cache=tmp_path / "cache").train_set) == COUNT and len(read) == 2
    assert len(list((tmp_path / "cache").rglob("*.tar.arrow"))) == 2


def test_where_no_index_can_be_written_the_setting_is_named(folder, tmp_path, monkeypatch):
    shut(monkeypatch, folder)
    (tmp_path / "cache").write_text("a file, where a folder is needed")
    with pytest.raises(OSError, match=r"cannot be written into .*cache.*data\.cache=FOLDER.*LDM_CACHE"):
        Index(expand(folder), cache=tmp_path / "cache")


def test_what_changes_beside_a_shard_is_seen(folder):
    """Scores that are computed later go into the Parquet files; statistics that were wrong are mended."""
    rules = {"aesthetic": [5, None]}
    assert len(Shards(folder, size=16, batch=1, filters=rules).train_set) == COUNT
    score(folder, 4.5)
    assert len(Shards(folder, size=16, batch=1, filters=rules).train_set) == 0
    stats = folder / "00001_stats.json"
    right = stats.read_text()
    stats.write_text(json.dumps(json.loads(right) | {"successes": 5}))
    with pytest.raises(ValueError, match=r"00001\.tar holds 4 samples, but 00001_stats\.json counted 5"):
        Index(expand(folder))
    stats.write_text(right)
    assert len(Index(expand(folder))) == COUNT


@pytest.mark.parametrize("data", [b"", b"PAR1 and then nothing"])
def test_a_broken_parquet_file_is_damage(folder, data):
    (folder / "00001.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"1 of 2 shards are damaged: .*00001\.tar has a 00001\.parquet that cannot be read"):
        Index(expand(folder))
    assert len(Index(expand(folder), damaged="leave_out")) == 6


@pytest.mark.parametrize(
    "rules",
    [{"side": ["a", 2]}, {"side": [10, 5]}, {"side": 256}, {"unique": "yes"}, {"complete": 1}, {"side": [1, True]}],
)
def test_rules_that_are_none_are_refused(folder, rules):
    with pytest.raises(ValueError, match=rf"data\.filters\.{next(iter(rules))}=.*wanted"):
        Shards(folder, size=16, filters=rules).setup()


@pytest.mark.parametrize(
    "line", [["data.filters={side: [8,null], unique: true}"], ["+data.filters.side=[8,null]", "+data.filters.unique=true"]]
)
@pytest.mark.parametrize("data", ["shards", "latents", "emoji"])
def test_rules_are_said_on_the_command_line(data, line):
    config = compose_config("train", [f"data={data}", *(["data.train=x"] if data == "shards" else []), *line])
    assert config.data.filters == {"side": [8, None], "unique": True}
