"""The optimizer of `train_tiny.py`: Muon for matrices and convolutions, AdamW for everything else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from visualrwkv_hf.training import is_matrix

NOT_FOR_MUON = ("embed_tokens", "lm_head", "embedder.")
"""AdamW trains the matrices whose names contain one of these: their rows or columns are tokens or colours of pixels."""


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of hidden layers, AdamW for everything else, on one schedule.

    Muon (K. Jordan et al., 2024) replaces a matrix's momentum by the nearest matrix whose singular values are all one.
    Scaled by 0.2 times the root of its longer side it is as large as AdamW's update (J. Liu et al., arXiv 2502.16982,
    section 2.2). A convolution's kernel is taken as the matrix (output channels, all others). Trained from scratch, a
    small model learns letters in about half the time that it needs with AdamW alone.

    Args:
        named_parameters: Names and parameters; those without `requires_grad` are left out.
        learning_rate: AdamW's learning rate.
        muon_learning_rate: Muon's; a scheduler multiplies both by the same factor.
        weight_decay: Decoupled weight decay of matrices, embeddings included, and of kernels.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        muon_learning_rate: float,
        weight_decay: float,
    ):
        trained = [(name, weight) for name, weight in named_parameters if weight.requires_grad]
        self.hidden = [weight for name, weight in trained if is_hidden_matrix(name, weight)]
        self.flat = [nn.Parameter(weight.detach().flatten(1)) for weight in self.hidden]
        others = [weight for name, weight in trained if not is_hidden_matrix(name, weight)]
        groups = [
            {"params": [w for w in others if is_matrix(w)], "weight_decay": weight_decay},
            {"params": [w for w in others if not is_matrix(w)], "weight_decay": 0.0},
        ]
        super().__init__([weight for _, weight in trained], {"lr": learning_rate})
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=learning_rate)]
        if self.flat:
            muon = torch.optim.Muon(
                self.flat,
                lr=muon_learning_rate,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimizers.append(muon)
        self._share_groups()

    def _share_groups(self) -> None:
        """Let a scheduler that changes this optimizer's groups change those of both."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for flat, weight in zip(self.flat, self.hidden):
            flat.data = weight.detach().flatten(1)  # the same memory, wherever several processes have put it
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.hidden:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Return whether Muon trains a parameter: a matrix between hidden layers, or a kernel of a convolution."""
    return (
        is_matrix(weight)
        and not name.endswith("r_k")  # a vector for each head
        and not any(part in name for part in NOT_FOR_MUON)
    )
