"""How checkpoints name the tensors of each vision encoder: one row each.

`visualrwkv_hf.encoders.ENCODERS` has a row of the same name with everything that the model needs. A tower of the
original is one encoder of transformers alone (`vit.vision_model.*`), or several encoders of other code together
(`vit.*_featurizer.*`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConversionError
from .rows import Row, Transform, renamed_rows, same_rows, unused_rows
from .shapes import Shapes, num_blocks, num_heads_of, shape_of, side_of

# --- configurations from shapes -------------------------------------------------------------------------


def clip_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of CLIP's vision encoder under transformers' names."""
    return hf_vit_fields(shapes, given, "clip_config", num_class_positions=1)


def siglip_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SigLIP under transformers' names or under timm's, whose activation is the exact GELU."""
    if "vit.siglip_featurizer.pos_embed" not in shapes:
        fields = hf_vit_fields(shapes, given, "siglip_config", num_class_positions=0)
        return fields | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": False}
    fields = timm_fields(shapes, given, "vit.siglip_featurizer.", "siglip_config")
    return fields | {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "vision_use_head": False}


def dinov2_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of DINOv2 with registers under timm's names."""
    fields = timm_fields(shapes, given, "vit.dino_featurizer.", "dinov2_config")
    width, intermediate_size = fields["hidden_size"], fields.pop("intermediate_size")
    if intermediate_size % width:
        raise ConversionError(
            f"DINOv2's MLP width ({intermediate_size}) must be a multiple of its width ({width})."
        )
    num_registers = shape_of(shapes, "vit.dino_featurizer.reg_token", 3)[1]
    return fields | {
        "mlp_ratio": intermediate_size // width,
        "num_register_tokens": num_registers,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def sam_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SAM's encoder: blocks with relative positions over the whole map are global."""
    prefix = "vit.sam_featurizer."
    _, side, _, width = shape_of(shapes, f"{prefix}pos_embed", 4)
    patch_size = shape_of(shapes, f"{prefix}patch_embed.proj.weight", 4)[-1]
    depth = num_blocks(shapes, f"{prefix}blocks.")
    mlp_dim = shape_of(shapes, f"{prefix}blocks.0.mlp.lin1.weight", 2)[0]
    positions = [shape_of(shapes, f"{prefix}blocks.{layer}.attn.rel_pos_h", 2) for layer in range(depth)]
    reach = [(length + 1) // 2 for length, _ in positions]  # 2 n - 1 differences between n rows
    windows = {n for n in reach if n != side}
    if len(windows) > 1:
        raise ConversionError(
            f"SAM's blocks must share one window, their relative positions tell {sorted(windows)}."
        )
    return {
        "hidden_size": width,
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_hidden_layers": depth,
        "num_attention_heads": width // positions[0][1],
        "mlp_dim": mlp_dim,
        "mlp_ratio": mlp_dim / width,
        "output_channels": shape_of(shapes, f"{prefix}neck.0.weight", 4)[0],
        "window_size": next(iter(windows), 0),
        "global_attn_indexes": [layer for layer, n in enumerate(reach) if n == side],
    }


def hf_vit_fields(
    shapes: Shapes, given: Mapping[str, Any], field: str, num_class_positions: int
) -> dict[str, Any]:
    prefix = "vit.vision_model."
    width, _, patch_size, _ = shape_of(shapes, f"{prefix}embeddings.patch_embedding.weight", 4)
    position = f"{prefix}embeddings.position_embedding.weight"
    return {
        "hidden_size": width,
        "image_size": side_of(shape_of(shapes, position, 2)[0] - num_class_positions, position) * patch_size,
        "patch_size": patch_size,
        "num_hidden_layers": num_blocks(shapes, f"{prefix}encoder.layers."),
        "num_attention_heads": num_heads_of(width, given, field),
        "intermediate_size": shape_of(shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0],
    }


def timm_fields(shapes: Shapes, given: Mapping[str, Any], prefix: str, field: str) -> dict[str, Any]:
    width, _, patch_size, _ = shape_of(shapes, f"{prefix}patch_embed.proj.weight", 4)
    position = f"{prefix}pos_embed"
    return {
        "hidden_size": width,
        "image_size": side_of(shape_of(shapes, position, 3)[1], position) * patch_size,
        "patch_size": patch_size,
        "num_hidden_layers": num_blocks(shapes, f"{prefix}blocks."),
        "num_attention_heads": num_heads_of(width, given, field),
        "intermediate_size": shape_of(shapes, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
    }


# --- key rows ---------------------------------------------------------------------------------------------


def _without_class_position(position: Tensor) -> Tensor:
    if not position.is_meta and position[:, 0].any():
        raise ConversionError(
            "The position embedding of DINOv2's class token is not zero: the original cannot hold it."
        )
    return position[:, 1:]  # [1, L, D]


FUSED_QKV = Transform(
    lambda qkv: qkv.chunk(3), lambda q, k, v: torch.cat((q, k, v))
)  # [3 D, …] <-> 3 x [D, …]
BATCH_OF_ONE = Transform(lambda x: (x.squeeze(0),), lambda x: x.unsqueeze(0))  # [1, L, D] <-> [L, D]
# timm's DINOv2 adds positions to patches only, transformers' to [class, patches]: the class token's is zero.
NO_CLASS_POSITION = Transform(
    lambda x: (torch.cat((x.new_zeros(1, 1, x.shape[-1]), x), dim=1),),  # [1, L, D] <-> [1, 1 + L, D]
    _without_class_position,
)

# Vision encoders of transformers (`vit.vision_model.*`): our names are the original's.

CLIP = [
    *same_rows(
        "embeddings.{class_embedding,patch_embedding.weight,position_embedding.weight}",
        "pre_layrnorm.{weight,bias}",
    ),
    *unused_rows(
        "embeddings.position_ids", "post_layernorm.{weight,bias}"
    ),  # only pooled outputs pass that norm
]
SIGLIP = [
    *same_rows("embeddings.patch_embedding.{weight,bias}", "embeddings.position_embedding.weight"),
    *unused_rows(
        "embeddings.position_ids",
        "head.probe",
        "head.attention.{in_proj_weight,in_proj_bias}",
        "head.{attention.out_proj,layernorm,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
]
SIGLIP_END = same_rows("post_layernorm.{weight,bias}")
HF_VIT_BLOCK = same_rows(
    "encoder.layers.{l}.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    "encoder.layers.{l}.self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
)

# timm's VisionTransformer as DINOv2 with registers and as SigLIP.

TIMM_DINOV2 = [
    *renamed_rows("{cls_token,reg_token}", "embeddings.{cls_token,register_tokens}"),
    *renamed_rows("pos_embed", "embeddings.position_embeddings", NO_CLASS_POSITION),
    *renamed_rows("patch_embed.proj.{weight,bias}", "embeddings.patch_embeddings.projection.{weight,bias}"),
]
TIMM_DINOV2_BLOCK = [
    *renamed_rows(
        "blocks.{l}.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
        "encoder.layer.{l}.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
    *renamed_rows(
        "blocks.{l}.attn.qkv.{weight,bias}",
        [f"encoder.layer.{{l}}.attention.{name}_proj.{{weight,bias}}" for name in "qkv"],
        FUSED_QKV,
    ),
    *renamed_rows("blocks.{l}.attn.proj.{weight,bias}", "encoder.layer.{l}.attention.o_proj.{weight,bias}"),
    *renamed_rows("blocks.{l}.{ls1,ls2}.gamma", "encoder.layer.{l}.{layer_scale1,layer_scale2}.lambda1"),
]
TIMM_DINOV2_END = renamed_rows("norm.{weight,bias}", "layernorm.{weight,bias}")

TIMM_SIGLIP = [
    *renamed_rows("pos_embed", "embeddings.position_embedding.weight", BATCH_OF_ONE),
    *renamed_rows("patch_embed.proj.{weight,bias}", "embeddings.patch_embedding.{weight,bias}"),
    *unused_rows(
        "attn_pool.latent",
        "attn_pool.{q,kv,proj,norm,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
]
TIMM_SIGLIP_BLOCK = [
    *renamed_rows(
        "blocks.{l}.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
        "encoder.layers.{l}.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    ),
    *renamed_rows(
        "blocks.{l}.attn.qkv.{weight,bias}",
        [f"encoder.layers.{{l}}.self_attn.{name}_proj.{{weight,bias}}" for name in "qkv"],
        FUSED_QKV,
    ),
    *renamed_rows(
        "blocks.{l}.attn.proj.{weight,bias}", "encoder.layers.{l}.self_attn.out_proj.{weight,bias}"
    ),
]
TIMM_SIGLIP_END = renamed_rows("norm.{weight,bias}", "post_layernorm.{weight,bias}")

# segment-anything's image encoder.

SAM = [
    *same_rows("pos_embed"),
    *renamed_rows("patch_embed.proj.{weight,bias}", "patch_embed.projection.{weight,bias}"),
    *renamed_rows("neck.{0,2}.weight", "neck.{conv1,conv2}.weight"),
    *renamed_rows("neck.{1,3}.{weight,bias}", "neck.{layer_norm1,layer_norm2}.{weight,bias}"),
]
SAM_BLOCK = [
    *renamed_rows(
        "blocks.{l}.{norm1,norm2}.{weight,bias}", "layers.{l}.{layer_norm1,layer_norm2}.{weight,bias}"
    ),
    *renamed_rows(
        "blocks.{l}.{attn.qkv,attn.proj,mlp.lin1,mlp.lin2}.{weight,bias}",
        "layers.{l}.{attn.qkv,attn.proj,mlp.lin1,mlp.lin2}.{weight,bias}",
    ),
    *renamed_rows("blocks.{l}.attn.{rel_pos_h,rel_pos_w}", "layers.{l}.attn.{rel_pos_h,rel_pos_w}"),
]

# --- the table ------------------------------------------------------------------------------------------


class VitTable(NamedTuple):
    """How the original names an encoder's tensors: a prefix, and rows once, per block, and after the last block.

    `mark` is a tensor below the prefix that tells the encoder.
    """

    prefix: str
    mark: str
    ends: list[Row]
    block: list[Row]
    final: list[Row] = []

    def is_in(self, shapes: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint holds an encoder of these names."""
        return self.prefix + self.mark in shapes


class FileKind(NamedTuple):
    """How one kind of file, in which the encoder is without a language model, names its tensors.

    Attributes:
        mark: a tensor that tells the kind.
        prefix: of the encoder's names in the file.
        beside: prefixes of tensors that belong to no encoder of pictures.
    """

    mark: str
    prefix: str = ""
    beside: tuple[str, ...] = ()


class OriginalEncoder(NamedTuple):
    """A vision encoder in checkpoints.

    Attributes:
        fields: its configuration's fields, from the shapes of an original checkpoint and the fields that are given.
        alone: its names in the original where it is the only encoder; None if it never is.
        together: its names in the original beside other encoders; None if it never is.
        files_alone: kinds of files of its own, as `alone` names its tensors.
        files_together: the same, as `together` names them.
        model_types: transformers' configurations that a tower of it alone may come with.
    """

    fields: Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]
    alone: VitTable | None = None
    together: VitTable | None = None
    files_alone: tuple[FileKind, ...] = ()
    files_together: tuple[FileKind, ...] = ()
    model_types: tuple[str, ...] = ()


CLIP_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_")
OPEN_CLIP_TEXT = ("text.", "logit_")
SAM_DECODER = ("prompt_encoder.", "mask_decoder.")

CLIP_MARK, SIGLIP_MARK = "embeddings.class_embedding", "embeddings.patch_embedding.bias"
"""SigLIP's patch embedding has a bias, CLIP's has none."""

ORIGINAL_ENCODERS: dict[str, OriginalEncoder] = {
    "clip": OriginalEncoder(
        fields=clip_fields,
        alone=VitTable("vit.vision_model.", CLIP_MARK, CLIP, HF_VIT_BLOCK),
        files_alone=(
            FileKind(f"vision_model.{CLIP_MARK}", "vision_model.", CLIP_TEXT),
            FileKind(CLIP_MARK),
        ),
        model_types=("clip", "clip_vision_model"),
    ),
    "dinov2": OriginalEncoder(
        fields=dinov2_fields,
        together=VitTable(
            "vit.dino_featurizer.", "pos_embed", TIMM_DINOV2, TIMM_DINOV2_BLOCK, TIMM_DINOV2_END
        ),
        files_together=(FileKind("reg_token", beside=("mask_token",)),),
    ),
    "siglip": OriginalEncoder(
        fields=siglip_fields,
        alone=VitTable("vit.vision_model.", SIGLIP_MARK, SIGLIP, HF_VIT_BLOCK, SIGLIP_END),
        together=VitTable(
            "vit.siglip_featurizer.", "pos_embed", TIMM_SIGLIP, TIMM_SIGLIP_BLOCK, TIMM_SIGLIP_END
        ),
        files_alone=(
            FileKind(f"vision_model.{SIGLIP_MARK}", "vision_model.", CLIP_TEXT),
            FileKind(SIGLIP_MARK),
        ),
        files_together=(
            FileKind("attn_pool.latent"),
            FileKind("visual.trunk.attn_pool.latent", "visual.trunk.", OPEN_CLIP_TEXT),
        ),
        model_types=("siglip", "siglip_vision_model"),
    ),
    "sam": OriginalEncoder(
        fields=sam_fields,
        together=VitTable("vit.sam_featurizer.", "pos_embed", SAM, SAM_BLOCK),
        files_together=(
            FileKind("neck.0.weight"),
            FileKind("image_encoder.neck.0.weight", "image_encoder.", SAM_DECODER),
        ),
    ),
}


def encoders_alone() -> dict[str, VitTable]:
    """Return the encoders that can be the only one of a tower, and how the original names them there."""
    return {name: row.alone for name, row in ORIGINAL_ENCODERS.items() if row.alone}


def encoders_together() -> dict[str, VitTable]:
    """Return the encoders that come together in one tower, and how the original names them there."""
    return {name: row.together for name, row in ORIGINAL_ENCODERS.items() if row.together}
