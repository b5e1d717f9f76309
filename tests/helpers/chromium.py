"""A real browser, if there is one on this machine."""

import json
import os
import select
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest


class Chromium:
    """Debian's chromium, told what to do through two pipes (DevTools protocol, messages that end with NUL)."""

    def __init__(self, home: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no chromium in PATH; on Debian: apt-get install --no-install-recommends chromium")
        commands_out, self.commands = os.pipe()
        self.answers, answers_in = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        arguments = [program, *options, "--remote-debugging-pipe", f"--user-data-dir={home}", "about:blank"]
        shell = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'  # the numbers that chromium expects
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *arguments],
            pass_fds=[commands_out, answers_in],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_out)
        os.close(answers_in)
        self.pending, self.n, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.answers], [], [], 120)
            assert ready, f"chromium has said nothing for two minutes, after {self.n} commands"
            data = os.read(self.answers, 1 << 16)
            assert data, "chromium has ended"
            self.pending += data
        first, _, self.pending = self.pending.partition(b"\0")
        return json.loads(first)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.n += 1
        command = {"id": self.n, "method": method, "params": parameters}
        command |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (answer := self.message()).get("id") != self.n:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, width: int) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        # Plots are drawn in frames to come.
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 200)))")

    def run(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[Any]:
        """Exceptions, whatever was written to the console, and what the browser itself reports, such as policies."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in names]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        self.session = None
        with suppress(AssertionError, OSError):
            self.call("Browser.close")
        os.close(self.commands)
        os.close(self.answers)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
