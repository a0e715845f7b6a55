"""A saved chat of a stranger: only text and pictures inside the file are taken from it, and its sizes are limited."""

import io
import json
import zipfile

import pytest
from PIL import Image, PngImagePlugin

from visualrwkv_hf.inference import saved_chat
from visualrwkv_hf.inference.saved_chat import FORMAT, ChatWriter, read_chat

PICTURE = "pictures/1.png"


def png(size=(4, 3)):
    Image.new("RGB", size, "red").save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def question(image=PICTURE, **fields):
    return {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}],
    } | fields


def chat_of(*messages, **fields):
    return {
        "format": FORMAT,
        "branch": "main",
        "branches": {"main": [*messages]},
        "pictures": [],
        "states": {},
    } | fields


def write(path, chat, entries=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in ({PICTURE: png()} | (entries or {})).items():
            file.writestr(name, content)
        file.writestr("chat.json", chat if isinstance(chat, str | bytes) else json.dumps(chat))
    return path


@pytest.fixture
def nobody_connects(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"a connection was made: {arguments}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def test_what_a_writer_writes_is_read(tmp_path):
    picture = Image.new("RGB", (5, 4), "blue")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Blue."},
    ]
    with zipfile.ZipFile(tmp_path / "chat", "w") as file:
        ChatWriter(file).finish({"main": messages}, "main", [picture])
    saved = read_chat(tmp_path / "chat")
    assert saved.branches["main"][1] == messages[1] and saved.branch == "main"
    assert saved.branches["main"][0]["content"][0]["image"].tobytes() == picture.tobytes()
    assert [waiting.size for waiting in saved.pictures] == [(5, 4)]


OTHER_PLACES = [
    "http://127.0.0.1:9/picture.png",
    "https://example.invalid/picture.png",
    "file:///etc/hostname",
    "/etc/hostname",
    "../../secret.png",
    "pictures/../chat.json",
    "data:image/png;base64,AAAA",
    "chat.json",
    "",
    7,
    None,
    ["pictures/1.png"],
]


@pytest.mark.parametrize("place", OTHER_PLACES, ids=str)
def test_a_picture_is_an_entry_of_the_file_and_nothing_else(place, tmp_path, nobody_connects):
    for chat in (chat_of(question(place)), chat_of(question(), pictures=[place])):
        with pytest.raises(ValueError, match="is not a saved chat, or damaged"):
            read_chat(write(tmp_path / "chat", chat))


MESSAGES = {
    "an address as a part": {"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1:9/"}]},
    "an address beside a picture": {
        "role": "user",
        "content": [{"type": "image", "image": PICTURE, "url": "http://127.0.0.1:9/"}],
    },
    "a path": {"role": "user", "content": [{"type": "image", "path": "/etc/hostname"}]},
    "a video": {"role": "user", "content": [{"type": "video", "video": "x.mp4"}]},
    "an audio": {"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]},
    "a part of no type": {"role": "user", "content": [{"text": "?"}]},
    "a text that is none": {"role": "user", "content": [{"type": "text", "text": 7}]},
    "a number": {"role": "user", "content": 7},
    "no content": {"role": "user"},
    "another role": {"role": "tool", "content": "?"},
    "a role that is a list": {"role": ["user"], "content": "?"},
    "a field too many": {"role": "user", "content": "?", "tool_calls": []},
    "no message": 7,
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_a_message_is_text_and_pictures_only(message, tmp_path, nobody_connects):
    with pytest.raises(ValueError, match="is not a saved chat, or damaged"):
        read_chat(write(tmp_path / "chat", chat_of(message)))


FILES = {
    "deep": (b"[" * 200_000, {}),
    "no object": ("[]", {}),
    "no branch": (chat_of(branches={}), {}),
    "another branch": (chat_of(branch="other"), {}),
    "a branch without a name": (chat_of(branches={" ": []}, branch=" "), {}),
    "branches in a list": (chat_of(branches=[]), {}),
    "messages in an object": (chat_of(branches={"main": {}}), {}),
    "a state of nobody": (chat_of(states={"other": "states/1.safetensors"}), {"states/1.safetensors": b""}),
    "a state elsewhere": (chat_of(states={"main": "/etc/hostname"}), {}),
    "a state that is not there": (chat_of(states={"main": "states/1.safetensors"}), {}),
    "an entry that does not belong": (chat_of(), {"../evil": b""}),
    "a picture that is none": (chat_of(question()), {PICTURE: b"hello"}),
    "a picture of another format": (chat_of(question()), {PICTURE: b"P5 1 1 255 a"}),
    "a picture without its pixels": (chat_of(question()), {PICTURE: png()[:40]}),
}


@pytest.mark.parametrize("chat, entries", FILES.values(), ids=FILES)
def test_other_files_are_refused(chat, entries, tmp_path):
    with pytest.raises(ValueError, match="is not a saved chat, or damaged"):
        read_chat(write(tmp_path / "chat", chat, entries))


def test_what_would_unpack_to_more_than_the_file_is_refused(tmp_path):
    bomb = write(tmp_path / "chat", chat_of(), {PICTURE: bytes(10**8)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**6
    with pytest.raises(ValueError, match="is compressed"):
        read_chat(bomb)


def test_sizes_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_chat, "MAX_ENTRIES", 3)
    monkeypatch.setattr(saved_chat, "MAX_JSON_BYTES", 1000)
    monkeypatch.setattr(saved_chat, "MAX_PICTURE_BYTES", 1000)
    monkeypatch.setattr(saved_chat, "MAX_MESSAGES", 2)
    read_chat(write(tmp_path / "chat", chat_of(question())))
    for chat, entries, sentence in (
        (chat_of(), {f"pictures/{number}.png": png() for number in range(9)}, "has 10 entries, at most 3"),
        (chat_of({"role": "user", "content": "a" * 1000}), {}, "entry chat.json has .* bytes, at most 1000"),
        (chat_of(), {PICTURE: bytes(1001)}, "entry pictures/1.png has 1001 bytes, at most 1000"),
        (chat_of(*[{"role": "user", "content": "?"}] * 3), {}, "at most 2 messages"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_chat(write(tmp_path / "chat", chat, entries))


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    content = bytearray(png())
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # its header says 3.6 thousand million pixels
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="is not a saved chat, or damaged"):
        read_chat(write(tmp_path / "chat", chat_of(question()), {PICTURE: bytes(content)}))


def test_pictures_of_too_many_pixels_together_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    """Each has 12 pixels. One that a chat shows twice is decoded once, so it counts once."""
    monkeypatch.setattr(saved_chat, "MAX_ALL_PIXELS", 24)
    decoded, decode = [], saved_chat.open_picture
    monkeypatch.setattr(saved_chat, "open_picture", lambda picture: decoded.append(1) or decode(picture))
    names = [f"pictures/{number}.png" for number in (1, 2, 3)]
    entries = {name: png() for name in names}
    read_chat(write(tmp_path / "chat", chat_of(question(), question(), pictures=names[:2]), entries))
    assert len(decoded) == 2
    for chat in (chat_of(*map(question, names)), chat_of(pictures=names)):
        decoded.clear()
        with pytest.raises(ValueError, match="can have 24 pixels together, these have more"):
            read_chat(write(tmp_path / "chat", chat, entries))
        assert len(decoded) == 2


def test_a_chat_of_too_many_pixels_is_not_written(tmp_path, monkeypatch):
    """Otherwise it could be saved and never be read again."""
    monkeypatch.setattr(saved_chat, "MAX_ALL_PIXELS", 24)
    one, other, third = (Image.new("RGB", (4, 3)) for _ in range(3))
    with zipfile.ZipFile(tmp_path / "chat", "w") as file:
        ChatWriter(file).finish({"main": [question(one), question(one)]}, "main", [other])
    read_chat(tmp_path / "chat")
    with (
        zipfile.ZipFile(tmp_path / "chat", "w") as file,
        pytest.raises(ValueError, match="can have 24 pixels together"),
    ):
        ChatWriter(file).finish({"main": [question(one), question(other)]}, "main", [third])


def test_texts_of_a_picture_are_not_kept(tmp_path):
    """Every picture of a few kilobytes could bring 64 MB of them."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("bomb", "a" * 10**6, zip=True)
    Image.new("RGB", (4, 3)).save(content := io.BytesIO(), "PNG", pnginfo=texts)
    assert len(content.getvalue()) < 10**4 and "bomb" in Image.open(content).info
    chat = chat_of(question(), pictures=[PICTURE])
    (picture,) = read_chat(write(tmp_path / "chat", chat, {PICTURE: content.getvalue()})).pictures
    assert not picture.info and not hasattr(picture, "text")


STATES = ["states/1.safetensors", "states/2.safetensors"]


def chat_with_states(*states):
    branches = ["main", "other"]
    return chat_of(branches={name: [] for name in branches}, states=dict(zip(branches, states, strict=True)))


def test_a_state_that_branches_share_is_refused(tmp_path):
    """A thousand branches would each hold the whole of it."""
    entries = dict.fromkeys(STATES, b"state")
    assert read_chat(write(tmp_path / "chat", chat_with_states(*STATES), entries)).states["other"] == b"state"
    with pytest.raises(ValueError, match="every branch must have a state of its own"):
        read_chat(write(tmp_path / "chat", chat_with_states(STATES[0], STATES[0]), entries))


def test_entries_that_overlap_are_refused(tmp_path):
    """A state that lies inside another one, header and all, would let a file unpack to many times its size."""
    with zipfile.ZipFile(inner := io.BytesIO(), "w") as file:
        file.writestr(STATES[0], bytes(1000))
        entry = file.infolist()[0]
    write(path := tmp_path / "chat", chat_with_states(*STATES), {})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(STATES[1], inner.getvalue())
        outer = file.infolist()[-1]
        entry.header_offset = outer.header_offset + 30 + len(outer.filename)
        file.filelist.append(entry)
        file.NameToInfo[entry.filename] = entry
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    with pytest.raises(ValueError, match="its entries overlap"):
        read_chat(path)
