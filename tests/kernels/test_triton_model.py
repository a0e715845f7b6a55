"""The language model over the Triton kernels, in their interpreter, against the same over plain torch."""

import threading
import warnings

import pytest
import torch
from tiny import awake, text_config
from triton_interpreter import NEEDS_INTERPRETER, launches

from visualrwkv_hf import (
    VisualRWKVCache,
    VisualRWKVForCausalLM,
    VisualRWKVStaticCache,
    dispatch,
    kernel_backend,
)

pytestmark = NEEDS_INTERPRETER

B, T = 2, 37
SCANNED = slice(8, 30)


@pytest.fixture(scope="module", params=(5, 6, 7), ids=lambda version: f"rwkv{version}")
def model(request) -> VisualRWKVForCausalLM:
    config = text_config(request.param, head_dim=32, hidden_size=64)
    return awake(VisualRWKVForCausalLM(config)).float().eval()


@pytest.fixture(scope="module")
def batch() -> dict:
    """Two texts, one with pads in front; every other layer reads a part of them backwards."""
    ids = torch.randint(1, 300, (B, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    order = torch.arange(T).repeat(B, 1)
    order[:, SCANNED] = order[:, SCANNED].flip(1)
    return dict(
        input_ids=ids, attention_mask=mask, scan_orders=torch.stack([torch.arange(T).expand(B, T), order], 1)
    )


def assert_close(actual, expected):
    # Both sum in float32, in different orders; the head's norm amplifies it. Measured up to 2.4e-5.
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < 1e-4, float(error)


def test_logits_and_gradients_equal_plain_torch(model, batch):
    real = batch["attention_mask"].bool()

    def run(backend):
        model.zero_grad()
        with kernel_backend(backend):
            logits = model(**batch, use_cache=False).logits[real]
            logits.square().mean().backward()
        return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected, expected_gradients = run("torch")
    with launches() as seen:
        actual, gradients = run("triton")
    assert {launch.kernel.split("_")[0] for launch in seen} == {"token", f"wkv{7 if is_7(model) else 6}"}
    assert_close(actual, expected)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name])


def is_7(model) -> bool:
    return model.config.rwkv_version == 7


@pytest.mark.parametrize("cache", [VisualRWKVCache, VisualRWKVStaticCache])
@torch.no_grad()
def test_steps_equal_plain_torch(model, batch, cache):
    """Each step is a few launches a layer, one of them of the recurrence, with the state in its place."""

    def run(backend):
        state, steps = cache(model.config), []
        with kernel_backend(backend):
            model(**batch, past_key_values=state)
            for token in batch["input_ids"][:, :3].split(1, 1):
                address = state.layers[0].recurrent_states[0].data_ptr()
                steps.append(model(token, past_key_values=state).logits)
                assert state.layers[0].recurrent_states[0].data_ptr() == address
        return torch.cat(steps, 1), state

    expected, expected_state = run("torch")
    with launches() as seen:
        actual, state = run("triton")
    layers = 3 * model.config.num_hidden_layers
    assert len([launch for launch in seen if "decode" in launch.kernel]) == layers
    assert len([launch for launch in seen if "norm_shift" in launch.kernel]) == 2 * layers
    assert_close(actual, expected)
    for layer, other in zip(state.layers, expected_state.layers):
        assert_close(layer.recurrent_states[0], other.recurrent_states[0])


@torch.no_grad()
def test_a_step_passes_over_pads(model, batch):
    """A finished row of a batch gets pads: its state stays as it is."""
    with kernel_backend("triton"):
        state = VisualRWKVCache(model.config)
        model(**batch, past_key_values=state)
        before = [layer.recurrent_states[0].clone() for layer in state.layers]
        mask = torch.cat([batch["attention_mask"], torch.tensor([[0], [1]])], 1)
        model(batch["input_ids"][:, :1], attention_mask=mask, past_key_values=state)
    for layer, old in zip(state.layers, before):
        new = layer.recurrent_states[0]
        assert torch.equal(new[0], old[0]) and not torch.equal(new[1], old[1])


def test_generate_equals_plain_torch(model, batch):
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    answers = []
    for backend in ("torch", "triton"):
        with kernel_backend(backend):
            answers.append(model.generate(**prompt, max_new_tokens=4, do_sample=False))
    assert torch.equal(*answers)


def test_gradient_checkpointing_runs_the_kernels_again(model, batch):
    real = batch["attention_mask"].bool()

    def gradients():
        model.zero_grad()
        model(**batch, use_cache=False).logits[real].square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters()]

    with kernel_backend("triton"):
        expected = gradients()
        model.train()
        model.activation_checkpointing_enable()
        try:
            actual = gradients()
        finally:
            model.activation_checkpointing_disable()
            model.eval()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected))


def test_a_checkpoint_in_a_thread_of_autograd_computes_as_it_did(model, batch):
    """On a GPU that is where the backward runs, and `kernel_backend` is of one thread."""
    model.train()
    model.activation_checkpointing_enable()
    try:
        with kernel_backend("triton"), launches() as seen:
            loss = model(**batch, use_cache=False).logits.square().mean()
            forwards = len(seen)
            backward = threading.Thread(target=loss.backward)
            model.zero_grad()
            backward.start()
            backward.join()
    finally:
        model.activation_checkpointing_disable()
        model.eval()
    assert len(seen) > 2 * forwards  # again, and then the gradients
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_a_step_and_a_training_pass_compile_in_one_graph(batch):
    model = awake(VisualRWKVForCausalLM(text_config(7, head_dim=32, hidden_size=64))).float().eval()
    ids = batch["input_ids"][:, :20]

    def steps(forward):
        state = VisualRWKVStaticCache(model.config)
        with torch.no_grad():
            model(ids, past_key_values=state)
            return torch.cat([forward(ids[:, t : t + 1], past_key_values=state).logits for t in range(3)], 1)

    def gradients(forward):
        model.zero_grad()
        forward(ids, use_cache=False).logits.square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters()]

    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with kernel_backend("triton"):
        assert torch.equal(steps(compiled), steps(model.forward))
        assert all(torch.equal(*pair) for pair in zip(gradients(compiled), gradients(model.forward)))


def test_what_no_kernel_serves_compiles_as_plain_torch(batch, monkeypatch):
    """It is said where it can be, outside of a graph."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(dispatch, "_said", set())
    model = awake(VisualRWKVForCausalLM(text_config(7, head_dim=32, hidden_size=64))).double().eval()
    ids = batch["input_ids"]

    def logits(forward):
        with torch.no_grad():
            return forward(ids, use_cache=False).logits

    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        compiled = logits(torch.compile(model, backend="eager", fullgraph=True))
    with pytest.warns(
        UserWarning, match=r"wkv7 runs as plain torch, slower than its Triton kernel: .*float64"
    ):
        torch.testing.assert_close(compiled, logits(model))
