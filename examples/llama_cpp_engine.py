"""llama.cpp as a peer of the benchmarks on a CPU: the same weights in a GGUF file.

pip install llama-cpp-python gguf        # compiles llama.cpp
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

GGML_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""Precision -> how ggml stores the matrices; what is small stays float32, as in its own conversion."""

COMMON_NAMES = (
    (r"emb\.", "token_embd."),
    (r"blocks\.0\.ln0\.", "token_embd_norm."),
    (r"ln_out\.", "output_norm."),
    (r"head\.", "output."),
    (r"blocks\.(\d+)\.ln1\.", r"blk.\1.attn_norm."),
    (r"blocks\.(\d+)\.ln2\.", r"blk.\1.attn_norm_2."),
    (r"blocks\.(\d+)\.att\.ln_x\.", r"blk.\1.time_mix_ln."),
    (r"blocks\.(\d+)\.att\.(receptance|key|value|gate|output)\.", r"blk.\1.time_mix_\2."),
    (r"blocks\.(\d+)\.ffn\.(key|receptance|value)\.", r"blk.\1.channel_mix_\2."),
)
NAMES = {
    6: (
        *COMMON_NAMES,
        (r"blocks\.(\d+)\.att\.time_maa_(w[12])$", r"blk.\1.time_mix_\2.weight"),
        (r"blocks\.(\d+)\.att\.time_maa_(\w)$", r"blk.\1.time_mix_lerp_\2.weight"),
        (r"blocks\.(\d+)\.att\.time_faaaa$", r"blk.\1.time_mix_first.weight"),
        (r"blocks\.(\d+)\.att\.time_(decay\w*)$", r"blk.\1.time_mix_\2.weight"),
        (r"blocks\.(\d+)\.ffn\.time_maa_(\w)$", r"blk.\1.channel_mix_lerp_\2.weight"),
    ),
    7: (
        *COMMON_NAMES,
        (r"blocks\.(\d+)\.att\.x_(\w)$", r"blk.\1.time_mix_lerp_\2.weight"),
        (r"blocks\.(\d+)\.att\.(\w+)$", r"blk.\1.time_mix_\2.weight"),
        (r"blocks\.(\d+)\.ffn\.x_k$", r"blk.\1.channel_mix_lerp_k.weight"),
    ),
}
"""Generation -> original name -> GGUF's."""

LERPS = {6: "wkvrg", 7: "rwkvag"}
"""The order of a layer's interpolations in their one tensor, by generation."""

TRANSPOSED = r"time_mix_(\w[12]|decay_w[12])\.weight"
"""Low-rank maps: stored as [out, in] in GGUF, and in float32."""


def gguf_tensors(weights: Mapping[str, torch.Tensor], generation: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield RWKV-6 or RWKV-7 weights, given under original names, under the names and in the shapes of GGUF."""
    for name in weights:
        new = next(re.sub(old, new, name) for old, new in NAMES[generation] if re.match(old, name))
        lerp = re.fullmatch(r"(blk\.\d+\.time_mix_lerp_)(\w)\.weight", new)
        if lerp and lerp[2] in LERPS[generation]:
            if lerp[2] == LERPS[generation][0]:
                stem = name.removesuffix(lerp[2])
                lerps = [weights[stem + letter].reshape(1, 1, -1) for letter in LERPS[generation]]
                yield f"{lerp[1]}fused.weight", torch.stack(lerps)
            continue
        tensor = weights[name]
        if re.search(TRANSPOSED, new):
            tensor = tensor.transpose(-1, -2)
        elif not new.endswith("time_mix_first.weight"):
            tensor = tensor.flatten() if name.endswith("r_k") else tensor.squeeze()
        yield new, tensor
        if re.match(r"blocks\.0\.att\.a[012]$", name):
            yield new.replace("time_mix_a", "time_mix_v"), tensor  # never read, but there must be one


def write_gguf(path: Path, weights: Mapping[str, torch.Tensor], config: Any, precision: str) -> None:
    """Write RWKV-6 or RWKV-7 weights under original names, without a vocabulary, one tensor at a time.

    Args:
        path: the file to write.
        weights: original name without `rwkv.` -> tensor.
        config: the `VisualRWKVTextConfig`.
        precision: a key of `GGML_TYPES`, for the matrices.
    """
    import gguf

    matrix_type = gguf.GGMLQuantizationType[GGML_TYPES[precision]]
    generation = config.rwkv_version
    writer = gguf.GGUFWriter(path, f"rwkv{generation}")
    add_sizes(writer, config)
    types = {}
    for name, tensor in gguf_tensors(weights, generation):
        is_matrix = tensor.ndim == 2 and not re.search(f"{TRANSPOSED}|time_mix_first", name)
        types[name] = matrix_type if is_matrix else gguf.GGMLQuantizationType.F32
        block, block_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        num_bytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, list(tensor.shape), np.dtype(np.float32), num_bytes, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in gguf_tensors(weights, generation):
        array = tensor.float().contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(array, types[name]))
    writer.close()


def add_sizes(writer: Any, config: Any) -> None:
    """Add what llama.cpp wants to know of a model beside its tensors."""
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_wkv_head_size(config.head_dim)
    writer.add_head_count(0)
    if config.rwkv_version == 6:
        writer.add_rescale_every_n_layers(0)
        writer.add_time_mix_extra_dim(config.mix_low_rank_dim)
        writer.add_time_decay_extra_dim(config.decay_low_rank_dim)
    else:
        writer.add_decay_lora_rank(config.decay_low_rank_dim)
        writer.add_iclr_lora_rank(config.a_low_rank_dim)
        writer.add_value_residual_mix_lora_rank(config.v_low_rank_dim)
        writer.add_gate_lora_rank(config.gate_low_rank_dim)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)


PIECE = 2048
"""The most tokens that llama.cpp is given at once: it aborts the process if there are more than it has room for."""


def reader(path: Path, vocab_size: int) -> Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]:
    """`read` of an `engines.Engine`: the context is the state, and starting a text clears it."""
    import llama_cpp as llama

    @llama.llama_log_callback
    def silence(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        pass

    llama.llama_log_set(silence, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = (
        2**20,
        PIECE,
        PIECE,
    )  # a state takes no more for a longer text
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp does not load {path.name}.")

    def read(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        if state is None:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for piece in tokens.split(PIECE):
            ids = (llama.llama_token * len(piece))(*piece.tolist())
            if failed := llama.llama_decode(context, llama.llama_batch_get_one(ids, len(piece))):
                raise RuntimeError(f"llama.cpp's llama_decode failed with {failed}.")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(vocab_size,))
        return torch.from_numpy(logits.copy()), silence  # which must live as long as it may be called

    return read
