"""Write a small checkpoint as the original saves it; its configuration can be inferred from its tensors alone."""

from pathlib import Path

import torch
from tiny import awake, vlm_config

from visualrwkv_hf import VisualRWKVForConditionalGeneration
from visualrwkv_hf.conversion import restore_state_dict


def write_checkpoint(path: Path, split: bool = False) -> list[Path]:
    """Write a v6.0 model, 64 wide, in bfloat16 and with the whole vocabulary, and return the paths of its files.

    It is one file of 17 MB, or with `split` two: the language model in `*_rwkv.pth`, the rest in `*_visual.pth`.
    """
    clip = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, image_size=56
    )
    text = dict(rwkv_version=6, vocab_size=65536, hidden_size=64, head_dim=64, num_hidden_layers=2)
    config = vlm_config(
        vocab_size=65536,
        text_config=text,
        vision_config={"clip_config": {**clip, "patch_size": 14}, "class_token": "last"},
    )
    torch.manual_seed(0)
    model = awake(VisualRWKVForConditionalGeneration(config)).bfloat16()
    tensors = {
        name: tensor.clone() for name, tensor in restore_state_dict(model.state_dict(), config).items()
    }
    if not split:
        torch.save(tensors, path)
        return [path]
    pair = [path.with_name(f"{path.stem}_{part}.pth") for part in ("rwkv", "visual")]
    is_text = {name: name.startswith("rwkv.") for name in tensors}
    torch.save({n.removeprefix("rwkv."): t for n, t in tensors.items() if is_text[n]}, pair[0])
    torch.save({n: t for n, t in tensors.items() if not is_text[n]}, pair[1])
    return pair
