"""The WKV recurrences as the papers print them: float64, one token and one head at a time.

Shapes are those of `visualrwkv_hf.wkv`: r, w, k, a, b [B, T, H, K], v [B, T, H, V], u [H, K], state
[B, H, K, V]; w is the log decay. Everything is differentiable by autograd.
"""

import torch


def wkv6(r, w, k, v, u, state):
    """RWKV-6: y_t = r_t (S + diag(u) k_t^T v_t), then S <- diag(exp(w_t)) S + k_t^T v_t."""

    def step(S, r, w, k, v, u):
        kv = torch.outer(k, v)
        return r @ (S + torch.diag(u) @ kv), torch.diag(w.exp()) @ S + kv

    return over_heads(lambda S, h, *x: step(S, *x, u.double()[h]), (r, w, k, v), state)


def wkv7(r, w, k, v, a, b, state):
    """RWKV-7: S <- (diag(exp(w_t)) + b_t a_t^T) S + k_t v_t^T, then y_t = r_t S."""

    def step(S, r, w, k, v, a, b):
        S = (torch.diag(w.exp()) + torch.outer(b, a)) @ S + torch.outer(k, v)
        return r @ S, S

    return over_heads(lambda S, h, *x: step(S, *x), (r, w, k, v, a, b), state)


def over_heads(step, inputs, state):
    """step(S [K, V], h, *inputs of one token and head) -> y [V], S; over all batch rows, heads and tokens."""
    inputs, state = [x.double() for x in inputs], state.double()
    B, T, H, _ = inputs[0].shape
    rows_y, rows_S = [], []
    for i in range(B):
        heads_y, heads_S = [], []
        for h in range(H):
            S, y = state[i, h], []
            for t in range(T):
                y_t, S = step(S, h, *(x[i, t, h] for x in inputs))
                y.append(y_t)
            heads_y.append(torch.stack(y))
            heads_S.append(S)
        rows_y.append(torch.stack(heads_y, 1))
        rows_S.append(torch.stack(heads_S))
    return torch.stack(rows_y), torch.stack(rows_S)
