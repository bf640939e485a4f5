"""Open pages in a headless Chromium: take screenshots, and find faults that people would notice.

    python -m tests.browser page=PAGE.html out=PICTURE.png [width=1600] [dark=true] [height=PIXELS]

Needs the system's package `chromium`, and speaks its DevTools protocol.
"""

from __future__ import annotations

import asyncio
import base64
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from data.settings import run_command
from tests import HANGS_S

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip

_FAULTS = """
(() => {
  const faults = [];
  const root = document.documentElement;
  if (root.scrollWidth > window.innerWidth) faults.push(`${root.scrollWidth} px wide in a window of ${window.innerWidth}`);
  if (!root.lang) faults.push('no language');
  if (document.querySelectorAll('h1').length !== 1) faults.push('not one h1');
  for (const image of document.images) {
    if (!image.alt) faults.push(`no alt text: ${image.src.slice(0, 60)}`);
    if (!image.complete || !image.naturalWidth) faults.push(`not shown: ${image.alt}`);
  }
  const linear = part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = parts(getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const words = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!words || !element.checkVisibility() || ['STYLE', 'SCRIPT'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const pair = [luminance(parts(style.color)), luminance(behind(element))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(2)}: ${words.slice(0, 40)}`);
    if (parseFloat(style.fontSize) < 11) faults.push(`${style.fontSize} letters: ${words.slice(0, 40)}`);
  }
  return faults;
})()
"""


@dataclass
class Page:
    """One page in a browser.

    Attributes:
        requests: URLs that it requested.
        errors: errors on its console, and uncaught exceptions of its scripts.
    """

    socket: aiohttp.ClientWebSocketResponse
    session: str = ""
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _number: int = 0
    _loaded: bool = False

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that arrive before it are recorded."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        await self.socket.send_json(message | ({"sessionId": self.session} if self.session else {}))
        while True:
            answer = await self.socket.receive_json(timeout=HANGS_S)
            self._record(answer)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _record(self, event: dict[str, Any]) -> None:
        method, content = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(content["exceptionDetails"]["text"]))
        elif method == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.errors.append(str(content["entry"]["text"]))
        elif method == "Page.loadEventFired":
            self._loaded = True

    async def open(self, url: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a page in a new tab, and wait until it and all its images are loaded."""
        self.session, self._loaded = "", False
        self.requests.clear()
        self.errors.clear()
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        self.session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=url)
        await self._until_loaded(width)

    async def _until_loaded(self, width: int) -> None:
        while not self._loaded:
            self._record(await self.socket.receive_json(timeout=HANGS_S))
        await self.resize(width, await self.evaluate("document.documentElement.scrollHeight"))  # loads lazy images
        await self.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => 0)))")

    async def follow(self, script: str) -> None:
        """Evaluate a script that leads to another page, and wait until that is loaded."""
        self._loaded = False
        width = await self.evaluate("window.innerWidth")
        await self.evaluate(f"{{ {script}; undefined }}")
        await self._until_loaded(width)

    async def resize(self, width: int, height: int) -> None:
        """Set the window's size in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def evaluate(self, script: str) -> Any:
        """Evaluate a script and return its value; a promise is awaited. Raises RuntimeError if the script throws."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def faults(self) -> list[str]:
        """Find faults: a page wider than its window, images that are not shown or have no alt text, text with a contrast below 4.5
        (WCAG 2.2, 1.4.3) or below 11 px, console errors."""
        return [*(await self.evaluate(_FAULTS)), *self.errors]

    async def screenshot(self) -> bytes:
        """Take a screenshot of the whole page, as PNG."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    async def pdf(self) -> bytes:
        """Print the page to PDF."""
        return base64.b64decode((await self.call("Page.printToPDF", preferCSSPageSize=True))["data"])


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Start a browser with an empty profile."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )  # fmt: skip
        try:
            address = await asyncio.wait_for(_address(process), HANGS_S)
            async with aiohttp.ClientSession() as client, client.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                yield page
                page.session = ""
                await page.call("Browser.close")
            await asyncio.wait_for(process.wait(), HANGS_S)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    """Read the browser's WebSocket address from its standard error."""
    assert process.stderr is not None
    async for line in process.stderr:
        if line.startswith(b"DevTools listening on "):
            return line.decode().split()[-1]
    raise RuntimeError(f"{CHROMIUM} ended before it listened")


def shoot(page: str, out: str, width: int = 1600, dark: bool = False, height: int = 0) -> None:
    """Save a screenshot of a page: all of it, or its first `height` pixels."""

    async def main() -> bytes:
        async with browser() as shown:
            await shown.open(page if "://" in page else Path(page).resolve().as_uri(), width, height or 900, dark)
            whole = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            if not height:
                return await shown.screenshot()
            return base64.b64decode((await shown.call("Page.captureScreenshot", clip=whole))["data"])

    Path(out).write_bytes(asyncio.run(main()))


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    return run_command(shoot, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
