"""Names of tensors in the original checkpoints and in ours, as tables that are read in both directions.

A row is a `rows.Row`. Those of vision encoders are in `encoders.ORIGINAL_ENCODERS`, those of RWKV's blocks in
`generations.ORIGINAL_GENERATIONS`. `key_rows(config)` writes the tables out for one model; the rest works on such rows.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import (
    VisualRWKVConfig,
    VisualRWKVTextConfig,
    VisualRWKVVisionConfig,
)
from visualrwkv_hf.encoders import ENCODERS

from .encoders import encoders_alone, encoders_together
from .errors import ConversionError
from .generations import ORIGINAL_GENERATIONS
from .rows import Row, as_unused, renamed_rows, same_rows, unused_rows, written_out

# Language model. Its blocks are in `generations.ORIGINAL_GENERATIONS`.

RWKV_ENDS = [
    *renamed_rows("blocks.0.ln0.{weight,bias}", "embed_norm.{weight,bias}"),
    *renamed_rows("ln_out.{weight,bias}", "norm.{weight,bias}"),
]
RWKV_EMBEDDING = renamed_rows("emb.weight", "embed_tokens.weight")
RWKV_HEAD = renamed_rows("head.weight", "lm_head.weight")

PROJECTOR = {
    "linear": same_rows("proj.weight"),
    "linear_flip": same_rows("proj.weight"),
    "gated": same_rows("{proj,gate,o_proj}.weight"),
    "relu": [*same_rows("{proj,o_proj}.weight"), *unused_rows("gate.weight")],
    "gated_norm": same_rows("{gate,o_proj}.weight", "ln_v.{weight,bias}"),
}
# A linear projector is the module itself in the original: its weight carries no name of its own.
PROJECTOR_PREFIX = {"linear": "", "linear_flip": ""}

SCAN_BUFFERS = unused_rows("{spiral,snake,zigzag}_order")
"""Index tables that models trained with such a scan carry along; we compute them."""


def rwkv_rows(rwkv_version: int, num_layers: int, original: str, ours: str) -> Iterator[Row]:
    """Blocks and both norms around them: of the language model or of the compressor."""
    generation = ORIGINAL_GENERATIONS[rwkv_version]
    yield from written_out(RWKV_ENDS, original, ours)
    for layer in range(num_layers):
        after_first = same_rows(*generation.after_first) if layer else unused_rows(*generation.after_first)
        block = same_rows(*generation.block) + after_first
        yield from written_out(block, f"{original}blocks.{layer}.", f"{ours}layers.{layer}.")


def language_model_rows(config: VisualRWKVTextConfig, ours: str) -> Iterator[Row]:
    yield from written_out(RWKV_EMBEDDING, "rwkv.", ours)
    yield from rwkv_rows(config.rwkv_version, config.num_hidden_layers, "rwkv.", ours)
    yield from written_out(RWKV_HEAD, "rwkv.", "")


def vision_rows(config: VisualRWKVVisionConfig, ours: str = "model.vision_tower.") -> Iterator[Row]:
    """Yield the rows of every encoder; what comes after `feature_layer` is unused.

    Raises:
        ConversionError: for encoders that no original puts into one tower.
    """
    encoders = config.encoders
    alone, together = encoders_alone(), encoders_together()
    if len(encoders) == 1 and encoders.keys() <= alone.keys():
        tables = alone
    elif encoders.keys() == together.keys():
        tables = together
    else:
        raise ConversionError(
            f"The original has no tower of {' + '.join(encoders)}: its towers are {', '.join(alone)}, "
            f"or {' + '.join(together)}."
        )
    for name, encoder in encoders.items():
        table, prefix, depth = tables[name], f"{ours}{name}.", encoder.num_hidden_layers
        is_cut = config.feature_layer == -2 and ENCODERS[name].has_feature_layer
        yield from written_out(table.ends, table.prefix, prefix)
        yield from written_out(table.block, table.prefix, prefix, range(depth - is_cut))
        if is_cut:
            yield from written_out(as_unused(table.block), table.prefix, prefix, [depth - 1])
        yield from written_out(as_unused(table.final) if is_cut else table.final, table.prefix, prefix)


def projector_rows(projector: str, ours: str = "model.multi_modal_projector.") -> Iterator[Row]:
    return written_out(PROJECTOR[projector], PROJECTOR_PREFIX.get(projector, "proj."), ours)


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
