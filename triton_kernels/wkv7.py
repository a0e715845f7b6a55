"""The generalised delta rule of RWKV-7 in Triton; `visualrwkv_hf.wkv.wkv7` is the plain version.

The forward is in `.wkv7_fwd`, the backward in `.wkv7_bwd`, and how they are launched in `.launches`.
"""

import torch
from torch import Tensor

from .launches import call, needs_gradient
from .wkv7_bwd import wkv7_backward
from .wkv7_fwd import wkv7_forward


def _setup_context(ctx, inputs, output):
    *tensors, ctx.min_log_decay, ctx.saved = inputs
    _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(saved if ctx.saved else ()))


def _backward(ctx, dy, dfinal_state, *_):
    saved_tensors = ctx.saved_tensors  # asked for once, because under a checkpoint this computes them
    tensors, saved = saved_tensors[:9], saved_tensors[9:]
    if not ctx.saved:
        _, _, *saved = wkv7_forward(*tensors, ctx.min_log_decay, True)
    dy, dfinal_state = (None if x is None else x.contiguous() for x in (dy, dfinal_state))
    *gradients, dstate = wkv7_backward(*tensors, ctx.min_log_decay, *saved, dy, dfinal_state)
    return *gradients, dstate if ctx.needs_input_grad[6] else None, None, None, None, None


wkv7_forward.register_autograd(_backward, setup_context=_setup_context)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    min_log_decay: float = -torch.inf,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the generalised delta rule of RWKV-7 (arXiv 2503.14456, section 4) like `visualrwkv_hf.wkv.wkv7`.

        S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        y_t = r_t^T S_t

    Products have operands of the precision of r's dtype (`launches.precision_of`); all sums are float32. Results do
    not depend on the order in which programs run.

    Args:
        r: receptance, [B, T, H, K] in bfloat16, float16 or float32; K = V in 32, 64, 128.
        w: log decay, <= 0 and as low as -inf, [B, T, H, K].
        k: key, [B, T, H, K].
        v: value, [B, T, H, V].
        a: what is read from the state before it decays, [B, T, H, K].
        b: where that is written, [B, T, H, K].
        initial_state: S_0, [B, H, K, V] float32, or [S, H, K, V] with cu_seqlens; None is zeros.
        order: int64 [B, T]: position p of the recurrence is token order[b, p], each token once. ~token (negative) is a
            pad: the state does not change there, and y and the gradients are 0. None is 0, 1, ..., T - 1.
        cu_seqlens: int32 or int64 [S + 1], where S sequences packed along T begin and end, 0, ..., T; B is 1. order
            counts from the start of the pack, and stays within each sequence.
        min_log_decay: a known lower bound of w. If it is not low, there is less to compute. A w below it overflows.
        recompute: whether a backward computes the forward again. It saves 11 times the memory of r per layer in
            bfloat16 with K = 64, and computes the forward twice.

    Returns:
        y [B, T, H, V] in the dtype of r; the final state, like the initial one.
    """
    tensors = [x.contiguous() for x in (r, w, k, v, a, b)]
    options = [None if x is None else x.contiguous() for x in (initial_state, order, cu_seqlens)]
    needs = needs_gradient(*tensors, initial_state)
    arguments = *tensors, *options, min_log_decay, needs and not recompute
    y, final_state, *_ = wkv7_forward(*arguments) if needs else call(wkv7_forward, *arguments)
    return y, final_state
