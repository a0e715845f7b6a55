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
    return [FUNCTIONS[f](x_m @ w1) @ w2 for x_m, w1, w2, f in zip(x, down, up, functions)]
