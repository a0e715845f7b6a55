"""Addresses of files on the Hub: `hf://owner/repo/file[@revision]`."""

from typing import NamedTuple

from .errors import ConversionError

SCHEME = "hf://"


class HubFile(NamedTuple):
    """A file of a Hub repository."""

    repo: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}/{self.path}" + (f"@{self.revision}" if self.revision else "")


def parse_address(address: str) -> HubFile:
    """Return the file of an address `hf://owner/repo/file[@revision]`; raise `ConversionError` for anything else."""
    path, _, revision = address.removeprefix(SCHEME).partition("@")
    parts = path.split("/", 2)
    if not address.startswith(SCHEME) or len(parts) < 3 or not all(parts):
        raise ConversionError(f"{address} is not of the form {SCHEME}owner/repo/file[@revision].")
    return HubFile("/".join(parts[:2]), parts[2], revision or None)
