"""Original checkpoints from the Hub, and converted folders to it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .convert import EXTRAS_FILE, INDEX_FILE
from .key_map import ConversionError

SCHEME = "hf://"
STALE_FILES = ["*.safetensors", INDEX_FILE]
"""A push replaces these as a whole: shards of an earlier one, cut otherwise, would stay beside the new ones."""

assert EXTRAS_FILE.endswith(".safetensors")


class HubFile(NamedTuple):
    """A file of a Hub repository."""

    repo: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}/{self.path}" + (f"@{self.revision}" if self.revision else "")


def parse_address(address: str) -> HubFile:
    """`hf://owner/repo/file[@revision]`. Raises `ConversionError` for anything else."""
    path, _, revision = address.removeprefix(SCHEME).partition("@")
    parts = path.split("/", 2)
    if not address.startswith(SCHEME) or len(parts) < 3 or not all(parts):
        raise ConversionError(f"{address} is not of the form {SCHEME}owner/repo/file[@revision].")
    return HubFile("/".join(parts[:2]), parts[2], revision or None)


def local_file(source: str) -> Path:
    """The path of a source, downloaded before if it is an address on the Hub."""
    return download(parse_address(source)) if source.startswith(SCHEME) else Path(source)


def download(file: HubFile) -> Path:
    """The file in the Hub's cache on this machine; what was downloaded before is not downloaded again.

    Raises:
        ConversionError: in one sentence, if it is not there, not to be read with this token, or not reached.
    """
    from huggingface_hub import hf_hub_download

    with hub_sentences(file.repo, file.path, file.revision):
        return Path(hf_hub_download(file.repo, file.path, revision=file.revision))


def refuse_push(repo: str, private: bool) -> None:
    """Raises `ConversionError` if a push is bound to fail, before the long work of a conversion."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConversionError(f"{repo} is not of the form user/name.")
    if get_token() is None:
        raise ConversionError(f"Pushing to {repo} needs a token: run `hf auth login` or set HF_TOKEN.")
    with hub_sentences(repo):
        api = HfApi()
        api.whoami()
        try:
            is_private = api.model_info(repo).private
        except RepositoryNotFoundError:
            return
    if private and not is_private:
        raise ConversionError(f"{repo} is public already, and a push does not make it private.")


def upload(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Puts a model folder on the Hub in one commit: what is there stays as it was until all is uploaded.

    Args:
        folder: with the model.
        repo: "user/name"; made if there is none.
        private: whether a repository that is made is private.
        revision: a branch, made from main if there is none.

    Returns:
        str: address of the commit.

    Raises:
        ConversionError: in one sentence.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_sentences(repo, revision=revision):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Model converted by visualrwkv-hf",
            delete_patterns=STALE_FILES,
        )
    return str(done.commit_url)


@contextlib.contextmanager
def hub_sentences(repo: str, path: str = "", revision: str | None = None) -> Iterator[None]:
    """Failures of the Hub's client as sentences.

    Every exception is caught: which ones a lost connection raises depends on the HTTP library below the client.
    """
    try:
        yield
    except (ConversionError, MemoryError):
        raise
    except Exception as error:
        raise ConversionError(sentence(error, repo, path, revision or "main")) from error


def sentence(error: Exception, repo: str, path: str, revision: str) -> str:
    """What went wrong, and what to do."""
    from huggingface_hub import constants, errors

    causes = list(causes_of(error))
    kinds = {
        errors.RemoteEntryNotFoundError: f"{repo} has no file {path} at revision {revision}.",
        errors.RevisionNotFoundError: f"{repo} has no revision {revision}.",
        errors.GatedRepoError: f"{repo} is gated: accept its terms on its page, then run `hf auth login`.",
        errors.RepositoryNotFoundError: (
            f"There is no repository {repo}, or it is private and this token may not read it "
            "(`hf auth login` or HF_TOKEN gives another)."
        ),
        errors.HFValidationError: f"{repo} is not a name that a repository can have.",
        errors.OfflineModeIsEnabled: f"{repo} was not reached: HF_HUB_OFFLINE is set.",
    }
    for kind, text in kinds.items():
        if any(isinstance(cause, kind) for cause in causes):
            return text
    status = next((cause.response.status_code for cause in causes if hasattr(cause, "response")), None)
    if status == 401:
        return "The Hub does not know this token: run `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"This token may not write to {repo}."
    if status is not None:
        return f"The Hub answered with status {status} for {repo}: try again later."
    return f"The connection to the Hub at {constants.ENDPOINT} failed ({first_line(causes[-1])}): try again."


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
