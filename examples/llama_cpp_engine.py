"""llama.cpp as a peer of benchmark_prefill.py and benchmark_decode.py: the same weights in a GGUF file.

pip install llama-cpp-python gguf        # compiles llama.cpp
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

GGML_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
"""Precision -> how ggml stores the matrices; what is small stays float32, as in its own conversion."""

NAMES = (
    (r"emb\.", "token_embd."),
    (r"blocks\.0\.ln0\.", "token_embd_norm."),
    (r"ln_out\.", "output_norm."),
    (r"head\.", "output."),
    (r"blocks\.(\d+)\.ln1\.", r"blk.\1.attn_norm."),
    (r"blocks\.(\d+)\.ln2\.", r"blk.\1.attn_norm_2."),
    (r"blocks\.(\d+)\.att\.ln_x\.", r"blk.\1.time_mix_ln."),
    (r"blocks\.(\d+)\.att\.(receptance|key|value|output)\.", r"blk.\1.time_mix_\2."),
    (r"blocks\.(\d+)\.att\.(\w+)$", r"blk.\1.time_mix_\2.weight"),
    (r"blocks\.(\d+)\.ffn\.x_k$", r"blk.\1.channel_mix_lerp_k.weight"),
    (r"blocks\.(\d+)\.ffn\.(key|value)\.", r"blk.\1.channel_mix_\2."),
)
"""Original name -> GGUF's."""

LERPS = "rwkvag"
"""The order of a layer's interpolations in their one tensor."""


def gguf_tensors(state_dict: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """RWKV-7 weights under original names -> names and shapes of GGUF."""
    for name, tensor in state_dict.items():
        new = next(re.sub(old, new, name) for old, new in NAMES if re.match(old, name))
        if re.search(r"att\.x_\w$", name):
            layer = name.removesuffix("x_r")
            if name.endswith("x_r"):
                lerps = [state_dict[f"{layer}x_{which}"] for which in LERPS]  # 6 x [1, 1, C]
                yield new.replace("x_r", "lerp_fused"), torch.stack(lerps)
            continue
        tensor = tensor.T if re.search(r"att\.\w[12]$", name) else tensor.squeeze()
        tensor = tensor.flatten() if name.endswith("r_k") else tensor
        yield new, tensor
        if re.match(r"blocks\.0\.att\.a[012]$", name):
            yield new.replace("time_mix_a", "time_mix_v"), tensor  # never read, but there must be one


def write_gguf(path: Path, state_dict: dict[str, torch.Tensor], config: Any, precision: str) -> None:
    """Writes RWKV-7 weights under original names, without a vocabulary."""
    import gguf

    kind = gguf.GGMLQuantizationType[GGML_TYPES[precision]]
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_wkv_head_size(config.head_dim)
    writer.add_head_count(0)
    writer.add_decay_lora_rank(config.decay_low_rank_dim)
    writer.add_iclr_lora_rank(config.a_low_rank_dim)
    writer.add_value_residual_mix_lora_rank(config.v_low_rank_dim)
    writer.add_gate_lora_rank(config.gate_low_rank_dim)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in gguf_tensors(state_dict):
        array = tensor.float().contiguous().numpy()
        is_matrix = array.ndim == 2 and not re.search(r"time_mix_\w[12]\.weight", name)
        if is_matrix and precision != "float32":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    options.n_ctx = options.n_batch = options.n_ubatch = 2048
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp does not load {path.name}.")

    def read(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        if state is None:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
        ids = (llama.llama_token * len(tokens))(*tokens.tolist())
        if failed := llama.llama_decode(context, llama.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama.cpp's llama_decode failed with {failed}.")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(vocab_size,))
        return torch.from_numpy(logits.copy()), silence  # which must live as long as it may be called

    return read
