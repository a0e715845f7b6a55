"""Run the web demo in a process of its own, and use it with a headless Chromium."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from paths import EXAMPLES
from patience import PATIENCE

DEMO = EXAMPLES / "web_demo.py"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1360,860",
    # Behave as without a network: resolve no host but this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SUBMIT = "[data-testid=submit-button]"
NEW_LINE = "\ue008\ue007\ue000"
"""Presses Shift and Enter, then releases Shift; Enter alone would send the question."""
ANSWER = "[data-testid=bot]"
RECORD = """
window.shown = [];
new MutationObserver(() => window.shown.push([...document.querySelectorAll(arguments[0])].map(it => it.innerText)))
    .observe(document.body, {subtree: true, childList: true, characterData: true});
"""
"""Makes the page append the visible texts of its answers to `window.shown` whenever something on it changes."""
SECONDS = PATIENCE
"""The longest time to wait for anything."""


@contextmanager
def running_demo(log: Path, *arguments: str) -> Iterator[str]:
    """Run `examples/web_demo.py` and yield its address. What it prints is written to `log`."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(log.parent)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(DEMO), "--port", str(port), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | own)
    try:
        wait_for(lambda: "Running on local URL" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(condition, seconds: float = SECONDS):
    """Call `condition` until it returns something true, and return that; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


class Page:
    """Opens the demo's page in a browser and uses it as a person does."""

    def __init__(self, url: str):
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for option in OPTIONS:
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.url = url
        self.browser = Chrome(options=options, service=Service(DRIVER))

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self.browser.quit()

    def open(self) -> None:
        """Load the page anew, without messages."""
        self.browser.get(self.url)
        wait_for(lambda: self.find("textarea") and self.is_idle())
        self.browser.execute_script(RECORD, ANSWER)

    def find(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all matching elements at one moment: the page may change between two look-ups."""
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)"
        return self.browser.execute_script(script, selector)

    def attach(self, *pictures: Path) -> None:
        wait_for(self.is_idle)
        before = len(self.find(".thumbnail-item"))
        (files,) = self.find("input[type=file]")
        self.browser.execute_script("arguments[0].value = ''", files)  # else the last ones are sent again
        files.send_keys("\n".join(map(str, pictures)))
        wait_for(lambda: len(self.find(".thumbnail-item")) == before + len(pictures))

    def ask(self, question: str) -> list[str]:
        """Send a question, and return the texts that its answer had one after the other while it grew."""
        wait_for(self.is_idle)
        before = len(self.texts(ANSWER))
        self.find("textarea")[0].send_keys(question.replace("\n", NEW_LINE))
        self.find(SUBMIT)[0].click()
        return self.watch(before)

    def watch(self, before: int) -> list[str]:
        """Wait until the answer after `before` others is complete, and return the texts that it had while it grew."""
        wait_for(lambda: self.texts(ANSWER)[before:] and self.is_idle())
        shown = self.browser.execute_script("return window.shown")
        return [text for text, _ in groupby("".join(answers[before:]) for answers in shown) if text]

    def is_idle(self) -> bool:
        """Return whether a question can be sent."""
        return bool(self.find(SUBMIT) and self.find("[data-testid=upload-button]:not([disabled])"))

    def requests(self) -> set[str]:
        """Return the addresses that the browser has requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }
