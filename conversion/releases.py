"""The releases of VisualRWKV: one row each, for everything that depends on which release it is.

The inference of configurations, new models, model cards, `visualrwkv convert --list` and the table in the
documentation all come from `RELEASES`. A new release is a new row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .generations import ORIGINAL_GENERATIONS
from .hub_address import HubFile

if TYPE_CHECKING:  # the list of releases is printed without torch
    from visualrwkv_hf.configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig

V5_REPO, V6_REPO = "howard-hou/visualrwkv-5", "howard-hou/visualrwkv-6"
V6_PAPER = "arXiv 2406.13362, table 2"
HD_PAPER = "arXiv 2410.11665, table 3"
EAGLE_PAPER = "arXiv 2404.05892, table 6"
ORIGINAL_README = "the original repository's README"

METRICS = ("VQAv2", "ScienceQA", "TextVQA", "GQA", "VizWiz", "POPE", "MME", "MMBench", "MMBench-CN")
"""Benchmarks in the order in which they are printed."""

THREE_ENCODERS = ("dinov2", "siglip", "sam")


@dataclass(frozen=True, kw_only=True)
class ReleasedModel:
    """A checkpoint that the authors published.

    Attributes:
        title: the model's name.
        hidden_size: C of its language model, which tells the models of a release apart.
        repo: the Hub repository that its files are in.
        files: one file, or the language model and then the rest.
        num_parameters: of all tensors.
        sha256: of each file, where it is known.
        scores: what was published for it, by benchmark.
        source: where that was.
    """

    title: str
    hidden_size: int
    repo: str
    files: tuple[str, ...]
    num_parameters: int
    sha256: tuple[str | None, ...] = (None, None)
    scores: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    @property
    def num_bytes(self) -> int:
        """Size of the tensors, two bytes a number; the files have up to 0.3 MB more."""
        return 2 * self.num_parameters

    @property
    def addresses(self) -> list[str]:
        return [str(HubFile(self.repo, file)) for file in self.files]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A line of releases: what its tensors look like, and what they do not tell.

    Attributes:
        rwkv_version: the generation of its language model.
        encoders: of its vision tower, in channel order.
        views: input width of the projector, in widths of the tower.
        has_compressor: whether it has a Visual Token Compressor.
        projector: of a new model; None: the generation's (`ORIGINAL_GENERATIONS`).
        prompt_format: how it writes conversations: a name in `training.conversations.PROMPT_FORMATS`.
        scan: in which order the layers read the patches.
        image_position: where a picture is placed in its turn.
        vision: other fields of `VisualRWKVVisionConfig`.
        fields: other fields of `VisualRWKVConfig`.
        tiling: how its image processor cuts pictures into tiles.
        models: its published checkpoints.
    """

    rwkv_version: int
    encoders: tuple[str, ...]
    views: int = 1
    has_compressor: bool = False
    projector: str | None = None
    prompt_format: str
    scan: str = "unidirectional"
    image_position: str = "first"
    vision: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    tiling: str = "none"
    models: tuple[ReleasedModel, ...] = ()

    @property
    def usual_projector(self) -> str:
        """The projector of a new model."""
        return self.projector or ORIGINAL_GENERATIONS[self.rwkv_version].projector

    @property
    def start(self) -> tuple[int, tuple[str, ...]]:
        """What a new model has to fit: generation and encoders."""
        return self.rwkv_version, self.encoders

    @property
    def signature(self) -> tuple[int, tuple[str, ...], int, bool]:
        """What the tensors of a checkpoint tell of its release."""
        return self.rwkv_version, self.encoders, self.views, self.has_compressor

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of `VisualRWKVConfig` that tensors do not tell."""
        return {"scan": self.scan, "image_position": self.image_position, **self.fields}


def _pair(stem: str) -> tuple[str, str]:
    return f"{stem}_rwkv.pth", f"{stem}_visual.pth"


RELEASES = {
    "v5.0": Release(
        rwkv_version=5,
        encoders=("clip",),
        prompt_format="v5",
        vision={"class_token": "first"},
        fields={"text_config": {"loss_reduction": "token"}},
        models=(
            ReleasedModel(
                title="VisualRWKV-5 1B5",
                hidden_size=2048,
                repo=V5_REPO,
                files=_pair("rwkv1b5-vitl336p14-577token_mix665k"),
                num_parameters=1_883_359_232,
                sha256=(None, "853840358759a73ef380edf85654a5b66e3f01cd9c373ff95dbb9b8dc1452f97"),
                scores={"GQA": 48.5, "ScienceQA": 46.2, "TextVQA": 37.8, "POPE": 81.8},
                source=EAGLE_PAPER,
            ),
            ReleasedModel(
                title="VisualRWKV-5 3B",
                hidden_size=2560,
                repo=V5_REPO,
                files=_pair("rwkv3b-vitl336p14-577token_mix665k_8gpu"),
                num_parameters=3_369_127_936,
                scores={"GQA": 49.7, "ScienceQA": 58.3, "TextVQA": 46.4, "POPE": 81.4},
                source=EAGLE_PAPER,
            ),
        ),
    ),
    "v5.1": Release(
        rwkv_version=5,
        encoders=("clip",),
        prompt_format="v5",
        vision={"class_token": "last"},
        fields={"text_config": {"loss_reduction": "token"}},
    ),
    "v6.0": Release(
        rwkv_version=6,
        encoders=("clip",),
        prompt_format="v6.0",
        scan="bidirectional",
        image_position="middle",
        vision={"class_token": "last"},
        models=(
            ReleasedModel(
                title="VisualRWKV-6 1B6",
                hidden_size=2048,
                repo=V6_REPO,
                files=("VisualRWKV-v060-1B6-v1.0-20240612.pth",),
                num_parameters=1_905_477_632,
                scores={
                    "VQAv2": 69.4,
                    "GQA": 55.2,
                    "ScienceQA": 59.1,
                    "TextVQA": 43.6,
                    "POPE": 83.2,
                    "MME": 1204.9,
                    "MMBench": 55.8,
                    "MMBench-CN": 53.2,
                },
                source=V6_PAPER,
            ),
            ReleasedModel(
                title="VisualRWKV-6 3B",
                hidden_size=2560,
                repo=V6_REPO,
                files=("VisualRWKV-v060-3B-v1.0-20240612.pth",),
                num_parameters=3_405_991_936,
                scores={
                    "VQAv2": 71.5,
                    "GQA": 59.6,
                    "ScienceQA": 65.3,
                    "TextVQA": 48.7,
                    "POPE": 83.1,
                    "MME": 1369.2,
                    "MMBench": 59.5,
                    "MMBench-CN": 56.3,
                },
                source=V6_PAPER,
            ),
            ReleasedModel(
                title="VisualRWKV-6 7B",
                hidden_size=4096,
                repo=V6_REPO,
                files=("VisualRWKV-v060-7B-v1.0-20240612.pth",),
                num_parameters=7_943_448_576,
                scores={
                    "VQAv2": 75.8,
                    "GQA": 64.3,
                    "ScienceQA": 68.2,
                    "TextVQA": 51.0,
                    "POPE": 84.7,
                    "MME": 1387.8,
                    "MMBench": 65.8,
                    "MMBench-CN": 63.7,
                },
                source=V6_PAPER,
            ),
        ),
    ),
    "v6.01": Release(
        rwkv_version=6,
        encoders=("clip",),
        views=2,
        projector="linear_flip",
        prompt_format="v6.0",
        scan="multidirectional",
        image_position="middle",
        vision={"class_token": "last"},
    ),
    "hd": Release(
        rwkv_version=6,
        encoders=THREE_ENCODERS,
        projector="gated",
        prompt_format="hd",
        scan="bidirectional",
        image_position="middle",
        vision={"feature_layer": -2},
        models=(
            ReleasedModel(
                title="VisualRWKV-HD 1B6",
                hidden_size=2048,
                repo=V6_REPO,
                files=("VisualRWKV-v0612-1B6-v1.0-20241016.pth",),
                num_parameters=2_437_068_992,
                scores={
                    "ScienceQA": 54.39,
                    "TextVQA": 54.71,
                    "GQA": 60.84,
                    "VizWiz": 54.97,
                    "POPE": 86.0,
                    "MME": 1378.62,
                    "MMBench": 60.31,
                    "MMBench-CN": 55.41,
                },
                source=HD_PAPER,
            ),
        ),
    ),
    "uhd": Release(
        rwkv_version=6,
        encoders=THREE_ENCODERS,
        views=2,
        projector="relu",
        prompt_format="hd",
        scan="bidirectional",
        image_position="middle",
        vision={"feature_layer": -2, "tile_grid": 2},
        models=(
            ReleasedModel(
                title="VisualRWKV-UHD 1B6",
                hidden_size=2048,
                repo=V6_REPO,
                files=("VisualRWKV-v0613-1B6-v1.0-20241016.pth",),
                num_parameters=2_443_622_592,
                scores={
                    "ScienceQA": 56.97,
                    "TextVQA": 56.31,
                    "GQA": 59.52,
                    "VizWiz": 49.88,
                    "POPE": 85.3,
                    "MME": 1321.33,
                    "MMBench": 58.42,
                    "MMBench-CN": 52.84,
                },
                source=HD_PAPER,
            ),
        ),
    ),
    "v7.00": Release(
        rwkv_version=7,
        encoders=THREE_ENCODERS,
        prompt_format="v7.00",
        vision={"feature_layer": -2},
        models=(
            ReleasedModel(
                title="VisualRWKV-7 0B1",
                hidden_size=768,
                repo=V6_REPO,
                files=("VisualRWKV-v0700-0B1-v1.0-20250109.pth",),
                num_parameters=1_025_987_520,
                scores={"VQAv2": 75.22, "ScienceQA": 50.62, "TextVQA": 37.9, "GQA": 59.92},
                source=ORIGINAL_README,
            ),
            ReleasedModel(
                title="VisualRWKV-7 0B4",
                hidden_size=1024,
                repo=V6_REPO,
                files=("VisualRWKV-v0700-0B4-v1.0-20250109.pth",),
                num_parameters=1_286_540_480,
                scores={"VQAv2": 77.85, "ScienceQA": 54.98, "TextVQA": 41.05, "GQA": 62.3},
                source=ORIGINAL_README,
            ),
            ReleasedModel(
                title="VisualRWKV-7 1B5",
                hidden_size=2048,
                repo=V6_REPO,
                files=("VisualRWKV-v0700-1B5-v1.0-20250204.pth",),
                num_parameters=2_366_456_000,
                scores={"VQAv2": 79.84, "ScienceQA": 59.74, "TextVQA": 49.49, "GQA": 63.2},
                source=ORIGINAL_README,
            ),
        ),
    ),
    "v7.01": Release(
        rwkv_version=7,
        encoders=("siglip",),
        prompt_format="v7.01",
    ),
    "v7.02": Release(
        rwkv_version=7,
        encoders=("siglip",),
        prompt_format="v7.02",
        tiling="smallest",
    ),
    "v7.03": Release(
        rwkv_version=7,
        encoders=("siglip",),
        has_compressor=True,
        prompt_format="v7.02",
        fields={"compressor_num_tokens": 1024},
        tiling="closest",
    ),
    "v7.04": Release(
        rwkv_version=7,
        encoders=("siglip",),
        has_compressor=True,
        prompt_format="v7.02",
        fields={"compressor_num_tokens": 256, "compressor_per_tile": True},
        tiling="closest",
    ),
}
"""Among releases with the same tensors the first is inferred, and the others are asked for by their name."""


def released_model(config: "VisualRWKVConfig | VisualRWKVTextConfig") -> ReleasedModel | None:
    """Return the published model of a configuration's shape; a fine-tune of it has other scores."""
    if config.model_type == "visualrwkv_text":
        return None
    text, vision = config.text_config, config.vision_config
    for release in RELEASES.values():
        is_shape = release.start == (text.rwkv_version, tuple(vision.encoders))
        if is_shape and release.vision.get("tile_grid", 1) == vision.tile_grid:
            for model in release.models:
                if model.hidden_size == text.hidden_size:
                    return model
    return None


def known_sha256(file: HubFile) -> str | None:
    """Return the sha256 of a published file, if it is known and `file` is the file at its main revision."""
    for release in RELEASES.values():
        for model in release.models:
            for name, digest in zip(model.files, model.sha256):
                if file == HubFile(model.repo, name):
                    return digest
    return None


def release_list() -> str:
    """Return the published models as text: a block each, with what to type to convert it."""
    return "\n\n".join(
        _block(family, model) for family, release in RELEASES.items() for model in release.models
    )


def _block(family: str, model: ReleasedModel) -> str:
    lines = [f"{model.title}  (family {family}, {model.num_bytes / 1e9:.2f} GB)"]
    lines += [f"  {address}" for address in model.addresses]
    if model.scores:
        values = ", ".join(f"{name} {value}" for name, value in model.scores.items())
        lines.append(f"  expected: {values} ({model.source})")
    return "\n".join(lines)


def release_table() -> str:
    """Return the releases as a table in Markdown, for the documentation."""
    head = ["family", "published", "language model", "encoders", "projector", "scan", "pictures", "tiles"]
    rows = [
        [
            f"`{family}`",
            ", ".join(model.title.split()[-1] for model in release.models) or "code only",
            f"RWKV-{release.rwkv_version}",
            " + ".join(release.encoders),
            release.usual_projector + (", compressor" if release.has_compressor else ""),
            release.scan,
            release.image_position,
            "views" if release.vision.get("tile_grid", 1) > 1 else release.tiling,
        ]
        for family, release in RELEASES.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
