"""A headless Chromium, driven through a pipe: opens a file at some size and colour scheme, and says what it shows."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = (
    "chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "headless_shell"
)  # fmt: skip
TIMEOUT_SECONDS = 60.0


def executable() -> str | None:
    """Of a Chromium on the path, or of one that playwright has installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        with contextlib.suppress(Exception):
            from playwright.sync_api import sync_playwright

            with sync_playwright() as playwright:
                found = playwright.chromium.executable_path
    return found if found and Path(found).exists() else None


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(executable(), profile)
        try:
            yield browser
        finally:
            browser.close()


class Browser:
    """Speaks the DevTools protocol: JSON messages, each ended by a zero byte, through file descriptors 3 and 4."""

    def __init__(self, path: str, profile: str):
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--remote-debugging-pipe", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        ]  # fmt: skip

        def connect():
            # First out of the way, since one of them may be 3 or 4 itself.
            ends = [os.dup2(end, 10 + number) for number, end in enumerate((their_in, their_out))]
            for number, end in enumerate(ends):
                os.dup2(end, 3 + number)

        self._process = subprocess.Popen(
            [path, *options, "about:blank"], preexec_fn=connect, close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_in)
        os.close(their_out)
        self._ids = itertools.count(1)
        self._rest = b""
        self.events: list[dict] = []
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = None
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters) -> dict:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + TIMEOUT_SECONDS
        while True:
            answer = self._receive(end)
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _receive(self, end: float) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._in, 2**16) if ready else b""
            if not more:
                raise RuntimeError("the browser does not answer")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, height: int, scheme: str) -> None:
        """Show a file in a window of `width` x `height`, in the colour scheme "light" or "dark"; waits until it is."""
        phone = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        end = time.monotonic() + TIMEOUT_SECONDS
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(end))

    def evaluate(self, script: str):
        """The value of a JavaScript expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """What the console, the page's scripts and its requests complained about."""
        self.evaluate("0")  # whatever came before it has arrived
        found = []
        for event in self.events:
            method, details = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(details["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
                found.append(str(details["args"]))
            elif method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
                found.append(details["entry"]["text"])
            elif method == "Network.loadingFailed":
                found.append(details["errorText"])
        return found

    def requests(self) -> list[str]:
        """The addresses that the page asked for, without those that are part of it."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self) -> bytes:
        """PNG of the whole page."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12000), "scale": 1}
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self._session = None
            self.ask("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
