"""A headless Chromium, told what to do through pipes: nothing to install but the browser."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
)


def found() -> str | None:
    """The browser, named by the variable CHROMIUM or found on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A page in a browser, by the Chrome DevTools protocol."""

    def __init__(self, send: int, receive: int) -> None:
        self.send, self.receive = send, receive
        self.count, self.rest, self.session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self.rest:
            more = os.read(self.receive, 1 << 20)
            assert more, "the browser is gone"
            self.rest += more
        line, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, path: Path) -> None:
        """Go to a page on disk and wait until it is loaded."""
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.read()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and let go a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def shape(self, width: int, height: int, dark: bool = False) -> None:
        """Size of the window in CSS pixels, and the reader's scheme."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, whole: bool = True) -> None:
        """A screenshot, for people."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Errors and exceptions on the console, and what was fetched beside the page itself."""
        said = []
        for event in self.events:
            method, what = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                said.append(str(what["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning"):
                said.append(str(what["args"]))
            elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
                said.append(str(what["entry"]))
            elif method == "Network.requestWillBeSent":
                url = what["request"]["url"]
                if not url.startswith("data:") and what["type"] != "Document":
                    said.append(f"fetched {url}")
        return said


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile, closed at the end."""
    binary = found()
    assert binary, "no browser"
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()

    def connect() -> None:
        # The protocol is spoken on the descriptors 3 and 4.
        first, second = os.dup(to_browser), os.dup(from_browser)
        high = [os.dup2(first, 100), os.dup2(second, 101)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    flags = (*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank")
    process = subprocess.Popen(
        [binary, *flags], preexec_fn=connect, close_fds=False,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        browser = Browser(from_us, to_us)
        yield browser
        browser.session = None
        browser.ask("Browser.close")
    finally:
        os.close(from_us)
        os.close(to_us)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        time.sleep(0)
