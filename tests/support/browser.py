"""A headless Chromium that a test drives by the DevTools protocol: keys and clicks are those of a user."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
    ),
)
_START = 30
"""Seconds until a started browser has its port."""
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), " ": (32, " ")}


class Browser:
    """One page of a browser, with everything that it requested and every error of its scripts."""

    def __init__(self, connection: ClientConnection) -> None:
        """Open an empty page."""
        self._connection = connection
        self._number = 0
        self._session = ""
        self.requests: list[str] = []
        """Addresses of all requests, in their order."""
        self.problems: list[str] = []
        """Exceptions, messages of the log (such as a violated policy), and dialogs."""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    def open(self, path: Path, fragment: str = "", width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a file at a width, in the scheme "light" or "dark"; a width below 600 is that of a phone."""
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._send("Page.navigate", url="about:blank")  # another fragment alone would not load the file again
        self._send("Page.navigate", url=path.as_uri() + (f"#{fragment}" if fragment else ""))
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of an expression of JavaScript."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 10) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} is not true after {seconds} s"
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        """Return the visible text of every element that a selector matches."""
        return self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.innerText.trim())"
        )

    def click(self, selector: str) -> None:
        """Click at the center of the first element that a selector matches."""
        quoted = json.dumps(selector)
        x, y = self.evaluate(
            f"(() => {{ const each = document.querySelector({quoted}); each.scrollIntoView({{block: 'center'}});"
            " const box = each.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key."""
        code, text = _KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self._send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Enter a text into the element that has the focus."""
        self._send("Input.insertText", text=text)

    def keep_downloads(self, folder: Path) -> None:
        """Save downloads in a folder."""
        self._send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def emulate_print(self) -> None:
        """Show the page as it is printed."""
        self._send("Emulation.setEmulatedMedia", media="print")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the complete page."""
        answer = self._send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def print_pdf(self, path: Path) -> None:
        """Write the page as a PDF, in its own format."""
        answer = self._send("Page.printToPDF", preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and return its result; events that arrive before it are recorded."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._connection.send(json.dumps(message))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._record(answer.get("method", ""), answer.get("params", {}))

    def _record(self, event: str, values: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(values["exceptionDetails"]))
        elif event == "Log.entryAdded" and values["entry"]["level"] in ("warning", "error"):
            self.problems.append(values["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {values['message']}")


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile in a folder, and stop it at the end."""
    assert CHROMIUM
    log = folder / "chromium.log"
    with log.open("wb") as errors:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        running = subprocess.Popen(command, stdout=errors, stderr=errors)
    try:
        port, path = _wait_for_port(folder / "profile" / "DevToolsActivePort", running, log)
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
            yield Browser(connection)
    finally:
        running.terminate()
        running.wait(timeout=20)


def _wait_for_port(file: Path, running: subprocess.Popen[bytes], log: Path) -> list[str]:
    """Return the port and the path that a started browser writes into a file."""
    end = time.monotonic() + _START
    while time.monotonic() < end and running.poll() is None:
        if file.exists() and len(lines := file.read_text().splitlines()) == 2:
            return lines
        time.sleep(0.05)
    raise AssertionError(log.read_text(errors="replace"))
