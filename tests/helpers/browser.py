"""A real Chromium without a window, driven through its own protocol: https://chromedevtools.github.io/devtools-protocol"""

import asyncio
import base64
import json
import os
import shutil
import subprocess
from contextlib import asynccontextmanager

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Page:
    """A tab. requests: all addresses that it asked for. problems: what its console says is wrong."""

    def __init__(self, socket):
        self.socket, self.answers, self.requests, self.problems, self.number = socket, {}, [], [], 0
        self.reading = asyncio.ensure_future(self._read())

    async def _read(self):
        async for message in self.socket:
            event = json.loads(message.data)
            if "id" in event:
                self.answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.problems.append(event["params"]["exceptionDetails"])
            elif event["method"] == "Log.entryAdded":
                self.problems.append(event["params"]["entry"])

    async def call(self, method, **settings):
        self.number += 1
        self.answers[self.number] = answer = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": self.number, "method": method, "params": settings})
        said = await asyncio.wait_for(answer, 60)
        assert "error" not in said, f"{method}: {said['error']}"
        return said["result"]

    async def open(self, url):
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def js(self, code):
        """What an expression becomes, its promise awaited."""
        said = await self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, code, seconds=60):
        """Waits until an expression is true."""
        for _ in range(int(seconds * 20)):
            if await self.js(f"Boolean({code})"):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"after {seconds} s it is not so: {code}")

    async def drag(self, selector, *points):
        """Presses at the first of points in [0, 1] of an element, goes to the others, and lets go."""
        place = f"document.querySelector({json.dumps(selector)})"
        await self.js(f"{place}.scrollIntoView({{block: 'center'}})")
        box = await self.js(
            f"(() => {{ const b = {place}.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] }})()"
        )
        places = [(box[0] + x * box[2], box[1] + y * box[3]) for x, y in points]
        for i, (x, y) in enumerate(places):
            kind = "mousePressed" if i == 0 else "mouseMoved"
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = places[-1]
        await self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    async def upload(self, selector, file):
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    async def look(self, width, height=900, dark=False):
        """Takes on a width in pixels, light or dark."""
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)

    async def shot(self, file, whole=False):
        said = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(said["data"]))


@asynccontextmanager
async def browser(folder):
    """A page of a fresh Chromium, which keeps its things in `folder`."""
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(folder)}
    )
    try:
        address = await asyncio.to_thread(_address, process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{address}/json") as answer:
                tab = next(one for one in await answer.json(content_type=None) if one["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                yield page
                page.reading.cancel()
    finally:
        process.terminate()
        process.wait(30)


def _address(process):
    for line in process.stderr:
        if "DevTools listening on" in line:
            return line.split("ws://")[1].split("/")[0]
    raise AssertionError("Chromium did not start")
