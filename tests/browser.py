"""Chromium without a window, driven through its debugging pipe (Chrome DevTools Protocol)."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
# key -> (its virtual key code, the text it types)
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
PATIENCE = 60.0  # seconds for an answer of the browser


class Browser:
    """One tab. Skips the test on a machine without Chromium; `close` ends the process."""

    def __init__(self, profile: Path):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip("no chromium on this machine; apt-get install chromium")
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # the browser's ends get numbers that the redirections do not overwrite
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (read, write)]
        command = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
        flags = [*FLAGS.split(), "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *flags, "about:blank"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (read, write, *ends):
            os.close(fd)
        self._last, self._received, self._session = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self.call("Runtime.enable")

    def call(self, method: str, **params) -> dict:
        """The answer to a command of the protocol. An exception in the page fails the test."""
        self._last += 1
        command = {"id": self._last, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                if not select.select([self._read], [], [], PATIENCE)[0]:
                    raise TimeoutError(f"no answer to {method}")
                piece = os.read(self._read, 1 << 20)
                if not piece:
                    raise EOFError(f"the browser ended during {method}")
                self._received += piece
            message, _, self._received = self._received.partition(b"\0")
            answer = json.loads(message)
            assert answer.get("method") != "Runtime.exceptionThrown", answer
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.02)
        raise TimeoutError(f"never true: {script}")

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """A fresh page of this size, in CSS pixels."""
        self.call("Page.navigate", url="about:blank")  # another fragment alone loads nothing
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def press(self, *keys: str) -> None:
        for key in keys:
            code, text = KEYS[key]
            same = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
            self.call("Input.dispatchKeyEvent", **same, **down)
            self.call("Input.dispatchKeyEvent", **same, type="keyUp")

    def click(self, script: str) -> None:
        """A click of the mouse at the middle of the element that the expression names."""
        middle = (
            "(e => { e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); "
        )
        middle += f"return [r.x + r.width / 2, r.y + r.height / 2]; }})({script})"
        x, y = self.run(middle)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path | None = None) -> bytes:
        """What the tab shows, as PNG."""
        content = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        if path:
            path.write_bytes(content)
        return content

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._read)
        os.close(self._write)
