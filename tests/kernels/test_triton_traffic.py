"""How much memory the chunked WKV kernels touch: what they leave to one another is most of what they cost."""

import pytest
import torch

pytest.importorskip("triton")

from triton_interpreter import NEEDS_INTERPRETER, launches

from visualrwkv_hf.triton_kernels.wkv6 import wkv6
from visualrwkv_hf.triton_kernels.wkv7 import wkv7

pytestmark = NEEDS_INTERPRETER

B, T, H, K = 1, 512, 1, 64  # long enough that the final state, which does not grow with T, does not count
UNIT = B * T * H * K * 2
"""Bytes of one bfloat16 [B, T, H, K]. wkv6 cannot do with less than 5 of them forward and 9 backward, wkv7 7 and 13."""
LIMITS = {wkv6: (22, 33), wkv7: (28, 44)}
"""Forward and backward. wkv7's gradients take two kernels that both read the states, for a single one spills. Its
forward writes 5.5 of these for them, which they would otherwise compute again: instructions are what these kernels wait
for. All arguments count, also r, k, a and b of the second gradients kernel, which it reads without a bound only."""


def bfloat16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("op", [wkv6, wkv7])
def test_training_touches_little_memory(op):
    r, w, k, v = (bfloat16(B, T, H, K) for _ in range(4))
    more = [bfloat16(H, K)] if op is wkv6 else [bfloat16(B, T, H, K), bfloat16(B, T, H, K)]
    # RWKV-7's own bound: for decays without one its chunks are half as long, and the traffic half as much again.
    options = {"min_log_decay": -0.6065306597126334} if op is wkv7 else {}
    with launches() as forward:
        y, state = op(r, w, k, v, *more, **options)
    with launches() as backward:
        torch.autograd.backward([y, state], [torch.ones_like(y), torch.ones_like(state)])
    for name, seen, limit in zip(("forward", "backward"), (forward, backward), LIMITS[op]):
        units = {launch.kernel: launch.bytes / UNIT for launch in seen}
        print(f"{op.__name__} {name}: {sum(units.values()):.1f} u of {limit},", units)
        assert len(seen) == len(units) >= 2
        assert sum(units.values()) <= limit
