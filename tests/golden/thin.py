"""Makes a small folder of golden data of a whole one: `python thin.py SOURCE TARGET`.

Only expected tensors become smaller, each to its leading corner, and README.md says which. Everything else is
copied as it is. What stands in TARGET already stays.
"""

import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

CORNERS: list[tuple[str, tuple[int | None, ...]]] = [
    (r"x_ops/wkv.*", ()),
    (r"j_preproc/siglip_image_processor/.*\.every8", (8, 8)),
    (r"j_preproc/(clip_image_processor|v700_transforms)/.*", (14, 14)),
    (r".*/pixels\..*", (8, 8)),
    (r".*/(logits|logits128|logits_cols|logits_fp32|logits_bf16)(\..*)?", (24,)),
    (r".*/block\d_(in|out)\..*", (16,)),
    (r"[bcd]_.*/(image_features|encoded|compressed|vtc_out|vit_last_hidden_state)(\..*)?", (24,)),
    (r"c_hd_uhd/.*/fused\..*", (12, None)),
    (r"h_loss/.*/grad.*\..*", (16, 16)),
]
"""Pattern of <kind>/<case>/<tensor> -> how much of its last dimensions is kept (None: all)."""


def thinned(name: str, tensor: Tensor) -> Tensor:
    """The leading corner of `tensor` that is kept."""
    corner = next((corner for pattern, corner in CORNERS if re.fullmatch(pattern, name)), ())
    kept = corner[max(0, len(corner) - tensor.ndim) :]
    return tensor[(..., *(slice(n) for n in kept))].contiguous()


def main(source: Path, target: Path) -> None:
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        relative = path.relative_to(source)
        copy = target / relative
        if relative.name in ("README.md", "SHA256SUMS") or copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "expected.safetensors":
            case = relative.parent.as_posix()
            save_file({name: thinned(f"{case}/{name}", t) for name, t in load_file(path).items()}, copy)
        else:
            shutil.copyfile(path, copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
