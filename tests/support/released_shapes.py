"""List names and shapes of the released checkpoints' tensors, from their description, not from the key tables.

So this list can judge these tables.
"""

VOCAB_SIZE = 65536


def weight_and_bias(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def rwkv5_block(c, f):
    maps = {f"att.{n}.weight": (c, c) for n in ("receptance", "key", "value", "gate", "output")}
    mixes = {f"att.time_mix_{n}": (1, 1, c) for n in "kvrg"} | {f"ffn.time_mix_{n}": (1, 1, c) for n in "kr"}
    heads = {f"att.time_{n}": (c // 64, 64) for n in ("decay", "faaaa")}
    return maps | mixes | heads | weight_and_bias("att.ln_x", c) | gated_channel_mix(c, f)


def rwkv6_block(c, f):
    mix, decay = (64, 128) if c >= 4096 else (32, 64)
    maps = {f"att.{n}.weight": (c, c) for n in ("receptance", "key", "value", "gate", "output")}
    mixes = {f"att.time_maa_{n}": (1, 1, c) for n in "xwkvrg"} | {
        f"ffn.time_maa_{n}": (1, 1, c) for n in "kr"
    }
    ranks = {
        "att.time_maa_w1": (c, 5 * mix),
        "att.time_maa_w2": (5, mix, c),
        "att.time_decay": (1, 1, c),
        "att.time_decay_w1": (c, decay),
        "att.time_decay_w2": (decay, c),
        "att.time_faaaa": (c // 64, 64),
    }
    return maps | mixes | ranks | weight_and_bias("att.ln_x", c) | gated_channel_mix(c, f)


def gated_channel_mix(c, f):
    return {"ffn.key.weight": (f, c), "ffn.receptance.weight": (c, c), "ffn.value.weight": (c, f)}


def rwkv7_block(c, ranks, is_first):
    letters = "wag" if is_first else "wavg"
    block = {f"att.x_{n}": (1, 1, c) for n in "rwkvag"} | {f"att.{n}": (1, 1, c) for n in ("k_k", "k_a")}
    for n in letters:
        rank = dict(zip("wavg", ranks))[n]
        block |= {f"att.{n}1": (c, rank), f"att.{n}2": (rank, c)}
        block |= {f"att.{n}0": (1, 1, c)} if n != "g" else {}
    maps = {f"att.{n}.weight": (c, c) for n in ("receptance", "key", "value", "output")}
    ffn = {"ffn.x_k": (1, 1, c), "ffn.key.weight": (4 * c, c), "ffn.value.weight": (c, 4 * c)}
    return block | maps | {"att.r_k": (c // 64, 64)} | weight_and_bias("att.ln_x", c) | ffn


def language_model(version, num_layers, c, f=None, ranks=None):
    shapes = {"rwkv.emb.weight": (VOCAB_SIZE, c), **weight_and_bias("rwkv.blocks.0.ln0", c)}
    for layer in range(num_layers):
        block = {
            5: lambda: rwkv5_block(c, f),
            6: lambda: rwkv6_block(c, f),
            7: lambda: rwkv7_block(c, ranks, layer == 0),  # noqa: B023
        }[version]()
        block |= weight_and_bias("ln1", c) | weight_and_bias("ln2", c)
        shapes |= {f"rwkv.blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | weight_and_bias("rwkv.ln_out", c) | {"rwkv.head.weight": (VOCAB_SIZE, c)}


def clip_large():
    d, shapes = 1024, {}
    for layer in range(24):
        block = {}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            block |= weight_and_bias(f"self_attn.{name}", d, d)
        block |= weight_and_bias("layer_norm1", d) | weight_and_bias("layer_norm2", d)
        block |= weight_and_bias("mlp.fc1", 4 * d, d) | weight_and_bias("mlp.fc2", d, 4 * d)
        shapes |= {f"encoder.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= weight_and_bias("pre_layrnorm", d) | weight_and_bias("post_layernorm", d)
    shapes |= {
        "embeddings.class_embedding": (d,),
        "embeddings.patch_embedding.weight": (d, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, d),
    }
    return {f"vit.vision_model.{name}": shape for name, shape in shapes.items()}


def timm_vit(d, depth, mlp, has_layer_scale):
    shapes = weight_and_bias("norm", d) | weight_and_bias("patch_embed.proj", d, 3, 14, 14)
    shapes["pos_embed"] = (1, 1024, d)
    for layer in range(depth):
        block = weight_and_bias("norm1", d) | weight_and_bias("norm2", d)
        block |= weight_and_bias("attn.qkv", 3 * d, d) | weight_and_bias("attn.proj", d, d)
        block |= weight_and_bias("mlp.fc1", mlp, d) | weight_and_bias("mlp.fc2", d, mlp)
        block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)} if has_layer_scale else {}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def dinov2_large():
    shapes = timm_vit(1024, 24, 4096, True) | {"cls_token": (1, 1, 1024), "reg_token": (1, 4, 1024)}
    return {f"vit.dino_featurizer.{name}": shape for name, shape in shapes.items()}


def siglip_so400m():
    d, mlp = 1152, 4304
    shapes = timm_vit(d, 27, mlp, False) | {"attn_pool.latent": (1, 1, d)}
    shapes |= weight_and_bias("attn_pool.q", d, d) | weight_and_bias("attn_pool.kv", 2 * d, d)
    shapes |= weight_and_bias("attn_pool.proj", d, d) | weight_and_bias("attn_pool.norm", d)
    shapes |= weight_and_bias("attn_pool.mlp.fc1", mlp, d) | weight_and_bias("attn_pool.mlp.fc2", d, mlp)
    return {f"vit.siglip_featurizer.{name}": shape for name, shape in shapes.items()}


def sam_base():
    d, shapes = 768, {"pos_embed": (1, 64, 64, 768), **weight_and_bias("patch_embed.proj", 768, 3, 16, 16)}
    for layer in range(12):
        positions = 127 if layer in (2, 5, 8, 11) else 27
        block = {f"attn.rel_pos_{axis}": (positions, 64) for axis in "hw"}
        block |= weight_and_bias("norm1", d) | weight_and_bias("norm2", d)
        block |= weight_and_bias("attn.qkv", 3 * d, d) | weight_and_bias("attn.proj", d, d)
        block |= weight_and_bias("mlp.lin1", 4 * d, d) | weight_and_bias("mlp.lin2", d, 4 * d)
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"neck.0.weight": (256, d, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    shapes |= weight_and_bias("neck.1", 256) | weight_and_bias("neck.3", 256)
    return {f"vit.sam_featurizer.{name}": shape for name, shape in shapes.items()}


def three_encoders():
    return dinov2_large() | siglip_so400m() | sam_base()


def linear(c):
    return {"proj.weight": (c, 1024)}


def gated(width, c=2048):
    return {"proj.proj.weight": (c, width), "proj.gate.weight": (c, c), "proj.o_proj.weight": (c, c)}


def gated_norm(c):
    return {
        "proj.gate.weight": (3200, 3200),
        "proj.o_proj.weight": (c, 3200),
        **weight_and_bias("proj.ln_v", c),
    }


RELEASES = {
    "v5.0 1B5": lambda: language_model(5, 24, 2048, 7168) | clip_large() | linear(2048),
    "v5.0 3B": lambda: language_model(5, 32, 2560, 8960) | clip_large() | linear(2560),
    "v6.0 1B6": lambda: language_model(6, 24, 2048, 7168) | clip_large() | linear(2048),
    "v6.0 3B": lambda: language_model(6, 32, 2560, 8960) | clip_large() | linear(2560),
    "v6.0 7B": lambda: language_model(6, 32, 4096, 14336) | clip_large() | linear(4096),
    "HD 1B6": lambda: language_model(6, 24, 2048, 7168) | three_encoders() | gated(3200),
    "UHD 1B6": lambda: language_model(6, 24, 2048, 7168) | three_encoders() | gated(6400),
    "v7.00 0B1": lambda: (
        language_model(7, 12, 768, ranks=(64, 64, 32, 128)) | three_encoders() | gated_norm(768)
    ),
    "v7.00 0B4": lambda: (
        language_model(7, 24, 1024, ranks=(64, 64, 32, 128)) | three_encoders() | gated_norm(1024)
    ),
    "v7.00 1B5": lambda: (
        language_model(7, 24, 2048, ranks=(96, 96, 64, 256)) | three_encoders() | gated_norm(2048)
    ),
}
"""Maps a release to a function that returns the shape of each tensor by its name, as in one unsplit file."""
