"""A Chromium that a test sees pages with, over its DevTools protocol (https://chromedevtools.github.io)."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-port=0", "--window-size=1500,1000", "about:blank"),
)


class Page:
    """One page of the browser."""

    def __init__(self, socket: ClientConnection, seconds: float) -> None:
        self._socket, self._seconds, self._number = socket, seconds, 0

    def call(self, method: str, **parameters: Any) -> Any:
        """What a command of the protocol answers."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=self._seconds))
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer}"
        return answer["result"].get("value")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def wait(self, script: str) -> None:
        """Waits until an expression is true; fails with what the page shows if it stays false."""
        until = time.monotonic() + self._seconds
        while not self.run(f"Boolean(document.body && ({script}))"):
            assert time.monotonic() < until, f"never true: {script}. The page shows:\n{self.text()}"
            time.sleep(0.3)

    def sees(self, *texts: str) -> None:
        """Waits until the page shows all of these texts."""
        for text in texts:
            self.wait(f"document.body.innerText.includes({json.dumps(text)})")

    def text(self) -> str:
        return str(self.run("document.body ? document.body.innerText : ''"))

    def type(self, selector: str, text: str) -> None:
        """Types into a field as a person does, so that the page's program notices."""
        self.wait(f"document.querySelector({json.dumps(selector)})")
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> Path:
        taken = self.call("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(taken["data"]))
        return path


@contextmanager
def page(folder: Path, seconds: float) -> Iterator[Page]:
    """A new browser's page, its profile in `folder`; what it waits for may take so long."""
    process = subprocess.Popen(
        ["chromium", f"--user-data-dir={folder}", *OPTIONS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = _port(folder / "DevToolsActivePort", seconds, process)
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=seconds) as answer:
            (address,) = [
                each["webSocketDebuggerUrl"] for each in json.load(answer) if each["type"] == "page"
            ]
        with connect(address, max_size=None, open_timeout=seconds) as socket:
            yield Page(socket, seconds)
    finally:
        process.terminate()
        process.wait(30)


def _port(file: Path, seconds: float, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + seconds
    while not (file.is_file() and file.read_text().strip()):
        assert process.poll() is None and time.monotonic() < until, "the browser did not start"
        time.sleep(0.1)
    return int(file.read_text().splitlines()[0])
