"""The recurrence of RWKV-6 and RWKV-5 in Triton; `visualrwkv_hf.wkv.wkv6` is the plain version.

The forward is in `.wkv6_fwd`, the backward in `.wkv6_bwd`, and how they are launched in `.launches`.
"""

from torch import Tensor

from .launches import call, needs_gradient
from .wkv6_bwd import wkv6_backward
from .wkv6_fwd import wkv6_forward


def _setup_context(ctx, inputs, output):
    r, w, k, v, u, initial_state, order, cu_seqlens, save = inputs
    _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.has_initial_state = initial_state is not None
    if save:
        ctx.save_for_backward(r, w, k, v, u, order, cu_seqlens, *saved)


def _backward(ctx, dy, dfinal_state, *_):
    *gradients, dinitial_state = wkv6_backward(*ctx.saved_tensors, dy, dfinal_state)
    return *gradients, dinitial_state if ctx.has_initial_state else None, None, None, None


wkv6_forward.register_autograd(_backward, setup_context=_setup_context)


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence of RWKV-6 and 5 (arXiv 2404.05892, section 4.2) like `visualrwkv_hf.wkv.wkv6`.

        y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

    Products have operands of the precision of r's dtype (`launches.precision_of`); all sums are float32. Results do
    not depend on the order in which programs run.

    Args:
        r: receptance, [B, T, H, K] in bfloat16, float16 or float32; K = V in 32, 64, 128.
        w: log decay, <= 0 and as low as -inf, [B, T, H, K]. If it is one row expanded over B and T, as in RWKV-5, it is
            not copied.
        k: key, [B, T, H, K].
        v: value, [B, T, H, V].
        u: bonus of the current token, [H, K].
        initial_state: S_0, [B, H, K, V] float32, or [S, H, K, V] with cu_seqlens; None is zeros.
        order: int64 [B, T]: position p of the recurrence is token order[b, p], each token once. ~token (negative) is a
            pad: the state does not change there, and y and the gradients are 0. None is 0, 1, ..., T - 1.
        cu_seqlens: int32 or int64 [S + 1], where S sequences packed along T begin and end, 0, ..., T; B is 1. order
            counts from the start of the pack, and stays within each sequence.

    Returns:
        y [B, T, H, V] in the dtype of r; the final state, like the initial one.
    """
    save = needs_gradient(r, w, k, v, u, initial_state)
    arguments = r, w, k, v, u, initial_state, order, cu_seqlens, save
    y, state, *_ = wkv6_forward(*arguments) if save else call(wkv6_forward, *arguments)
    return y, state
