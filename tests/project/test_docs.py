"""Every block of code in the README and in docs/ does what it is there for, in the order of its page.

A page is executed in a folder of its own (`workplace.py`), Python blocks in one namespace. Comments above a block:

    <!-- not run: REASON -->    only shown; it stands in `NOT_RUN` as well
    <!-- needs: MODULE, ... --> left out where one of them is not installed
    <!-- file: NAME -->         what lies in the file of this name; not executed
    <!-- output -->             what the block before it prints; "..." stands for anything

`<!-- goes on from PAGE -->` anywhere on a page: the first Python block of another page comes first.
"""

import contextlib
import doctest
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hub_server import Hub
from patience import PATIENCE
from workplace import ROOT, TOKEN, USER, Workplace

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*/*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

NOT_RUN = {
    "README.md": ["sets up what runs this"] * 2,
    "docs/benchmarks/serving-cpu.md": ["takes minutes"],
    "docs/bundled-model.md": ["needs npm, takes more than an hour"],
    "docs/evaluation.md": ["installs packages", "needs a GPU"],
    "docs/fine-tuning.md": ["installs packages"] + ["needs a GPU"] * 2,
    "docs/gpu.md": ["needs a GPU"],
    "docs/performance.md": ["needs a GPU"],
    "docs/serving.md": ["installs packages", "tested in a browser"],
    "docs/start.md": ["installs packages"],
    "docs/testing.md": ["needs a GPU", "sets up what runs this"],
    "docs/vllm.md": ["installs packages", "needs vLLM", "needs Ray and vLLM", "needs Ray and vLLM"],
}
"""Page -> why blocks of it are only shown."""

BLOCK = re.compile(r"^((?:<!--[^\n]*-->\n)*)```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVERS = ("visualrwkv serve", "python examples/web_demo.py")
"""Commands that run until their page ends."""
PORT = "8000"
"""As the pages have it: a free one takes its place."""


class Block(NamedTuple):
    """A block of code on a page."""

    page: str
    line: int
    language: str
    code: str
    comments: dict[str, str]
    """Keyword -> what stands behind its colon."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def missing(self) -> list[str]:
        """Modules that it needs and that are not installed."""
        needed = filter(None, self.comments.get("needs", "").replace(" ", "").split(","))
        return [module for module in needed if importlib.util.find_spec(module) is None]


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(
            page,
            text[: found.start(3)].count("\n"),
            found[2],
            found[3],
            {
                key.strip(): value.strip()
                for key, _, value in (
                    comment.partition(":") for comment in re.findall("<!--(.*?)-->", found[1])
                )
            },
        )
        for found in BLOCK.finditer(text)
    ]


class Run:
    """A page that is being executed."""

    def __init__(self, place: Workplace, cleanup: ExitStack):
        self.place, self.cleanup = place, cleanup
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.port = free_port()
        self.printed = ""

    def execute(self, block: Block) -> None:
        code = re.sub(rf"\b{PORT}\b", str(self.port), block.code)
        if "file" in block.comments:
            (self.place.folder / block.comments["file"]).write_text(code, "utf-8")
        elif "output" in block.comments:
            check_output(block, self.printed)
        else:
            self.printed = RUNNERS[block.language](self, block._replace(code=code)) or ""

    def python(self, block: Block) -> str:
        self.place.prepare(block.code)
        code = compile("\n" * block.line + block.code, block.page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.names)
        return printed.getvalue()

    def bash(self, block: Block) -> str:
        self.place.prepare(block.code)
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        options = dict(cwd=self.place.folder, env=self.place.environment(), text=True)
        if block.code.startswith(SERVERS):
            return self.serve(command, options)
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, **options)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, command: list[str], options: dict) -> str:
        """Starts a server, and stops it when the page ends."""
        log = self.cleanup.enter_context((self.place.folder / "server.log").open("w+"))
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        self.cleanup.callback(server.wait, PATIENCE)
        self.cleanup.callback(os.killpg, server.pid, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        while not is_open(self.port):
            log.seek(0)
            assert server.poll() is None and time.monotonic() < end, log.read()
            time.sleep(0.2)
        return ""

    def json(self, block: Block) -> None:
        json.loads(block.code)

    def yaml(self, block: Block) -> None:
        yaml.safe_load(block.code)

    def shown(self, block: Block) -> None:
        """Nothing is to be done with it."""


RUNNERS: dict[str, Callable[[Run, Block], str | None]] = {
    "python": Run.python,
    "bash": Run.bash,
    "json": Run.json,
    "yaml": Run.yaml,
    "text": Run.shown,
    "bibtex": Run.shown,
}


def check_output(block: Block, printed: str) -> None:
    same = doctest.OutputChecker().check_output(
        block.code.rstrip() + "\n", printed.strip() + "\n", doctest.ELLIPSIS
    )
    assert same, f"{block}: printed was\n{printed}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({TOKEN: USER}) as hub:
        yield hub


@pytest.fixture
def run(tmp_path, monkeypatch, hub) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setattr(sys, "argv", ["page"])
    with ExitStack() as cleanup:
        yield Run(Workplace(tmp_path, hub), cleanup)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in NAMES if blocks_of(name)])
def test_blocks_of_a_page_run(page, run):
    text = (ROOT / page).read_text("utf-8")
    blocks = blocks_of(page)
    for other in re.findall(r"<!-- goes on from (\S+) -->", text):
        first = next(block for block in blocks_of(f"docs/{other}") if block.language == "python")
        run.execute(first)
    left_out = []
    for block in blocks:
        if block.missing:
            left_out.append(f"{block} for want of {', '.join(block.missing)}")
        elif "not run" not in block.comments:
            run.execute(block)
    if left_out:
        pytest.skip(f"All but {'; '.join(left_out)}")


def test_first_command_of_the_readme_answers(run):
    """Its last part; what comes before sets up the environment that runs this."""
    block = blocks_of("README.md")[0]
    ask = block.code.split(" && ")[-1].replace(".venv/bin/", "")
    assert run.bash(block._replace(code=ask)).strip() == "The word is BLOWN."


@pytest.mark.parametrize("page", NAMES)
def test_blocks_that_are_only_shown_are_known(page):
    reasons = [block.comments["not run"] for block in blocks_of(page) if "not run" in block.comments]
    assert sorted(reasons) == sorted(NOT_RUN.get(page, []))


def test_pages_with_blocks_that_are_only_shown_exist():
    assert NOT_RUN.keys() <= set(NAMES)


@pytest.mark.parametrize("page", NAMES)
def test_every_block_says_its_language_and_known_words(page):
    text = (ROOT / page).read_text("utf-8")
    blocks = blocks_of(page)
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks)
    assert {block.language for block in blocks} <= RUNNERS.keys()
    known = {"not run", "needs", "file", "output", "test command"}
    assert {word for block in blocks for word in block.comments} <= known


# Links.


def headings(page: Path) -> set[str]:
    """The names under which GitHub links to them."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", (ROOT / page).read_text("utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not heading or heading in headings(target), f"{page}: {link}"


def test_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"]
