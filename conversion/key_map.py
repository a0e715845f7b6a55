"""Names of tensors in the original checkpoints and in ours, as tables that are read in both directions.

A table row is (original pattern, our pattern, transform). `{l}` stands for the index of a block, `{a,b}` for
one row per alternative. `key_rows(config)` writes the tables out for one model; the rest works on such rows.
"""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import (
    VisualRWKVConfig,
    VisualRWKVTextConfig,
    VisualRWKVVisionConfig,
)
from visualrwkv_hf.encoders import ENCODERS

from .errors import ConversionError
from .generations import ORIGINAL_GENERATIONS


class Transform(NamedTuple):
    """One tensor of the original as tensors of ours, and back, without loss."""

    to_ours: Callable[[Tensor], tuple[Tensor, ...]]
    to_original: Callable[..., Tensor]


class Row(NamedTuple):
    """One tensor of the original and what becomes of it.

    `ours` is empty for a tensor that no computation reads: it may be missing from a checkpoint.
    """

    original: str
    ours: tuple[str, ...]
    transform: Transform

    @property
    def is_unused(self) -> bool:
        return not self.ours


def _without_class_position(position: Tensor) -> Tensor:
    if not position.is_meta and position[:, 0].any():
        raise ConversionError(
            "The position embedding of DINOv2's class token is not zero: the original cannot hold it."
        )
    return position[:, 1:]  # [1, L, D]


SAME = Transform(lambda x: (x,), lambda x: x)
FUSED_QKV = Transform(
    lambda qkv: qkv.chunk(3), lambda q, k, v: torch.cat((q, k, v))
)  # [3 D, …] <-> 3 x [D, …]
BATCH_OF_ONE = Transform(lambda x: (x.squeeze(0),), lambda x: x.unsqueeze(0))  # [1, L, D] <-> [L, D]
# timm's DINOv2 adds positions to patches only, transformers' to [class, patches]: the class token's is zero.
NO_CLASS_POSITION = Transform(
    lambda x: (torch.cat((x.new_zeros(1, 1, x.shape[-1]), x), dim=1),),  # [1, L, D] <-> [1, 1 + L, D]
    _without_class_position,
)


def _alternatives(pattern: str) -> list[str]:
    """`"a.{b,c}"` -> `["a.b", "a.c"]`; a placeholder without a comma stays."""
    pieces = re.split(r"\{([^{}]*,[^{}]*)\}", pattern)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _renamed(original: str, ours: str | Sequence[str], transform: Transform = SAME) -> list[Row]:
    ours = [ours] if isinstance(ours, str) else ours
    names = [_alternatives(pattern) for pattern in ours]
    return [Row(name, group, transform) for name, group in zip(_alternatives(original), zip(*names))]


def _same(*patterns: str) -> list[Row]:
    return [Row(name, (name,), SAME) for pattern in patterns for name in _alternatives(pattern)]


def _unused(*patterns: str) -> list[Row]:
    return [Row(name, (), SAME) for pattern in patterns for name in _alternatives(pattern)]


# Language model. Its blocks are in `generations.ORIGINAL_GENERATIONS`.

RWKV_ENDS = [
    *_renamed("blocks.0.ln0.{weight,bias}", "embed_norm.{weight,bias}"),
    *_renamed("ln_out.{weight,bias}", "norm.{weight,bias}"),
]
RWKV_EMBEDDING = _renamed("emb.weight", "embed_tokens.weight")
RWKV_HEAD = _renamed("head.weight", "lm_head.weight")

# Vision encoders of transformers (`vit.vision_model.*`): our names are the original's.

CLIP = [
    *_same(
        "embeddings.{class_embedding,patch_embedding.weight,position_embedding.weight}",
        "pre_layrnorm.{weight,bias}",
    ),
    *_unused("embeddings.position_ids", "post_layernorm.{weight,bias}"),  # only pooled outputs pass that norm
]
SIGLIP = [
    *_same("embeddings.patch_embedding.{weight,bias}", "embeddings.position_embedding.weight"),
    *_unused(
        "embeddings.position_ids",
        "head.probe",
        "head.attention.{in_proj_weight,in_proj_bias}",
        "head.{attention.out_proj,layernorm,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
]
SIGLIP_END = _same("post_layernorm.{weight,bias}")
HF_VIT_BLOCK = _same(
    "encoder.layers.{l}.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    "encoder.layers.{l}.self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
)

# timm's VisionTransformer as DINOv2 with registers and as SigLIP.

TIMM_DINOV2 = [
    *_renamed("{cls_token,reg_token}", "embeddings.{cls_token,register_tokens}"),
    *_renamed("pos_embed", "embeddings.position_embeddings", NO_CLASS_POSITION),
    *_renamed("patch_embed.proj.{weight,bias}", "embeddings.patch_embeddings.projection.{weight,bias}"),
]
TIMM_DINOV2_BLOCK = [
    *_renamed(
        "blocks.{l}.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
        "encoder.layer.{l}.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
    *_renamed(
        "blocks.{l}.attn.qkv.{weight,bias}",
        [f"encoder.layer.{{l}}.attention.{name}_proj.{{weight,bias}}" for name in "qkv"],
        FUSED_QKV,
    ),
    *_renamed("blocks.{l}.attn.proj.{weight,bias}", "encoder.layer.{l}.attention.o_proj.{weight,bias}"),
    *_renamed("blocks.{l}.{ls1,ls2}.gamma", "encoder.layer.{l}.{layer_scale1,layer_scale2}.lambda1"),
]
TIMM_DINOV2_END = _renamed("norm.{weight,bias}", "layernorm.{weight,bias}")

TIMM_SIGLIP = [
    *_renamed("pos_embed", "embeddings.position_embedding.weight", BATCH_OF_ONE),
    *_renamed("patch_embed.proj.{weight,bias}", "embeddings.patch_embedding.{weight,bias}"),
    *_unused(
        "attn_pool.latent",
        "attn_pool.{q,kv,proj,norm,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
]
TIMM_SIGLIP_BLOCK = [
    *_renamed(
        "blocks.{l}.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
        "encoder.layers.{l}.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
    *_renamed(
        "blocks.{l}.attn.qkv.{weight,bias}",
        [f"encoder.layers.{{l}}.self_attn.{name}_proj.{{weight,bias}}" for name in "qkv"],
        FUSED_QKV,
    ),
    *_renamed("blocks.{l}.attn.proj.{weight,bias}", "encoder.layers.{l}.self_attn.out_proj.{weight,bias}"),
]
TIMM_SIGLIP_END = _renamed("norm.{weight,bias}", "post_layernorm.{weight,bias}")

# segment-anything's image encoder.

SAM = [
    *_same("pos_embed"),
    *_renamed("patch_embed.proj.{weight,bias}", "patch_embed.projection.{weight,bias}"),
    *_renamed("neck.{0,2}.weight", "neck.{conv1,conv2}.weight"),
    *_renamed("neck.{1,3}.{weight,bias}", "neck.{layer_norm1,layer_norm2}.{weight,bias}"),
]
SAM_BLOCK = [
    *_renamed("blocks.{l}.{norm1,norm2}.{weight,bias}", "layers.{l}.{layer_norm1,layer_norm2}.{weight,bias}"),
    *_renamed(
        "blocks.{l}.{attn.qkv,attn.proj,mlp.lin1,mlp.lin2}.{weight,bias}",
        "layers.{l}.{attn.qkv,attn.proj,mlp.lin1,mlp.lin2}.{weight,bias}",
    ),
    *_renamed("blocks.{l}.attn.{rel_pos_h,rel_pos_w}", "layers.{l}.attn.{rel_pos_h,rel_pos_w}"),
]

PROJECTOR = {
    "linear": _same("proj.weight"),
    "linear_flip": _same("proj.weight"),
    "gated": _same("{proj,gate,o_proj}.weight"),
    "relu": [*_same("{proj,o_proj}.weight"), *_unused("gate.weight")],
    "gated_norm": _same("{gate,o_proj}.weight", "ln_v.{weight,bias}"),
}
# A linear projector is the module itself in the original: its weight carries no name of its own.
PROJECTOR_PREFIX = {"linear": "", "linear_flip": ""}

SCAN_BUFFERS = _unused("{spiral,snake,zigzag}_order")
"""Index tables that models trained with such a scan carry along; we compute them."""


class VitTable(NamedTuple):
    """How the original names an encoder's tensors: a prefix, and rows once, per block, and after the last block."""

    prefix: str
    ends: list[Row]
    block: list[Row]
    final: list[Row] = []


HF_ENCODERS = {
    "clip": VitTable("vit.vision_model.", CLIP, HF_VIT_BLOCK),
    "siglip": VitTable("vit.vision_model.", SIGLIP, HF_VIT_BLOCK, SIGLIP_END),
}
FEATURIZERS = {
    "dinov2": VitTable("vit.dino_featurizer.", TIMM_DINOV2, TIMM_DINOV2_BLOCK, TIMM_DINOV2_END),
    "siglip": VitTable("vit.siglip_featurizer.", TIMM_SIGLIP, TIMM_SIGLIP_BLOCK, TIMM_SIGLIP_END),
    "sam": VitTable("vit.sam_featurizer.", SAM, SAM_BLOCK),
}


def _written_out(
    rows: Iterable[Row], original: str, ours: str, layers: Iterable[int] = (0,)
) -> Iterator[Row]:
    """Return the rows once per layer, with the layer's index and both sides' prefixes."""
    for layer in layers:
        for row in rows:
            names = tuple(ours + name.replace("{l}", str(layer)) for name in row.ours)
            yield Row(original + row.original.replace("{l}", str(layer)), names, row.transform)


def _as_unused(rows: Iterable[Row]) -> list[Row]:
    return [row._replace(ours=()) for row in rows]


def rwkv_rows(rwkv_version: int, num_layers: int, original: str, ours: str) -> Iterator[Row]:
    """Blocks and both norms around them: of the language model or of the compressor."""
    generation = ORIGINAL_GENERATIONS[rwkv_version]
    yield from _written_out(RWKV_ENDS, original, ours)
    for layer in range(num_layers):
        after_first = _same(*generation.after_first) if layer else _unused(*generation.after_first)
        block = _same(*generation.block) + after_first
        yield from _written_out(block, f"{original}blocks.{layer}.", f"{ours}layers.{layer}.")


def language_model_rows(config: VisualRWKVTextConfig, ours: str) -> Iterator[Row]:
    yield from _written_out(RWKV_EMBEDDING, "rwkv.", ours)
    yield from rwkv_rows(config.rwkv_version, config.num_hidden_layers, "rwkv.", ours)
    yield from _written_out(RWKV_HEAD, "rwkv.", "")


def vision_rows(config: VisualRWKVVisionConfig, ours: str = "model.vision_tower.") -> Iterator[Row]:
    """Yield the rows of every encoder; what comes after `feature_layer` is unused.

    Raises:
        ConversionError: for encoders that no original puts into one tower.
    """
    encoders = config.encoders
    tables = HF_ENCODERS if encoders.keys() <= HF_ENCODERS.keys() and len(encoders) == 1 else FEATURIZERS
    if tables is FEATURIZERS and encoders.keys() != FEATURIZERS.keys():
        raise ConversionError(
            f"The original has no tower of {' + '.join(encoders)}: its towers are {', '.join(HF_ENCODERS)}, "
            f"or {' + '.join(FEATURIZERS)}."
        )
    for name, encoder in encoders.items():
        table, prefix, depth = tables[name], f"{ours}{name}.", encoder.num_hidden_layers
        is_cut = config.feature_layer == -2 and ENCODERS[name].has_feature_layer
        yield from _written_out(table.ends, table.prefix, prefix)
        yield from _written_out(table.block, table.prefix, prefix, range(depth - is_cut))
        if is_cut:
            yield from _written_out(_as_unused(table.block), table.prefix, prefix, [depth - 1])
        yield from _written_out(_as_unused(table.final) if is_cut else table.final, table.prefix, prefix)


def projector_rows(projector: str, ours: str = "model.multi_modal_projector.") -> Iterator[Row]:
    return _written_out(PROJECTOR[projector], PROJECTOR_PREFIX.get(projector, "proj."), ours)


def key_rows(config: VisualRWKVConfig | VisualRWKVTextConfig, *, with_vision: bool = True) -> list[Row]:
    """Return every row of one model, in the order of its forward pass.

    Args:
        config: of the whole model, or of a language model alone.
        with_vision: whether the checkpoint holds the vision tower.

    Returns:
        list[Row]: original names below `rwkv.`, `vit.`, `proj.` and `vtc.`; ours as in the state dict.
    """
    if isinstance(config, VisualRWKVTextConfig):
        return list(language_model_rows(config, "model."))
    rows = list(vision_rows(config.vision_config)) if with_vision else []
    rows += projector_rows(config.projector)
    if config.compressor_num_layers:
        rows += rwkv_rows(7, config.compressor_num_layers, "vtc.", "model.compressor.")
    rows += language_model_rows(config.text_config, "model.language_model.")
    return rows + SCAN_BUFFERS


# Prefixes in which checkpoints differ.

WRAPPER_PREFIXES = ("module.", "_forward_module.", "model.")
LANGUAGE_MODEL_NAMES = ("emb.", "blocks.", "ln_out.", "head.")
FLAT_VISION_NAMES = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
"""transformers 5 leaves out the level `vision_model.` that version 4 wrote."""


def unwrapped_name(name: str) -> str:
    """Return the name without the prefixes that training frameworks add."""
    while prefix := next((p for p in WRAPPER_PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def canonical_name(name: str) -> str:
    """Return the name as the original's training writes it: unwrapped, with the language model below `rwkv.`."""
    name = unwrapped_name(name)
    if name.startswith(LANGUAGE_MODEL_NAMES):
        return f"rwkv.{name}"
    if name.startswith("vit.") and name[4:].startswith(FLAT_VISION_NAMES):
        return f"vit.vision_model.{name[4:]}"
    return name


def check_names(names: Iterable[str], rows: Sequence[Row]) -> None:
    """Raise `ConversionError` for an unknown tensor, naming the nearest known one, and for a missing tensor."""
    names, known = set(names), {row.original: row for row in rows}
    if unknown := sorted(names - known.keys()):
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConversionError(f"Unknown tensor {unknown[0]}{others}: the nearest known name is {near}.")
    missing = [name for name, row in known.items() if not row.is_unused and name not in names]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConversionError(f"Missing tensor {missing[0]}{others}: {len(names)} of {len(known)} are there.")


def check_shapes(
    shapes: Mapping[str, Sequence[int]], rows: Iterable[Row], expected: Mapping[str, Sequence[int]]
) -> None:
    """Raise `ConversionError` for a tensor of another shape than the model's.

    Args:
        shapes: of the checkpoint, under original names.
        rows: of the model.
        expected: shapes of the model's state dict, under our names.
    """
    for row in rows:
        if row.is_unused:
            continue
        ours = [torch.empty(tuple(expected[name]), device="meta") for name in row.ours]
        wanted, found = list(row.transform.to_original(*ours).shape), list(shapes[row.original])
        if wanted != found:
            raise ConversionError(
                f"Tensor {row.original} has shape {found}, the rest of the checkpoint asks for {wanted}."
            )


def rows_to_ours(original: Mapping[str, Tensor], rows: Iterable[Row]) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and tensors one by one, as views of the original's where the layout allows."""
    for row in rows:
        if not row.is_unused:
            yield from zip(row.ours, row.transform.to_ours(original[row.original]))


def rows_to_original(
    ours: Mapping[str, Tensor], rows: Iterable[Row], unused: Mapping[str, Tensor] = {}
) -> Iterator[tuple[str, Tensor]]:
    """Yield the original's names and tensors one by one, with those that our model does not hold if given."""
    for row in rows:
        if not row.is_unused:
            yield row.original, row.transform.to_original(*(ours[name] for name in row.ours))
        elif row.original in unused:
            yield row.original, unused[row.original]
