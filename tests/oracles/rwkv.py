"""RWKV-5, 6 and 7 in float64 from the papers' equations, one token and one head at a time. Imports torch only.

`weights` is the language model's state dict in float64 under our names (`layers.0.att.key.weight`, ...). It is run
as an RNN on plain dictionaries, so that nothing is shared with what it judges.
"""

import torch


def layer_norm(x, weights, name, eps=1e-5):
    centred = x - x.mean()
    return (
        centred / (centred.square().mean() + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    )


def head_norm(y, weights, name, eps):
    """y [H, V]: each head by itself."""
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed.flatten() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def time_mix_5(p, x, last, S, memory):
    def mixed(name):
        return x * p[f"time_mix_{name}"].flatten() + last * (1 - p[f"time_mix_{name}"].flatten())

    H, N = p["time_decay"].shape
    r, k, v = (p[f"{n}.weight"] @ mixed(c) for n, c in (("receptance", "r"), ("key", "k"), ("value", "v")))
    gate = silu(p["gate.weight"] @ mixed("g"))
    decay = torch.exp(-torch.exp(p["time_decay"]))
    y = torch.empty(H, N, dtype=x.dtype)
    for h in range(H):
        rh, kh, vh = (z.view(H, N)[h] for z in (r, k, v))
        kv = torch.outer(kh, vh)
        y[h] = rh @ (S[h] + torch.diag(p["time_faaaa"][h]) @ kv)
        S[h] = torch.diag(decay[h]) @ S[h] + kv
    return y, gate, 0.0


def time_mix_6(p, x, last, S, memory):
    delta = last - x
    low = torch.tanh((x + delta * p["time_maa_x"].flatten()) @ p["time_maa_w1"]).view(5, -1)
    mixed = {
        name: x + delta * (p[f"time_maa_{name}"].flatten() + low[i] @ p["time_maa_w2"][i])
        for i, name in enumerate("wkvrg")
    }
    H, N = p["time_faaaa"].shape
    r, k, v = (p[f"{n}.weight"] @ mixed[c] for n, c in (("receptance", "r"), ("key", "k"), ("value", "v")))
    gate = silu(p["gate.weight"] @ mixed["g"])
    logit = p["time_decay"].flatten() + torch.tanh(mixed["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
    decay = torch.exp(-torch.exp(logit)).view(H, N)
    y = torch.empty(H, N, dtype=x.dtype)
    for h in range(H):
        rh, kh, vh = (z.view(H, N)[h] for z in (r, k, v))
        kv = torch.outer(kh, vh)
        y[h] = rh @ (S[h] + torch.diag(p["time_faaaa"][h]) @ kv)
        S[h] = torch.diag(decay[h]) @ S[h] + kv
    return y, gate, 0.0


def time_mix_7(p, x, last, S, memory):
    mixed = {name: x + (last - x) * p[f"x_{name}"].flatten() for name in "rwkvag"}
    H, N = p["r_k"].shape
    r, k, v = (p[f"{n}.weight"] @ mixed[c] for n, c in (("receptance", "r"), ("key", "k"), ("value", "v")))
    logit = p["w0"].flatten() + torch.tanh(mixed["w"] @ p["w1"]) @ p["w2"]
    softplus = torch.log1p(torch.exp(-logit))
    decay = torch.exp(-torch.exp(-softplus - 0.5)).view(H, N)
    if "v0" not in p:
        memory["v_first"] = v
    else:
        v = v + (memory["v_first"] - v) * sigmoid(p["v0"].flatten() + mixed["v"] @ p["v1"] @ p["v2"])
    rate = sigmoid(p["a0"].flatten() + mixed["a"] @ p["a1"] @ p["a2"])
    gate = sigmoid(mixed["g"] @ p["g1"]) @ p["g2"]
    removal = (k * p["k_k"].flatten()).view(H, N)
    removal = removal / removal.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    k = k * (1 + (rate - 1) * p["k_a"].flatten())
    y, bonus = torch.empty(H, N, dtype=x.dtype), torch.empty(H, N, dtype=x.dtype)
    for h in range(H):
        rh, kh, vh, ah = (z.view(H, N)[h] for z in (r, k, v, rate))
        transition = torch.diag(decay[h]) - torch.outer(removal[h] * ah, removal[h])
        S[h] = transition @ S[h] + torch.outer(kh, vh)
        y[h] = rh @ S[h]
        bonus[h] = (rh * kh * p["r_k"][h]).sum() * vh
    return y, gate, bonus.flatten()


def channel_mix(p, x, last, version):
    def mixed(name):
        if version == 5:
            return x * p[f"time_mix_{name}"].flatten() + last * (1 - p[f"time_mix_{name}"].flatten())
        weight = p[f"time_maa_{name}" if version == 6 else f"x_{name}"].flatten()
        return x + (last - x) * weight

    out = p["value.weight"] @ torch.relu(p["key.weight"] @ mixed("k")) ** 2
    return out if version == 7 else sigmoid(p["receptance.weight"] @ mixed("r")) * out


TIME_MIX = {5: time_mix_5, 6: time_mix_6, 7: time_mix_7}


def hidden_states(weights, version, num_layers, num_heads, head_dim, embeddings, eps_head=64e-5):
    """The final norm's output [T, C] for `embeddings` [T, C], unidirectional, from an empty state."""
    S = torch.zeros(num_layers, num_heads, head_dim, head_dim, dtype=torch.float64)
    shifts = torch.zeros(num_layers, 2, embeddings.shape[1], dtype=torch.float64)
    outputs = []
    for embedding in embeddings.double():
        x, memory = layer_norm(embedding, weights, "embed_norm"), {}
        for layer in range(num_layers):
            att = _part(weights, f"layers.{layer}.att.")
            normed = layer_norm(x, weights, f"layers.{layer}.ln1")
            y, gate, bonus = TIME_MIX[version](att, normed, shifts[layer, 0], S[layer], memory)
            y = head_norm(y, att, "ln_x", eps_head) + bonus
            x = x + att["output.weight"] @ (y * gate)
            shifts[layer, 0] = normed
            normed = layer_norm(x, weights, f"layers.{layer}.ln2")
            x = x + channel_mix(_part(weights, f"layers.{layer}.ffn."), normed, shifts[layer, 1], version)
            shifts[layer, 1] = normed
        outputs.append(layer_norm(x, weights, "norm"))
    return torch.stack(outputs)


def _part(weights, prefix):
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
