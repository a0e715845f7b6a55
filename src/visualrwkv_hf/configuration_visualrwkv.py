"""Configuration of VisualRWKV: a release is a configuration, never a branch in the code."""

from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .encoders import ENCODERS, pixel_inputs
from .generations import GENERATIONS
from .image_tokens import (
    ClassToken,
    ImagePosition,
    PictureNumbers,
    Pooling,
    Projector,
    Reduction,
    class_token_places,
    num_views,
)
from .scan_orders import SCANS

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "head_dim",
    "attention_size",
    "intermediate_size",
)
WORLD_VOCAB_SIZE = 65529
"""Tokens of the RWKV World vocabulary; models have up to 65536 rows."""
TURN_END_ID = 261
"""The World vocabulary's token of two line feeds, which end a turn."""

RANKS = (
    "mix_low_rank_dim",
    "decay_low_rank_dim",
    "a_low_rank_dim",
    "v_low_rank_dim",
    "gate_low_rank_dim",
)

if TYPE_CHECKING:  # what readers of a finished configuration see: `__post_init__` has filled these fields
    PartConfig = Any
    DerivedSize = Any
else:
    PartConfig = dict | PreTrainedConfig | None
    DerivedSize = int | None


@strict
class VisualRWKVTextConfig(PreTrainedConfig):
    r"""Configuration of the language model: RWKV-5 (x052), RWKV-6 (x060) or RWKV-7 (x070).

    rwkv_version (`int`, defaults to 7):
        The generation, a key of `generations.GENERATIONS`: 5, 6 or 7.
    vocab_size (`int`, defaults to 65536):
        Rows of the embedding. The RWKV World vocabulary uses ids 0 to 65535.
    hidden_size (`int`, defaults to 768):
        C, the width of the residual stream.
    num_hidden_layers (`int`, defaults to 12):
        Number of blocks.
    head_dim (`int`, defaults to 64):
        K = V, the size of a head.
    attention_size (`int`, *optional*):
        Width of the time mix, `num_attention_heads * head_dim`. Defaults to `hidden_size`.
    intermediate_size (`int`, *optional*):
        F, the width of the channel mix. Defaults to 4 C for RWKV-7, else to 3.5 C rounded down to a multiple of 32.
    mix_low_rank_dim (`int`, *optional*):
        RWKV-6: rank of the data-dependent token shift. Defaults to 32, or 64 from C = 4096 on.
    decay_low_rank_dim (`int`, *optional*):
        RWKV-6 and 7: rank of the data-dependent decay. RWKV-6 defaults to 64, or 128 from C = 4096 on.
    a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim (`int`, *optional*):
        RWKV-7: ranks of the in-context learning rate, the value residual and the gate. Checkpoints differ
        from the rule used as default (World 0.4B has gate rank 128, the rule says 160).
    layer_norm_eps (`float`, defaults to 1e-5):
        Epsilon of every LayerNorm.
    group_norm_eps (`float`, defaults to 6.4e-4):
        Epsilon of the per-head norm after the recurrence: 1e-5 times the square of the original's divisor 8.
    loss_reduction (`"sample"` or `"token"`, defaults to `"sample"`):
        Cross entropy averaged per sample and then over the batch (v6.0 and later), or over all labels (v5).
    l2_wrap (`float`, defaults to 1e-4):
        Strength of the pull on the largest logit of each position (L2Wrap); 0 turns it off.
    eos_token_id (`int` or `list[int]`, *optional*):
        Tokens that end an answer. Defaults to 0 and, with the World vocabulary, 261: the end of a turn.

    Raises `StrictDataclassError` of huggingface_hub, naming the numbers, if a field has another type or the sizes do
    not fit together.
    """

    model_type = "visualrwkv_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]

    rwkv_version: int = 7
    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    head_dim: int = 64
    attention_size: DerivedSize = None
    intermediate_size: DerivedSize = None
    mix_low_rank_dim: DerivedSize = None
    decay_low_rank_dim: DerivedSize = None
    a_low_rank_dim: DerivedSize = None
    v_low_rank_dim: DerivedSize = None
    gate_low_rank_dim: DerivedSize = None
    layer_norm_eps: float = 1e-5
    group_norm_eps: float = 64e-5
    loss_reduction: Literal["sample", "token"] = "sample"
    l2_wrap: float = 1e-4
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.eos_token_id is None:
            self.eos_token_id = [0, TURN_END_ID] if self.vocab_size >= WORLD_VOCAB_SIZE else 0
        if self.attention_size is None:
            self.attention_size = self.hidden_size
        if generation := GENERATIONS.get(self.rwkv_version):  # another version is refused below
            for name, rank in generation.ranks.items():
                if getattr(self, name) is None:
                    setattr(self, name, rank(self.hidden_size))
            if self.intermediate_size is None:
                self.intermediate_size = generation.intermediate_size(self.hidden_size)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse an unknown generation and sizes that do not fit together."""
        if self.rwkv_version not in GENERATIONS:
            known = ", ".join(map(str, GENERATIONS))
            raise ValueError(f"rwkv_version must be one of {known}, got {self.rwkv_version}.")
        for name in SIZES + RANKS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.attention_size % self.head_dim:
            raise ValueError(
                f"attention_size ({self.attention_size}) must be a multiple of head_dim ({self.head_dim})."
            )
        needs_equal = GENERATIONS[self.rwkv_version].attention_size_is_hidden_size
        if needs_equal and self.attention_size != self.hidden_size:
            raise ValueError(
                f"RWKV-{self.rwkv_version} needs attention_size ({self.attention_size}) equal to "
                f"hidden_size ({self.hidden_size})."
            )

    @property
    def num_attention_heads(self) -> int:
        return self.attention_size // self.head_dim

    @property
    def layer_types(self) -> list[str]:
        """Every layer keeps a recurrent state; this is transformers' word for it."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def number_of_conv_states(self) -> int:
        """Number of states of a layer that are tokens, such as those of its token shifts."""
        return sum(len(state.sizes) == 1 for state in GENERATIONS[self.rwkv_version].states)


class _classproperty(property):
    """A property of a class. transformers has its own from version 5.20 on."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        assert self.fget is not None
        return self.fget(owner)


@strict
class VisualRWKVVisionConfig(PreTrainedConfig):
    r"""Configuration of the vision tower: one or several stock encoders with a common forward.

    clip_config, dinov2_config, siglip_config, sam_config, resnet_config (`dict` or `PreTrainedConfig`, *optional*):
        The encoders, as configurations of transformers' `CLIPVisionModel`, `Dinov2WithRegistersModel`,
        `SiglipVisionModel`, `SamVisionModel` and `ResNetModel`: one `{name}_config` for each row of
        `encoders.ENCODERS`. At least one; none given means a SigLIP base. Features of several encoders are
        concatenated along the channels, in the order of the table. A ResNet's configuration has an `image_size` here
        (224 if none is given), which transformers' own does not need.
    feature_layer (`int`, defaults to -1):
        -1: what the encoder gives as its last hidden state. -2: what its last block reads, without the final norm
        and without class and register tokens (SAM always gives its neck's output).
    class_token (`"first"`, `"last"` or `"none"`, defaults to `"none"`):
        Whether CLIP's class token is kept, and on which side of the patches.
    tile_grid (`int`, defaults to 1):
        n > 1: a picture is seen as a whole and as n x n tiles; the tiles' maps are averaged down, put together to
        one map and concatenated to the whole view's along the channels (UHD, arXiv 2410.11665: n = 2).

    Raises `StrictDataclassError` of huggingface_hub, naming the numbers, if a field has another type, the encoders'
    grids differ or an option does not fit the encoders; `ValueError` if an encoder's configuration has another type
    or another `model_type`.
    """

    model_type = "visualrwkv_vision"
    base_config_key = "vision_config"

    feature_layer: Literal[-1, -2] = -1
    class_token: ClassToken = "none"
    tile_grid: int = 1

    @_classproperty
    def sub_configs(cls) -> dict[str, type]:
        """The encoders' configurations: transformers hands options such as the attention down to them."""
        return {f"{name}_config": AutoConfig for name in ENCODERS}

    def __post_init__(self, **kwargs):
        given = {name: kwargs.pop(f"{name}_config", None) for name in ENCODERS}
        if all(config is None for config in given.values()):
            given["siglip"] = {"image_size": 256}
        for name, config in given.items():
            setattr(self, f"{name}_config", _encoder_config(name, config))
        super().__post_init__(**kwargs)

    @property
    def encoders(self) -> dict[str, PreTrainedConfig]:
        """The configured encoders by name, in channel order."""
        configs = {name: getattr(self, f"{name}_config") for name in ENCODERS}
        return {name: config for name, config in configs.items() if config is not None}

    @property
    def pixel_inputs(self) -> dict[str, str]:
        """The name of each encoder's input, in channel order: `pixel_values` for the first."""
        return pixel_inputs(self.encoders)

    @property
    def image_sizes(self) -> dict[str, int]:
        """Side of the square picture that each encoder reads, in pixels."""
        return {name: config.image_size for name, config in self.encoders.items()}

    @property
    def grid_sizes(self) -> dict[str, int]:
        """Side of each encoder's patch grid."""
        return {
            name: ENCODERS[name].grid_size(config) // ENCODERS[name].fold
            for name, config in self.encoders.items()
        }

    @property
    def grid_size(self) -> int:
        """Side of the tower's patch grid."""
        return next(iter(self.grid_sizes.values()))

    @property
    def num_class_tokens(self) -> int:
        return sum(class_token_places(self.class_token))

    @property
    def hidden_size(self) -> int:
        """D, the channels of a patch in the tower's output."""
        widths = [ENCODERS[name].width(config) for name, config in self.encoders.items()]
        return sum(widths) * (2 if self.tile_grid > 1 else 1)

    @property
    def num_views(self) -> int:
        """Pictures that the encoders read for one picture: the whole and its tiles."""
        return num_views(self.tile_grid)

    def validate_architecture(self):
        """Refuses encoders that do not fit together."""
        for name, config in self.encoders.items():
            if problem := ENCODERS[name].problem(config):
                raise ValueError(f"{name}_config: {problem}")
        if len(set(self.grid_sizes.values())) > 1:
            raise ValueError(f"All encoders must give the same patch grid, got sides {self.grid_sizes}.")
        if self.grid_size < 1:
            raise ValueError(
                f"The patch grid is empty: image sizes {self.image_sizes}, grid sides {self.grid_sizes}."
            )
        with_class_token = [name for name, encoder in ENCODERS.items() if encoder.has_class_token]
        if self.class_token != "none" and list(self.encoders) not in [[name] for name in with_class_token]:
            raise ValueError(
                f"class_token={self.class_token!r} needs {' or '.join(with_class_token)} as the only encoder, "
                f"got {list(self.encoders)}."
            )
        if self.tile_grid < 1:
            raise ValueError(f"tile_grid must be at least 1, got {self.tile_grid}.")
        if self.tile_grid > 1 and self.class_token != "none":
            raise ValueError(
                f"A picture has no one class token with tile_grid {self.tile_grid}: class_token must be 'none', "
                f"got {self.class_token!r}."
            )
        depths = {
            name: config.num_hidden_layers
            for name, config in self.encoders.items()
            if ENCODERS[name].has_feature_layer
        }
        if min(depths.values(), default=1) < -1 - self.feature_layer:
            raise ValueError(f"feature_layer={self.feature_layer} needs encoders with a block, got {depths}.")
        if self.grid_size % self.tile_grid:
            raise ValueError(
                f"The patch grid's side ({self.grid_size}) must be a multiple of tile_grid ({self.tile_grid})."
            )


def _refuse_other_encoder(name: str, model_type: str) -> None:
    wanted = ENCODERS[name].model_type
    if model_type != wanted:
        raise ValueError(f"{name}_config must have model_type {wanted!r}, got {model_type!r}.")


def _encoder_config(name: str, given: Any) -> PreTrainedConfig | None:
    """Return an encoder's configuration, made from a dict if that is what was given."""
    if given is None:
        return None
    if isinstance(given, PreTrainedConfig):
        _refuse_other_encoder(name, given.model_type)
        missing = {
            field: value for field, value in ENCODERS[name].defaults.items() if not hasattr(given, field)
        }
        return type(given)(**(given.to_dict() | missing)) if missing else given
    if not isinstance(given, dict):
        raise ValueError(f"{name}_config must be a dict or a configuration, got {type(given).__name__}.")
    model_type = ENCODERS[name].model_type
    _refuse_other_encoder(name, given.get("model_type", model_type))
    return AutoConfig.for_model(model_type, **(ENCODERS[name].defaults | _without_model_type(given)))


@strict
class VisualRWKVConfig(PictureNumbers, PreTrainedConfig):
    r"""Configuration of VisualRWKV (arXiv 2406.13362; HD and UHD: arXiv 2410.11665).

    text_config (`dict` or [`VisualRWKVTextConfig`], *optional*):
        The language model.
    vision_config (`dict` or [`VisualRWKVVisionConfig`], *optional*):
        The vision tower.
    image_token_id (`int`, defaults to 65535):
        The placeholder: `input_ids` holds it once for every token of a picture.
    scan (`str`, defaults to `"unidirectional"`):
        In which order the layers read the patches; a name of `scan_orders.SCANS`.
    image_position (`"first"`, `"middle"` or `"last"`, defaults to `"first"`):
        Where the chat template puts the picture in a turn; "middle" is the sandwich: question, picture, question.
    pooling (`str`, defaults to `"none"`):
        How the h x h patches are reduced to fewer tokens, with g = `pooled_grid_size`:
        `"none"`; `"average"` (stride and window h // g, class token kept); `"adaptive"` (exactly g x g);
        `"mean"` (one token: the mean over everything); `"class_token"` (only the class token).
    pooled_grid_size (`int`, *optional*):
        g, for `"average"` and `"adaptive"`.
    projector (`str`, defaults to `"gated_norm"`):
        A name of `modeling_vision.PROJECTORS`: `"linear"`; `"linear_flip"` (v6.01: each token is concatenated with
        its mirror image in the sequence); `"gated"` (HD); `"relu"` (UHD); `"gated_norm"` (v7).
    compressor_num_layers (`int`, defaults to 0):
        Blocks of the Visual Token Compressor (v7.03, v7.04); 0: none.
    compressor_num_tokens (`int`, *optional*):
        Tokens that the compressor leaves, of a picture or of a tile.
    compressor_per_tile (`bool`, defaults to `False`):
        Whether `compressor_num_tokens` counts per tile (v7.04) or per picture (v7.03).
    compressor_reduction (`"pool"` or `"step"`, defaults to `"pool"`):
        Adaptive averages over the sequence, or every n-th token.

    Raises `StrictDataclassError` of huggingface_hub, naming the numbers, if a field has another type or the parts do
    not fit together.

    Example:

    ```python
    >>> from visualrwkv_hf import VisualRWKVConfig, VisualRWKVForConditionalGeneration

    >>> config = VisualRWKVConfig(
    ...     text_config={"rwkv_version": 7, "hidden_size": 128, "num_hidden_layers": 2},
    ...     vision_config={"siglip_config": {"hidden_size": 32, "num_attention_heads": 2, "image_size": 64}},
    ... )
    >>> config.num_image_tokens
    16
    ```"""

    model_type = "visualrwkv"
    sub_configs = {"text_config": VisualRWKVTextConfig, "vision_config": VisualRWKVVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]  # so that predictions are logits

    text_config: PartConfig = None
    vision_config: PartConfig = None
    image_token_id: int = 65535
    scan: str = "unidirectional"
    image_position: ImagePosition = "first"
    pooling: Pooling = "none"
    pooled_grid_size: int | None = None
    projector: Projector = "gated_norm"
    compressor_num_layers: int = 0
    compressor_num_tokens: int | None = None
    compressor_per_tile: bool = False
    compressor_reduction: Reduction = "pool"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = VisualRWKVTextConfig(**_without_model_type(self.text_config))
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = VisualRWKVVisionConfig(**_without_model_type(self.vision_config))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuses parts that do not fit together."""
        if self.scan not in SCANS:
            raise ValueError(f"scan must be one of {', '.join(SCANS)}, got {self.scan!r}.")
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id ({self.image_token_id}) must be below vocab_size ({self.text_config.vocab_size})."
            )
        self._validate_pooling()
        self._validate_compressor()

    def _validate_pooling(self):
        side, pooled = self.vision_config.grid_size, self.pooled_grid_size
        if self.pooling in ("average", "adaptive"):
            if pooled is None or not 1 <= pooled <= side:
                raise ValueError(
                    f"pooling={self.pooling!r} needs pooled_grid_size from 1 to the patch grid's side ({side}), "
                    f"got {pooled}."
                )
        elif pooled is not None:
            raise ValueError(f"pooled_grid_size ({pooled}) has no use with pooling={self.pooling!r}.")
        if self.pooling == "class_token" and self.vision_config.class_token == "none":
            raise ValueError("pooling='class_token' needs a tower with a class token, this one has none.")

    def _validate_compressor(self):
        if self.compressor_num_layers < 0:
            raise ValueError(f"compressor_num_layers must be at least 0, got {self.compressor_num_layers}.")
        if not self.compressor_num_layers:
            return
        version = self.text_config.rwkv_version
        if not GENERATIONS[version].makes_compressors:
            fitting = " or ".join(f"RWKV-{v}" for v, row in GENERATIONS.items() if row.makes_compressors)
            raise ValueError(f"The compressor is made of {fitting} blocks, got rwkv_version {version}.")
        if self.compressor_num_tokens is None or self.compressor_num_tokens < 1:
            raise ValueError(
                f"A compressor needs compressor_num_tokens of at least 1, got {self.compressor_num_tokens}."
            )
        if self.compressor_per_tile and self.compressor_num_tokens > self.num_tile_tokens:
            raise ValueError(
                f"compressor_num_tokens ({self.compressor_num_tokens}) is more than a tile has "
                f"({self.num_tile_tokens})."
            )
        if self.scan != "unidirectional":
            raise ValueError(
                f"Compressed tokens have no 2D order: scan must be 'unidirectional', got {self.scan!r}."
            )


def _without_model_type(fields: dict | None) -> dict:
    return {key: value for key, value in (fields or {}).items() if key != "model_type"}


__all__ = ["VisualRWKVConfig", "VisualRWKVTextConfig", "VisualRWKVVisionConfig"]
