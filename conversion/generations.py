"""The checkpoints of each generation of RWKV: one row each.

This is the half of `visualrwkv_hf.generations.GENERATIONS` that only the converter needs. It is not in that table
because the converter does not travel to the Hub with a model; a test compares the keys of both.
"""

from collections.abc import Mapping
from typing import NamedTuple


class RankSource(NamedTuple):
    """Where the rank of a low-rank map can be read: dimension `dim` of a block's tensor of `dims` dimensions.

    `after_first`: the first block's tensor is not used, so that its rank says nothing.
    """

    tensor: str
    dim: int
    after_first: bool = False
    dims: int = 2


class OriginalGeneration(NamedTuple):
    """What a generation's tensors are called, and what their shapes tell. Names are those within a block.

    Attributes:
        mark: a tensor of every block that no other generation has.
        heads: a tensor [H, K].
        block: patterns of the names of a block's tensors, one name for each alternative in `{a,b}`. Our names are
            the original's.
        after_first: patterns of the tensors that the first block has in the original only, where nothing uses them.
        ranks: fields of `VisualRWKVTextConfig` and where they are read.
        projector: the projector of a new VLM, unless its family has another.
    """

    mark: str
    heads: str
    block: tuple[str, ...]
    after_first: tuple[str, ...] = ()
    ranks: Mapping[str, RankSource] = {}
    projector: str = "linear"


ORIGINAL_GENERATIONS = {
    5: OriginalGeneration(
        mark="att.time_mix_g",
        heads="att.time_faaaa",
        block=(
            "{ln1,ln2,att.ln_x}.{weight,bias}",
            "att.time_mix_{k,v,r,g}",
            "att.time_{decay,faaaa}",
            "att.{receptance,key,value,gate,output}.weight",
            "ffn.time_mix_{k,r}",
            "ffn.{receptance,key,value}.weight",
        ),
    ),
    6: OriginalGeneration(
        mark="att.time_maa_x",
        heads="att.time_faaaa",
        block=(
            "{ln1,ln2,att.ln_x}.{weight,bias}",
            "att.time_maa_{x,w,k,v,r,g,w1,w2}",
            "att.time_{decay,decay_w1,decay_w2,faaaa}",
            "att.{receptance,key,value,gate,output}.weight",
            "ffn.time_maa_{k,r}",
            "ffn.{receptance,key,value}.weight",
        ),
        ranks={
            "mix_low_rank_dim": RankSource("att.time_maa_w2", 1, dims=3),
            "decay_low_rank_dim": RankSource("att.time_decay_w1", 1),
        },
    ),
    7: OriginalGeneration(
        mark="att.x_r",
        heads="att.r_k",
        block=(
            "{ln1,ln2,att.ln_x}.{weight,bias}",
            "att.x_{r,w,k,v,a,g}",
            "att.{w0,w1,w2,a0,a1,a2,g1,g2,k_k,k_a,r_k}",
            "att.{receptance,key,value,output}.weight",
            "ffn.x_k",
            "ffn.{key,value}.weight",
        ),
        after_first=("att.{v0,v1,v2}",),  # the value residual mixes a block's values with the first block's
        ranks={
            "decay_low_rank_dim": RankSource("att.w1", 1),
            "a_low_rank_dim": RankSource("att.a1", 1),
            "v_low_rank_dim": RankSource("att.v1", 1, after_first=True),
            "gate_low_rank_dim": RankSource("att.g1", 1),
        },
        projector="gated_norm",
    ),
}
"""By the version that `VisualRWKVTextConfig.rwkv_version` names."""
