"""Compute the golden cases of parts: recurrences, vision towers and their functions, scan orders, text and data."""

from collections.abc import Callable
from typing import Any

import torch
from golden_cases import Case, Result, grid_side
from golden_rows import (
    check_hd_or_uhd_row,
    check_v5_row,
    check_v60_row,
    check_v700_row,
    check_v701_or_v702_row,
)
from tokenizers import Regex, pre_tokenizers
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionLayer

from visualrwkv_hf import VisualRWKVVisionConfig, VisualRWKVVisionModel, wkv6, wkv7
from visualrwkv_hf.conversion.encoders import ORIGINAL_ENCODERS
from visualrwkv_hf.conversion.key_map import rows_to_ours
from visualrwkv_hf.conversion.rows import Row
from visualrwkv_hf.conversion.world_tokenizer import (
    build_world_tokenizer,
    byte_alphabet,
    load_world_vocabulary,
    longest_match_pattern,
)
from visualrwkv_hf.encoders import unshuffle_map
from visualrwkv_hf.modeling_vision import resample_position_embedding
from visualrwkv_hf.scan_orders import grid_permutation
from visualrwkv_hf.training.conversations import magic_prime, sample_order

# --- recurrences ------------------------------------------------------------------------------------


def wkv_op(case: Case, op: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]) -> Result:
    """Compute output, final state and gradients of a recurrence, in float32 and with bfloat16 inputs."""
    result = Result()
    for variant, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        inputs = {
            name: tensor.to(dtype).requires_grad_() for name, tensor in case.inputs.items() if name != "gy"
        }
        with torch.enable_grad():
            y, state = op(inputs)
            grads = torch.autograd.grad(y, list(inputs.values()), case.inputs["gy"].to(dtype).view_as(y))
        gradients = {f"g_{name}": grad for name, grad in zip(inputs, grads)}
        found = {"y": y.view_as(case.inputs["gy"]), "final_state": state.transpose(-1, -2), **gradients}
        result.add(**{f"{variant}.{name}": tensor for name, tensor in found.items()})
    return result


def wkv6_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run RWKV-5 or 6 with the raw decay as the original passes it: [H, K] for RWKV-5, [B, T, H K] for RWKV-6."""
    num_heads, head_dim = inputs["u"].shape
    heads = {name: inputs[name].unflatten(-1, (num_heads, head_dim)) for name in "rkv"}
    w = inputs["w"]
    w = -torch.exp(w.float() if w.ndim == 2 else w.float().unflatten(-1, (num_heads, head_dim)))
    return wkv6(heads["r"], w, heads["k"], heads["v"], inputs["u"])


def wkv7_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    decay = -torch.exp(inputs["w"].float())
    return wkv7(inputs["q"], decay, inputs["k"], inputs["v"], inputs["a"], inputs["b"])


def scan_orders(case: Case) -> Result:
    result = Result()
    for side, orders in case.json("orders.json").items():
        for scan, order in orders.items():
            found = grid_permutation(scan, 0, int(side), int(side)).tolist()
            result.facts[f"{scan} {side}"] = found, order
    return result


# --- vision -----------------------------------------------------------------------------------------


def encoder_rows(name: str, depth: int) -> list[Row]:
    """Return the key map's rows for one encoder alone, without the prefix that its weights have in a whole model."""
    table = ORIGINAL_ENCODERS[name].together
    numbered = [(0, row) for row in [*table.ends, *table.final]]
    numbered += [(layer, row) for layer in range(depth) for row in table.block]
    return [
        Row(
            row.original.replace("{l}", str(layer)),
            tuple(f"{name}.{ours.replace('{l}', str(layer))}" for ours in row.ours),
            row.transform,
        )
        for layer, row in numbered
    ]


def encoder(case: Case, name: str, feature_layer: int) -> VisualRWKVVisionModel:
    """Return a tower of one encoder, whose configuration is inferred from the shapes of the weights."""
    weights = case.weights()
    shapes = {
        ORIGINAL_ENCODERS[name].together.prefix + key: tuple(tensor.shape) for key, tensor in weights.items()
    }
    fields = ORIGINAL_ENCODERS[name].fields(shapes, {"num_attention_heads": case.config["num_heads"]})
    config = VisualRWKVVisionConfig(**{f"{name}_config": fields}, feature_layer=feature_layer)
    model = VisualRWKVVisionModel(config).eval()
    ours = dict(rows_to_ours(weights, encoder_rows(name, case.config["depth"])))
    model.load_state_dict({key: ours[key] for key in model.state_dict()})
    return model


def block_inputs_and_outputs(
    layers: nn.ModuleList, run: Callable[[], Any]
) -> tuple[list[Tensor], list[Tensor]]:
    entered, left = [], []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        entered.append(args[0])
        left.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return entered, left


def timm_tower(case: Case, name: str, layers_of: Callable[[nn.Module], nn.ModuleList]) -> Result:
    """Compute the features of a tower, and what enters and leaves its first and last block.

    The features are the output of the last block but one, without the final norm.
    """
    result, x, prefix = Result(), case.inputs["x"], case.config["num_prefix_tokens"]
    result.add(features=encoder(case, name, feature_layer=-2)(x).last_hidden_state)
    whole = encoder(case, name, feature_layer=-1)
    entered, left = block_inputs_and_outputs(layers_of(whole.get_submodule(name)), lambda: whole(x))
    result.add(
        tokens_in=entered[0], block0_patches=left[0][:, prefix:], last_block_patches=left[-1][:, prefix:]
    )
    return result


def timm_dino(case: Case) -> Result:
    return timm_tower(case, "dinov2", lambda model: model.encoder.layer)


def timm_siglip(case: Case) -> Result:
    return timm_tower(case, "siglip", lambda model: model.encoder.layers)


def sam_tiny(case: Case) -> Result:
    result, model, x = Result(), encoder(case, "sam", feature_layer=-2), case.inputs["x"]
    sam = model.get_submodule("sam")
    _, left = block_inputs_and_outputs(sam.layers, lambda: sam(x))
    result.add(neck_out=sam(x).last_hidden_state, **{f"block{i}_out": out for i, out in enumerate(left)})
    features = model(x).last_hidden_state  # [N, L, D]
    side = grid_side(features.shape[1])
    result.add(out=features.transpose(1, 2).unflatten(2, (side, side)))
    return result


def sam_functions(case: Case) -> Result:
    """Compute the functions of the stock SAM that our tower builds on, and our lossless downsampler."""
    result, inputs = Result(), case.inputs
    for variant in case.variants("get_rel_pos"):  # q4_k8_L15
        q, k, _ = (int(part[1:]) for part in variant.split("_"))
        positions = SamVisionAttention.get_rel_pos(None, q, k, inputs[f"rel_pos.{variant}"])
        result.add(variant, get_rel_pos=positions)
    for variant in case.variants("windows"):
        size = int(variant.rsplit("ws", 1)[1])
        windows, _ = SamVisionLayer.window_partition(None, inputs[f"win_in.{variant}"], size)
        result.add(variant, windows=windows)
    grid = tuple((len(inputs[name]) + 1) // 2 for name in ("rel_h", "rel_w"))
    attention = SamVisionAttention.get_decomposed_rel_pos(
        RelativePositions(), inputs["rel_q"], inputs["rel_h"], inputs["rel_w"], grid, grid
    )
    result.add(rel_attn_out=inputs["rel_attn"] + attention.reshape_as(inputs["rel_attn"]))
    down = unshuffle_map(inputs["down_in"])  # [N, L, D]
    result.add(
        down_out=down.transpose(1, 2).unflatten(2, tuple(n // 2 for n in inputs["down_in"].shape[-2:]))
    )
    return result


class RelativePositions:
    """Stands in for the stock attention, of which `get_decomposed_rel_pos` needs this method alone."""

    def get_rel_pos(self, *args: Any) -> Tensor:
        return SamVisionAttention.get_rel_pos(self, *args)


def timm_pos_embed_resample(case: Case) -> Result:
    result, inputs = Result(), case.inputs
    for variant in case.variants("resampled"):  # 27to32_dim6_prefix0
        side, prefix = int(variant.split("_")[0].split("to")[1]), int(variant.rsplit("prefix", 1)[1])
        position = resample_position_embedding(inputs[f"pos.{variant}"], (side, side), prefix)
        result.add(variant, resampled=position)
    for variant in case.variants("filter_out"):
        side = grid_side(case.expected[f"filter_out.{variant}"].shape[1])
        position = resample_position_embedding(inputs[f"filter_in.{variant}"], (side, side))
        result.add(variant, filter_out=position)
    return result


# --- text and data ----------------------------------------------------------------------------------


def tokenizer_encode(case: Case) -> Result:
    result, tokenizer, alphabet = Result(), build_world_tokenizer(), byte_alphabet()
    vocabulary = load_world_vocabulary()
    pattern = longest_match_pattern("".join(alphabet[b] for b in token) for token in vocabulary)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_bytes(content: bytes) -> list[int]:
        """Return the ids of bytes that need not be text: the tokenizer never gets these; its pattern can split them."""
        pieces = split.pre_tokenize_str("".join(alphabet[b] for b in content))
        return tokenizer.convert_tokens_to_ids([piece for piece, _ in pieces])

    for number, row in enumerate(case.rows("strings.jsonl")):
        result.facts[f"string {number}"] = encode(row["text"]), row["ids"]
    for number, row in enumerate(case.rows("bytes.jsonl")):
        result.facts[f"bytes {number}"] = encode_bytes(bytes.fromhex(row["hex"])), row["ids"]
    for number, row in enumerate(case.rows("decode.jsonl")):
        text, kind = tokenizer.decode(row["ids"]), "no_utf8" if row["text"] == "\ufffd" else "decoded"
        result.facts[f"{kind} {number}"] = text, row["text"]
        readable = bytes.fromhex(row["hex"]).decode("utf-8", errors="replace")
        result.facts[f"readable {number}"] = text, readable
    facts = case.json("facts.json")
    for text, ids in facts["encode"].items():
        result.facts[f"{text!r}"] = encode(text), ids
    result.facts["entries"] = len(vocabulary), facts["vocab_entries"]
    result.facts["ids"] = (
        (min(vocabulary.values()), max(vocabulary.values())),
        (facts["min_id"], facts["max_id"]),
    )
    result.facts["longest"] = max(map(len, vocabulary)), facts["longest_token_bytes"]
    return result


FORMAT_CHECKS: dict[str, Callable[[dict, Any], None]] = {
    "v5_format": check_v5_row,
    "v60_format": check_v60_row,
    "hd_uhd_format": check_hd_or_uhd_row,
    "v700_format": check_v700_row,
    "v701_v702_format": check_v701_or_v702_row,
}
"""Maps a case to the check of its rows, which raises if our text, ids or labels differ from the original's.

Where the original's labels drift, depend on the case of a speaker's name or lose a picture, the check tests what we
do instead.
"""


def data_format(case: Case) -> Result:
    tokenizer, result = build_world_tokenizer(), Result()
    for number, row in enumerate(case.rows("rows.jsonl")):
        result.facts[f"{number} {row['name']}"] = FORMAT_CHECKS[case.name](row, tokenizer), None
    return result


def sampling_order(case: Case) -> Result:
    result = Result()
    for size, prime in case.json("magic_primes.json").items():
        result.facts[f"prime below {size}"] = magic_prime(int(size)), prime
    for row in case.json("order.json"):
        repeat = "reversed" if row["variant"] in ("v6.0", "v7.00") else "permuted"
        sizes = row["data_size"], row["epoch_steps"], row["micro_bsz"], row["world_size"]
        for part in row["order"]:
            found = sample_order(
                sizes[0], part["epoch"], *sizes[1:3], rank=part["rank"], world_size=sizes[3], repeat=repeat
            )
            label = f"{row['variant']} {sizes} epoch {part['epoch']} rank {part['rank']}"
            result.facts[label] = found, part["sample_indices"]
    return result


RUNNERS: dict[str, Callable[[Case], Result]] = {
    "scan_orders": scan_orders,
    "wkv5_op": lambda case: wkv_op(case, wkv6_of),
    "wkv6_op": lambda case: wkv_op(case, wkv6_of),
    "wkv7_op": lambda case: wkv_op(case, wkv7_of),
    "sam_functions": sam_functions,
    "sam_tiny_64x64": sam_tiny,
    "sam_tiny_small_neck": sam_tiny,
    "timm_dino_tiny": timm_dino,
    "timm_siglip_tiny": timm_siglip,
    "timm_pos_embed_resample": timm_pos_embed_resample,
    "encode": tokenizer_encode,
    **dict.fromkeys(FORMAT_CHECKS, data_format),
    "sampling_order": sampling_order,
}
