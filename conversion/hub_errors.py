"""Failures of the Hub's client, turned into sentences that say what to do."""

import contextlib
from collections.abc import Iterator

from .errors import ConversionError, first_line


@contextlib.contextmanager
def hub_sentences(repo: str, path: str = "", revision: str | None = None) -> Iterator[None]:
    """Raise failures of the Hub's client as a `ConversionError` in one sentence.

    Every exception is caught: which one a lost connection raises depends on the HTTP library below the client.
    """
    try:
        yield
    except (ConversionError, MemoryError):
        raise
    except Exception as error:
        raise ConversionError(sentence(error, repo, path, revision or "main")) from error


def sentence(error: Exception, repo: str, path: str, revision: str) -> str:
    """Return what went wrong, and what to do."""
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
    """Yield an error, its cause, that one's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__
