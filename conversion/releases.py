"""The checkpoints that the authors released on the Hub."""

from typing import NamedTuple

from .hub_files import HubFile
from .model_card import PUBLISHED, Scores

V5, V6 = "howard-hou/visualrwkv-5", "howard-hou/visualrwkv-6"


class Release(NamedTuple):
    """A released checkpoint: where it is, and what should come out."""

    name: str
    family: str
    """As in `infer_config.FAMILIES`."""
    repo: str
    files: tuple[str, ...]
    """One file, or the language model and then the rest."""
    num_parameters: int
    shape: tuple[int, str, int, int]
    """Its row in `model_card.PUBLISHED`."""
    sha256: tuple[str | None, ...] = (None, None)
    """Of the files, where it is known."""

    @property
    def num_bytes(self) -> int:
        """Of the tensors, two bytes a number; the files have up to 0.3 MB more."""
        return 2 * self.num_parameters

    @property
    def addresses(self) -> list[str]:
        return [str(HubFile(self.repo, file)) for file in self.files]

    @property
    def scores(self) -> Scores | None:
        return PUBLISHED.get(self.shape)


def _pair(stem: str) -> tuple[str, str]:
    return f"{stem}_rwkv.pth", f"{stem}_visual.pth"


RELEASES = (
    Release(
        "VisualRWKV-5 1B5",
        "v5.0",
        V5,
        _pair("rwkv1b5-vitl336p14-577token_mix665k"),
        1_883_359_232,
        (5, "clip", 1, 2048),
        (None, "853840358759a73ef380edf85654a5b66e3f01cd9c373ff95dbb9b8dc1452f97"),
    ),
    Release(
        "VisualRWKV-5 3B",
        "v5.0",
        V5,
        _pair("rwkv3b-vitl336p14-577token_mix665k_8gpu"),
        3_369_127_936,
        (5, "clip", 1, 2560),
    ),
    Release(
        "VisualRWKV-6 1B6",
        "v6.0",
        V6,
        ("VisualRWKV-v060-1B6-v1.0-20240612.pth",),
        1_905_477_632,
        (6, "clip", 1, 2048),
    ),
    Release(
        "VisualRWKV-6 3B",
        "v6.0",
        V6,
        ("VisualRWKV-v060-3B-v1.0-20240612.pth",),
        3_405_991_936,
        (6, "clip", 1, 2560),
    ),
    Release(
        "VisualRWKV-6 7B",
        "v6.0",
        V6,
        ("VisualRWKV-v060-7B-v1.0-20240612.pth",),
        7_943_448_576,
        (6, "clip", 1, 4096),
    ),
    Release(
        "VisualRWKV-HD 1B6",
        "hd",
        V6,
        ("VisualRWKV-v0612-1B6-v1.0-20241016.pth",),
        2_437_068_992,
        (6, "dinov2", 1, 2048),
    ),
    Release(
        "VisualRWKV-UHD 1B6",
        "uhd",
        V6,
        ("VisualRWKV-v0613-1B6-v1.0-20241016.pth",),
        2_443_622_592,
        (6, "dinov2", 2, 2048),
    ),
    Release(
        "VisualRWKV-7 0B1",
        "v7.00",
        V6,
        ("VisualRWKV-v0700-0B1-v1.0-20250109.pth",),
        1_025_987_520,
        (7, "dinov2", 1, 768),
    ),
    Release(
        "VisualRWKV-7 0B4",
        "v7.00",
        V6,
        ("VisualRWKV-v0700-0B4-v1.0-20250109.pth",),
        1_286_540_480,
        (7, "dinov2", 1, 1024),
    ),
    Release(
        "VisualRWKV-7 1B5",
        "v7.00",
        V6,
        ("VisualRWKV-v0700-1B5-v1.0-20250204.pth",),
        2_366_456_000,
        (7, "dinov2", 1, 2048),
    ),
)


def release_table() -> str:
    """The releases as text: a block each, with what to type to convert it."""
    return "\n\n".join(_block(release) for release in RELEASES)


def _block(release: Release) -> str:
    size = f"{release.num_bytes / 1e9:.2f} GB"
    lines = [f"{release.name}  (family {release.family}, {size})"]
    lines += [f"  {address}" for address in release.addresses]
    if release.scores:
        values = ", ".join(f"{name} {value}" for name, value in release.scores.values.items())
        lines.append(f"  expected: {values} ({release.scores.source})")
    return "\n".join(lines)
