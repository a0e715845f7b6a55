"""examples/tiny_optimizer.py: which parameters Muon trains, its steps against torch's optimizers, and resuming."""

import copy

import add_examples  # noqa: F401
import pytest
import torch

# isort: split

import tiny_optimizer
from torch import nn

RATES = {"learning_rate": 1e-3, "muon_learning_rate": 4e-3, "weight_decay": 0.1}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 6)
        self.convolution = nn.Conv2d(3, 5, 3)
        self.layer = nn.Linear(6, 4)
        self.x_k = nn.Parameter(torch.rand(1, 1, 6))
        self.r_k = nn.Parameter(torch.rand(2, 3))
        self.lm_head = nn.Linear(4, 7, bias=False)

    def forward(self, ids, pictures):
        seen = self.convolution(pictures).mean((1, 2, 3))[:, None, None]
        hidden = self.layer(self.embed_tokens(ids) * self.x_k + seen * self.r_k.flatten())
        return self.lm_head(hidden).square().mean()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def optimizer_of(net) -> tiny_optimizer.MuonAndAdamW:
    return tiny_optimizer.MuonAndAdamW(net.named_parameters(), **RATES)


def loss_of(net, number: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(number)
    return net(torch.randint(7, (2, 5), generator=draw), torch.rand(2, 3, 6, 6, generator=draw))


def train(net, optimizer, steps: range, scheduler=None):
    for number in steps:
        loss_of(net, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


def test_muon_trains_matrices_and_kernels_of_hidden_layers(net):
    chosen = [
        name for name, weight in net.named_parameters() if tiny_optimizer.is_hidden_matrix(name, weight)
    ]
    assert chosen == ["convolution.weight", "layer.weight"]


def test_steps_are_those_of_torchs_optimizers_also_when_a_scheduler_changes_the_rates(net):
    expected = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    train(net, optimizer, range(3), torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))

    layer, kernel = expected.layer.weight, expected.convolution.weight
    matrix = nn.Parameter(kernel.detach().clone().reshape(5, 27))
    muon = torch.optim.Muon([layer, matrix], lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decayed = [expected.embed_tokens.weight, expected.r_k, expected.lm_head.weight]
    plain = [expected.convolution.bias, expected.layer.bias, expected.x_k]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    for number in range(3):
        muon.param_groups[0]["lr"] = 4e-3 / (1 + number)
        for group in adamw.param_groups:
            group["lr"] = 1e-3 / (1 + number)
        loss_of(expected, number).backward()
        matrix.grad = kernel.grad.reshape(5, 27)
        muon.step()
        adamw.step()
        expected.zero_grad()
        with torch.no_grad():
            kernel.copy_(matrix.reshape(kernel.shape))
    for (name, weight), wanted in zip(net.named_parameters(), expected.parameters()):
        torch.testing.assert_close(weight, wanted, msg=name)


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(net):
    stopped = copy.deepcopy(net)
    whole = optimizer_of(net)
    train(net, whole, range(4))
    first = optimizer_of(stopped)
    train(stopped, first, range(2))
    second = optimizer_of(stopped)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["lr"] for group in second.param_groups] == [group["lr"] for group in first.param_groups]
    train(stopped, second, range(2, 4))
    for weight, wanted in zip(stopped.parameters(), net.parameters()):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0)


def test_frozen_parameters_stay_and_a_scheduler_reaches_a_loaded_optimizer(net):
    net.convolution.requires_grad_(False)
    before = net.convolution.weight.clone()
    optimizer = optimizer_of(net)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # every rate becomes 0
    layer = net.layer.weight.clone()
    train(net, optimizer, range(2))
    assert torch.equal(net.convolution.weight, before) and torch.equal(net.layer.weight, layer)


def test_weights_may_be_moved_to_other_memory(net):
    """DistributedDataParallel does so on a CPU, after the optimizer was made."""
    moved = copy.deepcopy(net)
    optimizer = optimizer_of(moved)
    for weight in moved.parameters():
        weight.data = weight.data.clone()
    train(moved, optimizer, range(2))
    train(net, optimizer_of(net), range(2))
    for weight, wanted in zip(moved.parameters(), net.parameters()):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0)


def test_zero_grad_clears_every_gradient(net):
    optimizer = optimizer_of(net)
    loss_of(net, 0).backward()
    assert all(weight.grad is not None for weight in net.parameters())
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in net.parameters())
