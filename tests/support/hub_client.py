"""Use another server than the Hub, in a new process because the Hub's client reads the address when it is imported."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from patience import PATIENCE

SECONDS = PATIENCE
LONGEST_WAIT = 0.05
"""The longest wait between two tries, in seconds; by itself the client waits for up to 8 s."""


class Answer(NamedTuple):
    """Holds the exit code and the output of a command."""

    code: int
    out: str
    err: str


def hub_environment(endpoint: str, cache: Path, token: str | None = None) -> dict[str, str]:
    """Return the environment variables for a process whose Hub is at `endpoint`."""
    ours = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    strange = {"HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"}
    kept = {name: value for name, value in os.environ.items() if name not in strange}
    return kept | ours | ({"HF_TOKEN": token} if token else {})


class Client:
    """Calls functions of this module in the other process."""

    def __init__(self, pool: ProcessPoolExecutor):
        self._pool = pool

    def __call__(self, function: Callable, *args: Any, token: str | None = None, **kwargs: Any) -> Any:
        return self._pool.submit(with_token, token, function, args, kwargs).result(timeout=SECONDS)


@contextmanager
def client_process(endpoint: str, cache: Path) -> Iterator[Client]:
    environment = hub_environment(endpoint, cache)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=hurry) as pool:
        with mock.patch.dict(os.environ, environment, clear=True):
            pool.submit(os.getpid).result(timeout=SECONDS)  # starts it, with these variables
        yield Client(pool)


def hurry() -> None:
    """Make the client wait less between its tries."""
    import time

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, LONGEST_WAIT))


def with_token(token: str | None, function: Callable, args: tuple, kwargs: dict) -> Any:
    with mock.patch.dict(os.environ, {"HF_TOKEN": token} if token else {}):
        return function(*args, **kwargs)


def convert(*arguments: str | Path) -> Answer:
    """Run `visualrwkv convert` with these arguments."""
    return run("convert", *arguments)


def run(*arguments: str | Path) -> Answer:
    """Run `visualrwkv` with these arguments."""
    # Import these before the runner replaces stderr: they keep the stream that they find.
    import huggingface_hub.utils  # noqa: F401
    import transformers.utils  # noqa: F401
    from typer.testing import CliRunner

    from visualrwkv_hf.cli.app import app

    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


def push_model(folder: str, repo: str, **kwargs: Any) -> None:
    """Push the model and the processor of a folder, each with its own `push_to_hub`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import visualrwkv_hf  # noqa: F401

    AutoModelForImageTextToText.from_pretrained(folder).push_to_hub(repo, **kwargs)
    AutoProcessor.from_pretrained(folder).push_to_hub(repo, **kwargs)


def save_and_push(folder: str, target: str, name: str, token: str) -> None:
    """Save a model with `save_pretrained(push_to_hub=True)`, which pushes it as well."""
    from visualrwkv_hf import VisualRWKVForConditionalGeneration

    model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(target, push_to_hub=True, repo_id=name, private=True, token=token)


def weights_of(name: str, **kwargs: Any) -> dict[str, bytes]:
    """Load a model by its name, and return the bytes of every tensor."""
    from transformers import AutoModelForImageTextToText

    from visualrwkv_hf.conversion.checkpoint import as_bytes

    model = AutoModelForImageTextToText.from_pretrained(name, **kwargs)
    return {name: as_bytes(tensor).numpy().tobytes() for name, tensor in model.state_dict().items()}


def push_and_pull_state(folder: str, name: str, token: str) -> tuple[str, str]:
    """Push the tuned state of a folder and read it back. Return its identity before and after."""
    from visualrwkv_hf import TunedState

    state = TunedState.from_pretrained(folder)
    state.push_to_hub(name, token=token, private=True)
    return state.identity, TunedState.from_pretrained(name, token=token).identity


def refusal_of_state(name: str) -> str:
    """Return the message of the error for a repository without a tuned state."""
    from visualrwkv_hf import TunedState

    try:
        TunedState.from_pretrained(name)
    except OSError as error:
        return str(error)
    raise AssertionError("nothing was refused")
