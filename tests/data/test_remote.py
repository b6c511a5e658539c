"""Shards that lie elsewhere: fetched once into a bounded folder, patiently where that helps, with a clear word where not."""

import functools
import http.server
import json
import sys
import threading
import warnings

import pytest

from helpers.data import COUNT, samples
from ldm.data.shard.fetch import ATTEMPTS, Fetch, patiently
from ldm.data.shard.write import write_shard, write_shards
from ldm.data.shards import Shards

pytestmark = pytest.mark.filterwarnings("ignore:.*Trying again")


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; the first `fail` requests get an error, and headers speak of `more` bytes than there are."""

    fail, status, more, gets = 0, 503, 0, 0

    def do_GET(self):
        Flaky.gets += 1
        if not self.fails():
            super().do_GET()

    def do_HEAD(self):
        if not self.fails():
            super().do_HEAD()

    def fails(self):
        if Flaky.fail:
            Flaky.fail -= 1
            self.send_error(Flaky.status)
            return True
        return False

    def send_header(self, keyword, value):
        more = Flaky.more if keyword == "Content-Length" and self.command == "HEAD" else 0
        super().send_header(keyword, str(int(value) + more) if more else value)

    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path):
    write_shards(samples(), tmp_path / "shards", per_shard=4)
    return tmp_path / "shards"


@pytest.fixture
def address(folder):
    Flaky.gets, Flaky.fail, Flaky.status, Flaky.more = 0, 0, 503, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Flaky, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def remote(address, tmp_path):
    """A data module of the served shards, as another run would make it."""

    def make(shards="{00000..00002}.tar", cache="cache", **options):
        data = Shards(f"{address}/{shards}", size=16, batch=2, cache=tmp_path / cache, **options)
        data.fetch.wait = 0.001
        return data

    return make


def cached(path):
    return sorted(file.name for file in (path / "shards").rglob("*.tar"))


@pytest.mark.parametrize("scheme, package", [("s3", "s3fs"), ("gs", "gcsfs")])
def test_what_is_not_installed_is_named_before_time_is_spent(folder, monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(ValueError, match=rf"data\.val={scheme}://bucket/val: .*pip install {package}$"):
        Shards(folder, f"{scheme}://bucket/val")


def test_remote_shards_are_fetched_once_and_read_as_local_ones(remote, tmp_path):
    Flaky.fail = 5
    data = remote()
    assert data.train_set.captions() == [f"red {i}" for i in range(COUNT)]
    assert cached(tmp_path / "cache") == ["00000.tar", "00001.tar", "00002.tar"]
    gets = Flaky.gets
    assert remote().train_set.captions() == data.train_set.captions() and Flaky.gets == gets
    tiny = remote(cache="tiny", cache_gb=1e-9)
    assert len(tiny.train_set) == COUNT and len(cached(tmp_path / "tiny")) == 1, "room for no more"


def test_a_shard_that_was_replaced_is_fetched_anew(remote, folder):
    assert len(remote().train_set) == COUNT
    write_shard(({**s, "txt": "new"} for s in samples(3)), folder / "00002.tar")
    (folder / "00002_stats.json").unlink()
    assert remote().train_set.captions()[8:] == ["new"] * 3


def test_the_count_beside_a_shard_comes_along(remote, folder):
    stats = folder / "00001_stats.json"
    stats.write_text(json.dumps(json.loads(stats.read_text()) | {"successes": 5}))
    with pytest.raises(ValueError, match=r"00001\.tar holds 4 samples, but 00001_stats\.json counted 5"):
        remote().setup()


def test_a_shard_stays_until_it_is_open(address, tmp_path):
    fetch = Fetch(tmp_path / "cache", gigabytes=1e-9)
    (fetch.folder / "half").mkdir(parents=True)
    (fetch.folder / "half" / "part").write_text("of a process that was killed")
    with fetch.held(f"{address}/00000.tar"):
        fetch(f"{address}/00001.tar")
        assert cached(tmp_path / "cache") == ["00000.tar", "00001.tar"] and not (fetch.folder / "half").exists()
    fetch(f"{address}/00002.tar")
    assert cached(tmp_path / "cache") == ["00002.tar"]


@pytest.mark.parametrize("status, attempts", [(404, 1), (403, 1), (503, ATTEMPTS)])
def test_patience_ends_and_does_not_begin_where_it_is_in_vain(remote, status, attempts):
    Flaky.fail, Flaky.status = 1000, status
    with pytest.raises(OSError, match=rf"00000\.tar could not be read in {attempts} attempts: .*({status}|00000\.tar)"):
        remote("00000.tar").setup()


def test_a_shard_of_another_size_than_was_said_is_not_taken(remote, tmp_path):
    Flaky.more = 7
    with pytest.raises(OSError, match=rf"00000\.tar could not be read in {ATTEMPTS} attempts: .*\d+ bytes came of \d+"):
        remote("00000.tar").setup()
    assert cached(tmp_path / "cache") == []


def test_a_server_that_is_lost_ends_the_training_and_no_sample_is_replaced(remote):
    data = remote(cache_gb=1e-9, window=1)
    batches = iter(data.train_dataloader())
    next(batches)
    Flaky.fail = 1000
    with pytest.raises(OSError, match=rf"could not be read in {ATTEMPTS} attempts"):
        for _ in range(COUNT):
            assert "bad" not in next(batches)


def test_errors_of_the_network_are_tried_again_and_those_of_the_program_are_not():
    lost = type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})
    unknown = type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})
    calls = []

    def work(error):
        calls.append(error)
        if len(calls) < 3:
            raise error
        return "done"

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert patiently("s3://b/0.tar", lambda: work(lost("no route")), 0.001) == "done"
    assert "s3://b/0.tar, attempt 1 of 7: EndpointConnectionError('no route'). Trying again in 0.001 s." in str(told[0].message)
    for error, wanted, words in ((NameError("x"), NameError, "x"), (unknown("none"), OSError, "in 1 attempts.*AWS_PROFILE")):
        calls.clear()
        with pytest.raises(wanted, match=words):
            patiently("s3://b/0.tar", lambda error=error: work(error), 0.001)
        assert len(calls) == 1


def test_one_of_many_processes_fetches(address, tmp_path):
    fetch, paths = Fetch(tmp_path / "cache"), []
    threads = [threading.Thread(target=lambda: paths.append(fetch(f"{address}/00000.tar"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert Flaky.gets == 3, "the shard, its statistics, and a table that is not there"
