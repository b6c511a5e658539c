"""The page in a real Chromium: draws, paints masks, maps and boxes, reads pictures back, and asks no other host."""

import asyncio
import base64
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from PIL import Image

from helpers.browser import CHROMIUM, browser
from helpers.page import SIZE, picture, save_small, session
from ldm.page.server import Server, listen

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]


@contextmanager
def serving(made):
    """Its address, while a thread serves it."""
    with listen(0) as socket:
        loop, begun = asyncio.new_event_loop(), threading.Event()
        runner = web.AppRunner(Server(made).app(), handler_cancellation=True)

        async def begin():
            await runner.setup()
            await web.SockSite(runner, socket).start()
            begun.set()

        thread = threading.Thread(target=lambda: (loop.run_until_complete(begin()), loop.run_forever()), daemon=True)
        thread.start()
        assert begun.wait(60)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)


def seen(made, tmp_path, scenario):
    """Runs a scenario with the page of a session open; then nothing was wrong, and nobody else was asked."""

    async def run(address):
        async with browser(tmp_path / "chromium") as page:
            await page.look(1400)
            await page.open(address)
            await page.until("document.body?.dataset.ready === 'yes'")
            await scenario(page)
            others = [url for url in page.requests if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))]
            assert len(page.requests) > 4 and not others and not page.problems

    with serving(made) as address:
        asyncio.run(run(address))


async def drawing(page, number):
    """Draws, and waits until the gallery has so many cards; -> the newest one's pictures as the browser has them."""
    await page.js("document.getElementById('draw').click()")
    await page.until(
        f"document.querySelectorAll('#gallery article').length === {number} && document.getElementById('now').hidden"
        " || document.getElementById('error').textContent"
    )
    assert await page.js("document.getElementById('error').textContent") == ""
    return await page.js(
        """Promise.all([...document.querySelectorAll('#gallery article:first-child .pictures img')].map(async (image) => {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        return btoa(String.fromCharCode(...bytes));
        }))"""
    )


def set_to(name, value):
    return f"document.getElementById('{name}').value = {value!r}"


def files_of(made):
    place = made.out / made.drawings[-1]["folder"]
    return [(place / name).read_bytes() for name in made.drawings[-1]["pictures"]]


def test_it_draws_inpaints_and_reads_back(tmp_path):
    made = session(save_small(tmp_path / "model", ["text"]), tmp_path / "drawn")

    async def scenario(page):
        await page.js(f"{set_to('prompt', 'a red fox')}; {set_to('steps', '40')}; {set_to('count', '2')}")
        await page.js(
            """window.estimates = 0; const now = document.getElementById('now');
            new MutationObserver(() => { estimates += now.querySelectorAll('img').length })
            .observe(now, {childList: true, subtree: true, attributes: true}); 0"""
        )
        shown = await drawing(page, 1)
        assert [base64.b64decode(one) for one in shown] == files_of(made) and len(shown) == 2
        assert await page.js("estimates") > 0
        command = made.drawings[0]["command"]
        assert "'a red fox'" in command and await page.js("document.querySelector('.command pre').textContent") == command
        await page.js("document.querySelector('.pictures button').click()")
        await page.until("document.querySelector('dialog[open] img').complete")
        await page.js("document.querySelector('[data-do=begin]').click()")
        await page.until("document.querySelector('#init canvas') && !document.querySelector('dialog[open]')")
        await page.drag("#init canvas", (0.2, 0.2), (0.3, 0.2))
        await drawing(page, 2)
        words = made.drawings[1]["command"]
        assert "init=" in words and "mask=" in words and "strength=1" in words
        last = files_of(made)[0]
        await page.js("location.reload()")
        await page.until("document.body?.dataset.ready === 'yes' && document.querySelectorAll('#gallery article').length === 2")
        assert files_of(made)[0] == last

    seen(made, tmp_path, scenario)


def test_it_paints_what_the_conditions_are_asked_by(tmp_path):
    made = session(save_small(tmp_path / "model", ["label", "boxes", "map", "hole", "score"]), tmp_path / "drawn")
    (tmp_path / "a.png").write_bytes(picture(size=(40, 30)))

    async def scenario(page):
        await page.js(f"{set_to('count', '1')}; document.querySelector('#fields select').value = 'Flags'")
        await page.js("document.getElementById('draw').click()")
        await page.until("document.getElementById('error').textContent.includes('This model is asked by')")
        await page.upload("input[aria-label='ask.image']", tmp_path / "a.png")
        await page.until("document.querySelector('canvas[data-mask]')")
        await page.drag("canvas[data-mask]", (0.4, 0.4), (0.6, 0.6))
        await page.js("document.querySelectorAll('[data-map]')[0].previousSibling.children[3].click()")
        await page.drag("canvas[data-map]", (0.1, 0.1), (0.9, 0.1))
        await page.drag("canvas[data-boxes]", (0.25, 0.25), (0.6, 0.6), (0.75, 0.5))
        await drawing(page, 1)

    seen(made, tmp_path, scenario)
    folder = made.out / made.drawings[-1]["folder"]
    asked = dict(word.split("=", 1) for word in made.drawings[-1]["command"].split() if word.startswith("ask."))
    labels = list(Image.open(asked["ask.map"]).getdata())
    assert len(labels) == SIZE**2 and set(labels) == {0, 3} and labels[SIZE // 2] == 3 and labels[-1] == 0
    mask = Image.open(asked["ask.mask"]).convert("L")
    assert mask.size == (40, 30) and mask.getpixel((20, 15)) == 255 and mask.getpixel((1, 28)) == 0
    ((kind, *edges),) = json.loads(Path(asked["ask.boxes"]).read_text())
    assert kind == 1 and edges == pytest.approx([0.25, 0.25, 0.75, 0.5], abs=0.02) and asked["ask.label"] == "Flags"
    assert (folder / "00000.map.png").is_file()


def test_two_models_stand_side_by_side_and_stop_stops(tmp_path):
    models = [str(save_small(tmp_path / name, ["text"], seed)) for seed, name in enumerate(("a", "b"))]
    made = session(models, tmp_path / "drawn")

    async def scenario(page):
        shown = await drawing(page, 1)
        assert len(shown) == 8 and await page.js("document.querySelectorAll('article .side').length") == 2
        await page.js(f"{set_to('steps', '1000')}; {set_to('batch', '1')}; {set_to('count', '64')}")
        await page.js("document.getElementById('draw').click()")
        await page.until("document.querySelector('#now img')")
        await page.js("document.getElementById('stop').click()")
        await page.until("document.getElementById('status').textContent === 'Stopped.'")
        await page.js(f"{set_to('steps', '2')}; {set_to('batch', '')}; {set_to('count', '1')}")
        await drawing(page, 2)
        for width in (400, 1400):
            await page.look(width)
            assert await page.js("document.documentElement.scrollWidth") <= width

    seen(made, tmp_path, scenario)
    assert len(made.drawings) == 4
