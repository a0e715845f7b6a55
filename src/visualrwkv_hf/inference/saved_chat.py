"""The file of a saved chat: a zip of `chat.json`, `pictures/*.png` and `states/*.safetensors`.

It may come from a stranger. Only text and pictures inside the file are taken from it: nothing in it names a file of
this machine or an address, entries are stored uncompressed and side by side so that all together are no larger than
the file, no two branches share a state, and counts and pixels are limited.
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from PIL import Image

from ..pictures import MAX_PIXELS, open_picture

CHAT_FILE = "chat.json"
FORMAT = "visualrwkv chat 1"
"""Stands in `chat.json`: what the file is, and which version of the rules it follows."""

PICTURE_ENTRY = re.compile(r"pictures/\d{1,6}\.png")
STATE_ENTRY = re.compile(r"states/\d{1,6}\.safetensors")
ROLES = ("system", "user", "assistant")

MAX_ENTRIES = 4096
"""Largest number of pictures, states and `chat.json` together."""
MAX_JSON_BYTES = 16 * 2**20
MAX_PICTURE_BYTES = 256 * 2**20
MAX_STATE_BYTES = 2**30
"""Largest size of one entry. The state of the largest release takes 35 MB."""
MAX_ALL_PIXELS = 4 * MAX_PIXELS
"""Largest width times height of all pictures together, some 60 photographs of 12 megapixels. A chat holds them decoded,
in 4 bytes a pixel, however few bytes the file has for them."""
MAX_BRANCHES, MAX_MESSAGES = 1024, 16384
"""Largest number of branches, and of messages in one."""


class SavedChat(NamedTuple):
    """What a file holds.

    Attributes:
        branches: name -> messages, with opened pictures in them.
        branch: the name of the one that continues.
        pictures: those that wait for the next question.
        states: branch -> bytes of its state.
    """

    branches: dict[str, list[dict[str, Any]]]
    branch: str
    pictures: list[Image.Image]
    states: dict[str, bytes]


def read_chat(path: Any) -> SavedChat:
    """Read a saved chat.

    Raises:
        ValueError: the file is not a saved chat, damaged, or over a limit.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            _check_entries(file)
            return _read(file)
    except (
        zipfile.BadZipFile,
        zlib.error,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        NotImplementedError,
        RecursionError,
        RuntimeError,  # an encrypted entry
        EOFError,
    ) as error:
        raise ValueError(f"{path} is not a saved chat, or damaged ({error}).") from error


def _check_entries(file: zipfile.ZipFile) -> None:
    entries = file.infolist()
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"it has {len(entries)} entries, at most {MAX_ENTRIES} are allowed")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {entry.filename} is compressed")
        limit = _limit_of(entry.filename)
        if entry.file_size > limit:
            raise ValueError(
                f"its entry {entry.filename} has {entry.file_size} bytes, at most {limit} are allowed"
            )
    if sum(entry.file_size for entry in entries) > file.start_dir:  # the directory comes after all entries
        raise ValueError("its entries overlap")


def _limit_of(name: str) -> int:
    if name == CHAT_FILE:
        return MAX_JSON_BYTES
    if PICTURE_ENTRY.fullmatch(name):
        return MAX_PICTURE_BYTES
    if STATE_ENTRY.fullmatch(name):
        return MAX_STATE_BYTES
    raise ValueError(f"it has an entry {name}, which no saved chat has")


def _read(file: zipfile.ZipFile) -> SavedChat:
    chat = json.loads(file.read(CHAT_FILE))
    if chat["format"] != FORMAT:
        raise ValueError(f"its format is {chat['format']!r}, this version reads {FORMAT!r}")
    if not isinstance(chat["branches"], dict) or not 0 < len(chat["branches"]) <= MAX_BRANCHES:
        raise ValueError(f"its branches must be 1 to {MAX_BRANCHES} in an object")

    pixels = PixelCount()

    @cache
    def picture_of(name: str) -> Image.Image:
        if not isinstance(name, str) or not PICTURE_ENTRY.fullmatch(name):
            raise ValueError(f"a picture must be an entry of the file, got {str(name)[:100]!r}")
        try:
            picture = Image.open(io.BytesIO(file.read(name)), formats=("PNG",))  # not decoded yet
            pixels.add(picture)
            opened = open_picture(picture).copy()  # a copy knows of no file
            opened.info.clear()  # a PNG of a few kilobytes can bring 64 MB of text
            return opened
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} is no PNG picture") from error

    branches = {}
    for name, messages in chat["branches"].items():
        _check_messages(name, messages)
        branches[name] = map_pictures(messages, picture_of)
    if chat["branch"] not in branches:
        raise ValueError(f"it has no branch {str(chat['branch'])[:100]!r}")
    waiting = [picture_of(name) for name in chat["pictures"]]
    return SavedChat(branches, chat["branch"], waiting, _states(file, chat["states"], branches))


def _check_messages(branch: str, messages: Any) -> None:
    if not branch.strip() or not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        raise ValueError(f"a branch must have a name and a list of at most {MAX_MESSAGES} messages")
    for message in messages:
        if set(message) != {"role", "content"} or message["role"] not in ROLES:
            raise ValueError(f"a message must have a role of {', '.join(ROLES)} and a content")
        content = message["content"]
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            _check_part(part)


def _check_part(part: Any) -> None:
    """Refuse what is neither a text nor a picture of this file, above all an address or a path."""
    kind = part["type"]
    if kind not in ("text", "image") or set(part) != {"type", kind} or not isinstance(part[kind], str):
        raise ValueError("a message's content must be texts and pictures of this file")


def _states(file: zipfile.ZipFile, states: Any, branches: Mapping[str, Any]) -> dict[str, bytes]:
    for branch, entry in states.items():
        if branch not in branches or not STATE_ENTRY.fullmatch(entry):
            raise ValueError("a state must belong to a branch and be an entry of the file")
    if len(set(states.values())) < len(states):
        raise ValueError("every branch must have a state of its own, and two share one")
    return {branch: file.read(entry) for branch, entry in states.items()}


class PixelCount:
    """A count of the pixels of a chat's pictures, up to `MAX_ALL_PIXELS`."""

    def __init__(self) -> None:
        self.pixels = 0

    def add(self, picture: Image.Image) -> None:
        """Count one more picture, decoded or not. Raises `ValueError` if that makes too many pixels."""
        self.pixels += picture.width * picture.height
        if self.pixels > MAX_ALL_PIXELS:
            raise ValueError(
                f"The pictures of a saved chat can have {MAX_ALL_PIXELS:,} pixels together, these have more."
            )


class ChatWriter:
    """Write a saved chat into an open zip: states first, then `finish` with the branches and their pictures.

    Entries are stored uncompressed: neither PNG files nor states get smaller. A chat of more pixels than `read_chat`
    accepts is refused.
    """

    def __init__(self, file: zipfile.ZipFile):
        self.file = file
        self.states: dict[str, str] = {}
        self._names: dict[int, str] = {}
        self._pixels = PixelCount()

    def add_state(self, branch: str, path: Any) -> None:
        """Add the state file of a branch."""
        self.states[branch] = f"states/{len(self.states) + 1}.safetensors"
        self.file.write(path, self.states[branch])

    def finish(self, branches: Mapping[str, Sequence], branch: str, pictures: Sequence[Image.Image]) -> None:
        """Add the pictures, each once, and `chat.json`.

        Raises:
            ValueError: all pictures together have more than `MAX_ALL_PIXELS`.
        """
        chat = {
            "format": FORMAT,
            "branch": branch,
            "branches": {name: map_pictures(messages, self._entry_of) for name, messages in branches.items()},
            "pictures": [self._entry_of(picture) for picture in pictures],
            "states": self.states,
        }
        self.file.writestr(CHAT_FILE, json.dumps(chat, indent=2, ensure_ascii=False) + "\n")

    def _entry_of(self, picture: Image.Image) -> str:
        if id(picture) not in self._names:
            self._pixels.add(picture)
            self._names[id(picture)] = f"pictures/{len(self._names) + 1}.png"
            picture.save(png := io.BytesIO(), "PNG")
            self.file.writestr(self._names[id(picture)], png.getvalue())
        return self._names[id(picture)]


def picture_part(picture: Any) -> dict[str, Any]:
    """Return the part of a message's content that is a picture."""
    return {"type": "image", "image": picture}


def map_pictures(messages: Sequence[Mapping], function: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Return the messages with `function(picture)` in place of every picture."""

    def mapped(part: Mapping) -> Mapping:
        return picture_part(function(part["image"])) if part["type"] == "image" else part

    return [
        {**message, "content": [mapped(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else dict(message)
        for message in messages
    ]
