"""Original checkpoints from the Hub, and converted folders to it."""

from collections.abc import Callable
from pathlib import Path

from .checkpoint import sha256_of
from .errors import ConversionError
from .folders import EXTRAS_FILE, INDEX_FILE
from .hub_address import SCHEME, HubFile, parse_address
from .hub_errors import hub_sentences
from .releases import known_sha256

DIGITS = "[0-9]" * 5
STALE_FILES = ["model.safetensors", f"model-{DIGITS}-of-{DIGITS}.safetensors", INDEX_FILE, EXTRAS_FILE]
"""A push deletes the old ones of these: shards of another number would otherwise stay beside the new ones.

The Hub's client matches them with paths, where `*` would match `/` as well: files in folders stay.
"""


def local_file(source: str, say: Callable[[str], None] = lambda sentence: None) -> Path:
    """Return the path of a source, downloaded before if it is an address on the Hub.

    Args:
        source: a path or `hf://owner/repo/file[@revision]`.
        say: told whether a download is the published file, bit for bit, or that this is not known.

    Raises:
        ConversionError: in one sentence; also if a download is not the file that was published.
    """
    if not source.startswith(SCHEME):
        return Path(source)
    file = parse_address(source)
    path = download(file)
    if refuse_other_contents(file, path):
        say(f"{file}: its sha256 is that of the published file.")
    else:
        say(f"{file}: no sha256 of the published file is known, so this download was compared with none.")
    return path


def refuse_other_contents(file: HubFile, path: Path) -> bool:
    """Compare a download with the sha256 of the published file; return whether that is known.

    Raises:
        ConversionError: if they differ.
    """
    expected = known_sha256(file)
    if expected is None:
        return False
    found = sha256_of(path)
    if found != expected:
        raise ConversionError(
            f"{path} is not the released file: its sha256 is {found}, that of the release is {expected}. "
            "Delete it and try again."
        )
    return True


def download(file: HubFile) -> Path:
    """Return the file in the Hub's cache on this machine; what was downloaded before is not downloaded again.

    Raises:
        ConversionError: in one sentence, if it is not there, may not be read with this token, or is not reached.
    """
    from huggingface_hub import hf_hub_download

    with hub_sentences(file.repo, file.path, file.revision):
        return Path(hf_hub_download(file.repo, file.path, revision=file.revision))


def refuse_push(repo: str, private: bool) -> None:
    """Raise `ConversionError` if a push is bound to fail, before the long work of a conversion."""
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
    """Put a model folder on the Hub in one commit: what is there stays as it is until all is uploaded.

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
