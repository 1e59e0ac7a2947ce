"""A real headless Chromium, driven through its DevTools protocol over a pipe: no package, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE_SECONDS = 30


def chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process for many pages. What goes wrong in a page is collected in `complaints`, what it asks for in `requests`."""

    def __init__(self) -> None:
        program = chromium()
        assert program, "there is no Chromium"
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def wire() -> None:  # the protocol's ends are 3 and 4
            high_in, high_out = os.dup2(theirs_in, 50), os.dup2(theirs_out, 51)
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        command = [program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]
        command += [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command,
            preexec_fn=wire,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        os.set_blocking(self._in, False)
        self._rest, self._number = b"", 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(
        self,
        address: str,
        width: int,
        height: int,
        dark: bool = False,
        drawn: str = "document.documentElement?.dataset.drawn == 'yes'",
    ) -> None:
        """Load a page and wait until it is drawn, its charts too."""
        self.complaints.clear()
        self.requests.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.scheme(dark)
        self._call("Page.navigate", url=address)
        self.wait_for(drawn)
        self.settle()

    def scheme(self, dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def settle(self) -> None:
        """Two frames: what was asked to be drawn is drawn."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; of a promise what it gives."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        limit = time.monotonic() + PATIENCE_SECONDS
        while not self.js(expression):
            assert time.monotonic() < limit, f"never true: {expression}; {self.complaints}"
            time.sleep(0.02)

    def move(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """`code`: of Windows; `modifiers`: 2 is Ctrl, 4 is Cmd."""
        text = {"text": "\r"} if key == "Enter" and not modifiers else {}  # without it no form is sent
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
                **text,
            )

    def picture(self, path: Path, whole: bool = False) -> None:
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    # -- the protocol: JSON messages, each ended by a zero byte ---------------------------------------------------

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._read(lambda found: found.get("id") == self._number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        limit = time.monotonic() + PATIENCE_SECONDS
        while True:
            text, zero, rest = self._rest.partition(b"\0")
            if zero:
                self._rest = rest
                message = json.loads(text)
                if wanted(message):
                    return message
                self._notice(message)
                continue
            assert time.monotonic() < limit and self._process.poll() is None, "Chromium no longer answers"
            try:
                self._rest += os.read(self._in, 2**20)
            except BlockingIOError:
                time.sleep(0.002)

    def _notice(self, message: dict[str, Any]) -> None:
        found, what = message.get("params", {}), message.get("method")
        if what == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.complaints.append(
                " ".join(str(item.get("value", item.get("description"))) for item in found["args"])
            )
        elif what == "Runtime.exceptionThrown":
            self.complaints.append(str(found["exceptionDetails"].get("exception", found["exceptionDetails"])))
        elif what == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(found["entry"]["text"])
        elif what == "Network.requestWillBeSent" and not found["request"]["url"].startswith("data:"):
            self.requests.append(found["request"]["url"])
