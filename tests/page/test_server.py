"""The page's server: who may ask it, how it streams, queues, stops, and lives on after what goes wrong."""

import asyncio
import json
import re
import threading

import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer

from helpers.page import picture, save_small, session
from ldm.errors import Refusal
from ldm.page import server
from ldm.page.server import ASSETS, Server, listen
from ldm.page.session import Stopped


class Stub:
    """A session whose drawings say what they are, and go on until they may end, or must."""

    def __init__(self):
        self.drawings, self.description, self.begun, self.ended, self.may_end = [], {"models": []}, [], [], threading.Event()

    def draw(self, said, given, tell, stopped):
        self.begun.append(said["seed"])
        tell({"note": {name: len(data) for name, data in given.items()}})
        if said["seed"] == "refused":
            raise Refusal("wanted another")
        if said["seed"] == "broken":
            raise RuntimeError("a\nbug of somebody's")
        while not self.may_end.wait(0.005):
            if stopped():
                self.ended.append(said["seed"])
                raise Stopped
        tell({"drawing": said["seed"]})


def form(pictures=(), **said):
    data = FormData()
    data.add_field("request", json.dumps(said))
    for name, content in dict(pictures).items():
        data.add_field(name, content, filename=name)
    return data


async def events(answer):
    assert answer.status == 200
    return [json.loads(line) for line in (await answer.text()).splitlines()]


def served(scenario, behind=None):
    """Runs a scenario with a client of a server, and what lies behind it."""
    behind = behind or Stub()

    async def run():
        async with TestClient(TestServer(Server(behind).app())) as client:
            await scenario(client, behind)

    asyncio.run(run())


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never was so")


def test_everything_is_from_here_and_says_so():
    async def scenario(client, behind):
        for name in ("", *(f"page/{path.name}" for path in ASSETS.iterdir())):
            answer = await client.get(f"/{name}")
            rules = answer.headers["Content-Security-Policy"]
            assert answer.status == 200 and "default-src 'none'" in rules and "script-src 'self';" in rules
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert not re.findall(r"https?:|//\w+\.\w|@import", await answer.text())
        for name in ("page/../server.py", "page/nothing.js", "drawings/given/a.png", "drawings/00000/request.json", "etc"):
            assert (await client.get(f"/{name}")).status == 404

    served(scenario)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:7860"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
def test_other_sites_are_not_answered(headers):
    async def scenario(client, behind):
        answer = await client.post("/draw", data=form(seed=1), headers=headers)
        assert answer.status in (400, 403) and not behind.begun

    served(scenario)


def test_its_own_page_is_answered_through_a_tunnel_too():
    async def scenario(client, behind):
        behind.may_end.set()
        headers = {"Host": "localhost:1234", "Origin": "http://localhost:1234"}
        assert (await events(await client.post("/draw", data=form(seed=1), headers=headers)))[-1] == {"drawing": 1}

    served(scenario)


def test_what_goes_wrong_is_one_line_and_the_page_lives_on(monkeypatch, capsys):
    monkeypatch.setattr(server, "LIMIT", 2**12)

    async def scenario(client, behind):
        behind.may_end.set()
        for said, line in (("refused", "wanted another"), ("broken", "RuntimeError: a bug of somebody's")):
            assert (await events(await client.post("/draw", data=form(seed=said))))[-1] == {"error": line}
        wrong = [{"request": "{"}, {"request": "[1]"}, {"request": "{}", "init": "text"}, {"init": "text"}]
        for data, status in [*((data, 400) for data in wrong), (form({"init": bytes(2**13)}, seed=1), 413)]:
            answer = await client.post("/draw", data=data)
            assert answer.status == status and "\n" not in (await answer.json())["error"]
        said = await events(await client.post("/draw", data=form({"init": bytes(9)}, seed=5)))
        assert said == [{"waiting": 0}, {"note": {"init": 9}}, {"drawing": 5}]

    served(scenario)
    assert "bug of somebody's" in capsys.readouterr().err


def test_two_at_once_queue():
    async def scenario(client, behind):
        first = await client.post("/draw", data=form(seed=1))
        second = await client.post("/draw", data=form(seed=2))
        assert json.loads(await second.content.readline()) == {"waiting": 1}
        await until(lambda: behind.begun == [1])
        behind.may_end.set()
        assert (await events(first))[-1] == {"drawing": 1}
        assert await events(second) == [{"waiting": 0}, {"note": {}}, {"drawing": 2}]

    served(scenario)


def test_who_goes_away_stops_what_he_asked_for():
    async def scenario(client, behind):
        first, second, third = [await client.post("/draw", data=form(seed=seed)) for seed in (1, 2, 3)]
        await until(lambda: behind.begun == [1])
        second.close()  # while it waits
        await asyncio.sleep(0.05)
        first.close()  # while it is drawn
        await until(lambda: behind.ended == [1] and behind.begun == [1, 3])
        behind.may_end.set()
        assert (await events(third))[-1] == {"drawing": 3}

    served(scenario)


def test_closing_the_server_stops_everything():
    stub = Stub()

    async def scenario(client, behind):
        for seed in (1, 2):
            await client.post("/draw", data=form(seed=seed))
        await until(lambda: behind.begun == [1])

    served(scenario, stub)
    assert stub.ended == [1] == stub.begun and not [t for t in threading.enumerate() if t.name.startswith("drawing")]


def test_a_port_is_of_this_machine_alone_and_refused_if_taken():
    with listen(0) as one:
        host, port = one.getsockname()
        one.listen()
        assert host == "127.0.0.1"
        with pytest.raises(Refusal, match=rf"port={port}: .*port=0"), listen(port):
            pass
    with pytest.raises(Refusal, match="port=99999"), listen(99_999):
        pass


def test_a_picture_is_drawn_and_read_back(tmp_path):
    made = session(save_small(tmp_path / "model", ["text"]), tmp_path / "drawn")

    async def scenario(client, behind):
        said = await events(await client.post("/draw", data=form({"init": picture()}, prompt="fox", strength=1, count=2)))
        assert [event["step"] for event in said if "step" in event] == [1, 2, 3]
        drawing = said[-1]["drawing"]
        assert await (await client.get("/drawings")).json() == [drawing]
        for name in drawing["pictures"]:
            read = await (await client.get(f"/drawings/{drawing['folder']}/{name}")).read()
            assert read == (tmp_path / "drawn" / drawing["folder"] / name).read_bytes()
        assert (await client.get(f"/drawings/{drawing['folder']}/command.txt")).status == 404
        assert (await (await client.get("/description")).json())["models"][0]["fields"] == ["caption"]

    served(scenario, made)
