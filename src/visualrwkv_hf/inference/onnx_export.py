"""Export a model as three ONNX graphs: the vision tower, reading a prompt, and decoding one token.

    from visualrwkv_hf import export_onnx

    export_onnx(model, processor, "onnx")

It needs the packages onnx and onnxscript. `examples/onnx_chat.py` chats with the result using onnxruntime alone.

Letters: P pieces of pictures (whole ones, views, tiles), N pictures or tiles with tokens of their own, L tokens of
one, B batch, T time, D directions of the scan, C hidden size, H heads.
"""

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from visualrwkv_hf.conversion.folders import locked, whole_or_nothing

from ..chat_template import TURN_END
from ..configuration_visualrwkv import VisualRWKVTextConfig
from ..dispatch import kernel_backend
from ..generations import GENERATIONS
from ..image_processing_visualrwkv import GRIDS_700, VisualRWKVImageProcessor
from ..image_tokens import class_token_places
from ..layer_state import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, LayerState, PlainStateHolder, StateSpec
from ..modeling_visualrwkv import VisualRWKVForConditionalGeneration, VisualTokenCompressor, is_trivial
from ..processing_visualrwkv import SHORT_ANSWER, VisualRWKVProcessor
from ..scan_orders import sequence_orders
from ..token_order import IN_ORDER, TokenOrder, token_orders

WEIGHTS = "weights.data"
LEAST_EXTERNAL = 1024
"""Smallest constant, in bytes, that is written to the file that the graphs share."""

PARTS = {TIME_MIX_SHIFT: "time_mix_shift", CHANNEL_MIX_SHIFT: "channel_mix_shift"}
"""Our name of a layer's state -> its name in the graphs, where they differ."""

CUTTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "views": {"whole": True},
    "whole_and_tiles": {"whole": True, "grids": GRIDS_700, "spared": [(2, 2)]},
    "smallest": {"grids": None, "stretched": True},
    "closest": {"grids": None, "stretched": True, "surplus": True},
}
"""Tiling of the image processor -> the fields of `cutting_recipe` that differ from their defaults."""


class PictureGraph(nn.Module):
    """Map pixels [P, 3, S, S] of each encoder to tokens [N L, C]; with a compressor, one picture to [L', C]."""

    def __init__(self, model: VisualRWKVForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, *pixels: torch.Tensor) -> torch.Tensor:
        names = pixel_names(self.model.config)
        features = self.model.vision_tower(**dict(zip(names, pixels))).last_hidden_state
        tokens = self.model.project(features)  # [N, L, C]
        if self.model.compressor is None:
            return tokens.flatten(0, 1)
        return compressed(self.model.compressor, tokens)


def compressed(compressor: VisualTokenCompressor, tiles: torch.Tensor) -> torch.Tensor:
    """Compute `compressor.forward` for one picture's `tiles` [tiles, L, C] -> [L', C], for any number of tiles."""
    tokens, num_tiles = compressor.read(tiles.flatten(0, 1)[None]), tiles.shape[0]
    if compressor.config.compressor_reduction == "pool":
        return window_means(tokens, compressor.config.num_image_tokens_of(num_tiles))[0]
    return compressor.reduce(tokens, num_tiles)[0]


def window_means(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Compute `F.adaptive_avg_pool1d` over T, [B, T, C] -> [B, count, C]; ONNX could export it for a fixed T only."""
    length = tokens.shape[1]
    window, token = torch.arange(count)[:, None], torch.arange(length)
    first, end = window * length // count, ((window + 1) * length + count - 1) // count  # [count, 1]
    inside = (token >= first) & (token < end)  # [count, T]
    return (inside / (end - first)).to(tokens.dtype) @ tokens


class LanguageGraph(nn.Module):
    """The part that reading a prompt and decoding one token share."""

    def __init__(self, model: VisualRWKVForConditionalGeneration):
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.image_token_id = model.config.image_token_id

    def read(
        self, inputs_embeds: torch.Tensor, orders: Sequence[TokenOrder], states: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Read [B, T, C]; return the logits [B, vocab_size] after the last token, and the new states."""
        names = [spec.name for spec in states_of(self.language_model.config)]
        layers = [states[i : i + len(names)] for i in range(0, len(states), len(names))]
        holders = [PlainStateHolder(LayerState(dict(zip(names, layer)))) for layer in layers]
        hidden_states = self.language_model.run_blocks(inputs_embeds, orders, holders)
        after = [holder.state().tensors[name] for holder in holders for name in names]
        return self.lm_head(self.language_model.norm(hidden_states[:, -1])), *after


class ReadGraph(LanguageGraph):
    """Read the prompt of one sample: ids [1, T], picture tokens [N L, C], the orders of the layers [1, D, T]."""

    def forward(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor,
        scan_orders: torch.Tensor,
        *states: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        placeholders = input_ids == self.image_token_id
        nth = (placeholders.long().cumsum(1) - 1).clamp(min=0)  # of the tokens of pictures
        embeds = self.language_model.embed_tokens(input_ids)
        embeds = torch.where(placeholders[..., None], image_features[nth], embeds)
        positions = torch.arange(input_ids.shape[1])[None]
        return self.read(embeds, token_orders(positions, None, scan_orders.unbind(1)), states)


class StepGraph(LanguageGraph):
    """Decode one token of each sample: ids [B, 1]."""

    def forward(self, input_ids: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.read(self.language_model.embed_tokens(input_ids), [IN_ORDER], states)


def states_of(config: VisualRWKVTextConfig) -> tuple[StateSpec, ...]:
    """Return the states of each layer, in the order in which a graph takes them."""
    return GENERATIONS[config.rwkv_version].states


def export_onnx(
    model: VisualRWKVForConditionalGeneration, processor: VisualRWKVProcessor, folder: str | Path
) -> Path:
    """Write what is needed to chat about pictures without torch.

    `vision.onnx`: `pixel_values` [P, 3, S, S], and `pixel_values_siglip` and so on where the tower has further
    encoders -> `image_features` [N L, C]. Pieces come in the order of the image processor; with a compressor, one
    picture at a time.
    `read.onnx`: `input_ids` [1, T], `image_features` (without a picture one row of zeros), `scan_orders` [1, D, T]
    and the state -> `logits` [1, vocab_size] of the next token and the new state.
    `step.onnx`: `input_ids` [B, 1] and the state -> `logits` [B, vocab_size] and the new state.

    The state is `past.{layer}.{part}` going in and `present.{layer}.{part}` coming out, with parts `time_mix_shift`,
    `channel_mix_shift` and `wkv`; zeros at the start. Everything is float32. The graphs share `weights.data`;
    `tokenizer.json` and `chat.json` hold the rest: prompts, how a picture is cut and normalised, and in which order the
    layers read it.

    Args:
        model: in float32.
        processor: the model's.
        folder: to write to. An earlier export is replaced, once the new one is whole.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not in float32, the folder holds something else, or cannot be written.
        ImportError: onnx or onnxscript is not installed.
    """
    folder = Path(folder)
    if model.dtype != torch.float32:
        raise ValueError(f"The model must be loaded with dtype=torch.float32 for ONNX, got {model.dtype}.")
    refuse_other_files(folder)
    chat = chat_description(model, processor)
    with torch.no_grad(), kernel_backend("torch"):
        graphs = {name: trace(model) for name, trace in GRAPHS.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder), whole_or_nothing(folder, overwrite=True) as unfinished:
        save_graphs(graphs, unfinished)
        processor.tokenizer.backend_tokenizer.save(str(unfinished / "tokenizer.json"))
        (unfinished / "chat.json").write_text(json.dumps(chat, indent=2) + "\n", encoding="utf-8")
    return folder


def refuse_other_files(folder: Path) -> None:
    """Raise `ValueError` if `folder` is a file, or holds what is no part of an export."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file.")
    others = sorted({path.name for path in folder.iterdir()} - FILES) if folder.exists() else []
    if others:
        raise ValueError(
            f"{folder} holds {others[0]}, which is no part of an export, and is not overwritten."
        )


def pixel_names(config: Any) -> list[str]:
    """Return the names of the vision tower's inputs, one for each encoder."""
    return list(config.vision_config.pixel_inputs.values())


def state_names(model: VisualRWKVForConditionalGeneration, when: str) -> list[str]:
    """Return the names of all states in a graph; `when` is "past" for inputs and "present" for outputs."""
    config = model.config.text_config
    parts = [PARTS.get(spec.name, spec.name) for spec in states_of(config)]
    return [f"{when}.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in parts]


def example_state(model: VisualRWKVForConditionalGeneration, batch: int) -> tuple[torch.Tensor, ...]:
    config = model.config.text_config
    shapes = [(batch, *spec.shape(config)) for spec in states_of(config)]
    return tuple(torch.zeros(shape) for _ in range(config.num_hidden_layers) for shape in shapes)


def trace_vision(model: VisualRWKVForConditionalGeneration) -> Any:
    vision = model.config.vision_config
    pieces = 2 * vision.num_views  # any number of pictures
    pixels = tuple(torch.zeros(pieces, 3, size, size) for size in vision.image_sizes.values())
    names = pixel_names(model.config)
    shapes = (tuple({0: Dim.AUTO} for _ in names),)
    return traced(PictureGraph(model), pixels, names, ["image_features"], shapes)


def trace_read(model: VisualRWKVForConditionalGeneration) -> Any:
    length, picture = 12, model.config.num_image_tokens  # any numbers: T and N L are left open
    states = example_state(model, 1)
    orders = torch.arange(length).expand(1, len(span_orders(model)), length)
    features = torch.zeros(picture + 1, model.config.text_config.hidden_size)
    names = ["input_ids", "image_features", "scan_orders", *state_names(model, "past")]
    shapes: tuple = ({1: "tokens"}, {0: "image_tokens"}, {2: Dim.AUTO}, tuple({} for _ in states))
    inputs = (torch.ones(1, length, dtype=torch.long), features, orders, *states)
    return traced(ReadGraph(model), inputs, names, ["logits", *state_names(model, "present")], shapes)


def trace_step(model: VisualRWKVForConditionalGeneration) -> Any:
    states = example_state(model, 2)
    names = ["input_ids", *state_names(model, "past")]
    shapes = ({0: "batch"}, tuple({0: Dim.AUTO} for _ in states))
    inputs = (torch.ones(2, 1, dtype=torch.long), *states)
    return traced(StepGraph(model), inputs, names, ["logits", *state_names(model, "present")], shapes)


GRAPHS = {"vision": trace_vision, "read": trace_read, "step": trace_step}
FILES = {*(f"{name}.onnx" for name in GRAPHS), WEIGHTS, "tokenizer.json", "chat.json"}


def traced(
    graph: nn.Module, inputs: tuple, input_names: list[str], output_names: list[str], dynamic_shapes: tuple
) -> Any:
    """Return the graph as a model of onnx_ir with constants folded; onnxruntime optimises the rest when it loads it."""
    from onnxscript import optimizer

    program: Any = torch.onnx.export(
        graph.eval(),
        inputs,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        optimize=False,  # its rewriting takes minutes
        verbose=False,
    )
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in this code it comes from, more text than graph
    return program.model


def save_graphs(models: dict[str, Any], folder: Path) -> None:
    """Write `{name}.onnx` for each model of onnx_ir, and one file with the large constants of all, each once.

    The models keep their own constants: the folder may be moved, and they may be written again.
    """
    import onnx_ir as ir

    values = [value for model in models.values() for value in large_constants(model)]
    constants = [value.const_value for value in values]
    digests = [sha256(constant.tobytes()).hexdigest() for constant in constants]
    unique = dict(zip(digests, constants))
    written = ir.external_data.convert_tensors_to_external([*unique.values()], folder, WEIGHTS)
    shared = dict(zip(unique, written))
    try:
        for value, constant, digest in zip(values, constants, digests):
            tensor = shared[digest]
            value.const_value = ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                tensor.length,
                constant.dtype,
                shape=constant.shape,
                name=value.name,
                base_dir=folder,
            )
        for name, model in models.items():
            ir.save(model, folder / f"{name}.onnx")
    finally:
        for value, constant in zip(values, constants):
            value.const_value = constant


def large_constants(model: Any) -> Iterable[Any]:
    """Return the weights of a model of onnx_ir that are large enough to be shared."""
    initializers = model.graph.initializers.values()
    return [value for value in initializers if value.const_value.nbytes >= LEAST_EXTERNAL]


def span_orders(model: VisualRWKVForConditionalGeneration) -> list[list[int]]:
    """Return the D orders of the scan: the positions 0, ..., L-1 of one tile as layers l with l mod D = d read them.

    If all layers read in the stored order it is [[0]], of which a picture of any number of tokens is a multiple.
    """
    config = model.config
    height, width = config.pooled_grid
    if not height or is_trivial(config.scan):
        return [[0]]
    places = torch.ones(1, config.num_tile_tokens, dtype=torch.bool)
    ends = class_token_places(config.class_token)
    return sequence_orders(places, config.scan, height, width, *ends)[0].tolist()


def chat_description(
    model: VisualRWKVForConditionalGeneration, processor: VisualRWKVProcessor
) -> dict[str, Any]:
    """Return the content of `chat.json`: what a program needs besides the graphs and the tokenizer."""
    eos = model.generation_config.eos_token_id
    recipes = pixel_recipes(model.config, processor.image_processor)
    return {
        "prompt_with_picture": prompt_pattern(processor, with_picture=True),
        "prompt": prompt_pattern(processor, with_picture=False),
        "request_for_short_answer": SHORT_ANSWER,
        "reserved": [processor.image_token, "<|endoftext|>"],
        "image_token": processor.image_token,
        "image_token_id": model.config.image_token_id,
        "turn_end_ids": processor.tokenizer.encode(TURN_END, add_special_tokens=False),
        "eos_token_id": eos if isinstance(eos, list) else [eos],
        "first_prompt_multiple": processor.pad_prompt_to_multiple_of or 1,
        "scan_orders": span_orders(model),
        "pieces": cutting_recipe(processor.image_processor, recipes["pixel_values"]["size"]),
        "pixels": recipes,
    }


def prompt_pattern(processor: VisualRWKVProcessor, with_picture: bool) -> str:
    """Return the prompt with {text} for the question, and {question} for its copy before a picture (the sandwich)."""
    content = [{"type": "image"}] * with_picture + [{"type": "text", "text": "{text}"}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return prompt.replace("{text}", "{question}", prompt.count("{text}") - 1)


def pixel_recipes(config: Any, image_processor: Any) -> dict[str, dict[str, Any]]:
    """Return `size`, `mean` and `std` of each pixel input, and `crop`: resize the shorter side and crop the centre."""
    recipes: list[dict[str, Any]]
    if isinstance(image_processor, VisualRWKVImageProcessor):
        encoders = [image_processor.encoders[name] for name in config.vision_config.encoders]
        recipes = [
            dict(size=fields["size"], crop=False, mean=fields["image_mean"], std=fields["image_std"])
            for fields in encoders
        ]
    else:
        crop = "shortest_edge" in image_processor.size
        size = image_processor.size["shortest_edge" if crop else "height"]
        mean, std = image_processor.image_mean, image_processor.image_std
        recipes = [dict(size=size, crop=crop, mean=list(mean), std=list(std))]
    return dict(zip(pixel_names(config), recipes))


def cutting_recipe(image_processor: Any, side: int) -> dict[str, Any]:
    """Return how a picture is cut into tiles.

    The grid is the one of `grids` (columns, rows) whose squares of `side` pixels stay least empty when the picture is
    fitted into them; with `surplus`, the difference between its area and the picture's counts as well. If `grids` is
    None, the candidates are as many squares as cover the picture, or one fewer, in each direction. `whole`: the whole
    picture comes before its tiles, and alone if the grid is one of `spared` and is at least as large as the picture.
    `stretched`: the picture is resized to the grid before it is cut.
    """
    grid = getattr(image_processor, "tile_grid", 1)
    recipe: dict[str, Any] = dict(
        side=side, whole=False, grids=[(grid, grid)], spared=[], stretched=False, surplus=False
    )
    return recipe | CUTTINGS[getattr(image_processor, "tiling", "none")]


__all__ = ["export_onnx"]
