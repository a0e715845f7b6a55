"""Load our weights into independent packages, which then judge our results."""

import torch

RWKV7_HF_NAMES = {
    "embed_tokens": "embeddings",
    "embed_norm": "layers.0.pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "att.ln_x": "attn.g_norm",
    "att.": "attn.",
}
"""Maps parts of our names to theirs. Only the first part, in this order, that a name contains is replaced."""


def rwkv7_hf_logits(rwkv7_hf, model, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, T, vocab_size] of PyPI's rwkv7-hf for `ids` [B, T], with the weights of our `model`."""
    with torch.no_grad():
        return rwkv7_hf_model(rwkv7_hf, model)(ids).logits


def rwkv7_hf_model(rwkv7_hf, model):
    """Return a model of PyPI's rwkv7-hf with the weights of our `model`."""
    config = model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")
    ranks = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
    theirs = rwkv7_hf.RWKV7ForCausalLM(
        rwkv7_hf.RWKV7Config(**{name: getattr(config, name) for name in names + ranks})
    ).eval()
    weights = {_their_name(name): tensor for name, tensor in model.state_dict().items()}
    for name in list(weights):
        if ".attn.w0" in name or ".attn.a0" in name or ".attn.v0" in name:
            weights[name[:-2] + f"{name[-2]}_lora.lora.2.bias"] = weights.pop(name).flatten()
        elif name[-1] in "12" and name[-3] == ".":
            layer = {"1": "0", "2": "2"}[name[-1]]
            weights[name[:-2] + f"{name[-2]}_lora.lora.{layer}.weight"] = weights.pop(name).T
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in weights.items()})
    return theirs


def _their_name(name: str) -> str:
    for ours, theirs in RWKV7_HF_NAMES.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name
