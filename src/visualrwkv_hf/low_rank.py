"""The low-rank maps of a time mix, which make its decay, its gate and the like depend on the data."""

from collections.abc import Callable, Sequence

import torch

from .dispatch import kernel

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

FEW_ROWS = 8
"""Largest batch for which the kernel is used. It reads all weights once per row; beyond, matrix products are faster."""


def low_rank(
    x: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    functions: Sequence[str],
) -> Sequence[torch.Tensor]:
    """Compute f_m(x_m W1_m) W2_m for M maps (RWKV-7: arXiv 2503.14456, section 4; RWKV-6: 2404.05892, section 4).

    Args:
        x: M times [B, T, C].
        down: W1, M times [C, D_m].
        up: W2, M times [D_m, A].
        functions: f, M of `FUNCTIONS`.

    Returns:
        M times [B, T, A] in the dtype of x.
    """
    B, T, _ = x[0].shape
    if T == 1 and B <= FEW_ROWS and not torch.is_grad_enabled() and (fast := kernel("low_rank", x[0])):
        return fast(x, down, up, functions).unbind()
    return [matmul(FUNCTIONS[f](matmul(x_m, w1)), w2) for x_m, w1, w2, f in zip(x, down, up, functions)]


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x W for a weight of a low-rank map.

    The native op multiplies in float32 where a CPU has no unit for the dtype: these products would otherwise take
    longer than those of all linear layers.

    Args:
        x: [..., T, in].
        weight: W, [in, out] or [..., in, out].

    Returns:
        [..., T, out] in the dtype of x.
    """
    fast = kernel("matmul", x)
    return x @ weight if fast is None else fast(x, weight)  # type: ignore[no-any-return]
