"""Native CPU ops against the plain torch functions. They compute in float32; sums differ in their order only."""

import copy
import itertools
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS
from tiny import awake, pixels, prompt, text_config, tiny_vlm, vlm_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVForConditionalGeneration, bundled_model
from visualrwkv_hf.cpu import block, formats, library, memory, products
from visualrwkv_hf.cpu import layers as native_layers
from visualrwkv_hf.cpu import ops as native
from visualrwkv_hf.dispatch import chosen_backend, kernel_backend, wkv_backend
from visualrwkv_hf.inference import model_cache
from visualrwkv_hf.inference.loading import load_model
from visualrwkv_hf.inference.progress import backend_of
from visualrwkv_hf.low_rank import low_rank, matmul
from visualrwkv_hf.wkv import wkv6, wkv7

TOLERANCE = 1e-5
"""Relative, float32: sums of some hundred terms in another order."""

pytestmark = NEEDS_NATIVE_OPS


@pytest.fixture
def without_int8_products(built, monkeypatch):
    """A CPU that multiplies no integers fast, so that many rows are not rounded either: see test_cpu_int8.py."""
    monkeypatch.setitem(native.library().contract, "FAST_INT8", 0)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def recurrence_inputs(version: int, B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    r, k, a, rate = torch.randn(4, B, T, H, K).to(dtype)
    w, v = -torch.rand(B, T, H, K).to(dtype), torch.randn(B, T, H, V).to(dtype)
    inputs = dict(r=r, w=w, k=k, v=v)
    if version == 6:
        return inputs | dict(u=torch.randn(H, K))
    kk = nn.functional.normalize(a.float(), dim=-1).to(dtype)
    return inputs | dict(a=-kk, b=kk * rate.sigmoid())


def both(version: int, **arguments) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    op = {6: wkv6, 7: wkv7}[version]
    with torch.no_grad(), kernel_backend("native"):
        fast = op(**arguments)
        with kernel_backend("torch"):
            return fast, op(**arguments)


# bfloat16: both round the same float32 result, which may fall to either side of a half: one unit in 2^8.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("K, V", [(16, 16), (64, 64), (64, 96), (128, 128)])
@pytest.mark.parametrize("T", [1, 7, 65])
@pytest.mark.parametrize("version", [6, 7])
def test_recurrence_equals_plain(version, T, K, V, dtype, tolerance):
    inputs = recurrence_inputs(version, 2, T, 3, K, V, dtype)
    state = torch.randn(2, 3, K, V)
    given = state.clone()
    (out, after), (plain_out, plain_after) = both(version, **inputs, initial_state=state)
    assert out.dtype == dtype and error(out, plain_out) < tolerance
    assert after.dtype == torch.float32 and error(after, plain_after) < TOLERANCE
    assert torch.equal(state, given)


@pytest.mark.parametrize("version", [6, 7])
def test_recurrence_reads_in_order_and_passes_over_pads(version):
    inputs = recurrence_inputs(version, 2, 20, 2, 16, 16, torch.float32)
    order = torch.stack([torch.randperm(20), torch.arange(20)])
    order[1, :5] = ~order[1, :5]
    (out, state), (plain_out, plain_state) = both(version, **inputs, order=order)
    assert error(out, plain_out) < TOLERANCE and error(state, plain_state) < TOLERANCE
    assert not out[1, :5].any()


@pytest.mark.parametrize("version", [6, 7])
def test_recurrence_of_packed_sequences(version):
    inputs = recurrence_inputs(version, 1, 20, 2, 16, 16, torch.float32)
    begin = torch.tensor([0, 6, 6, 20], dtype=torch.int32)
    order = torch.cat([torch.arange(6).flip(0), torch.arange(6, 20)])[None]
    arguments = inputs | dict(initial_state=torch.randn(3, 2, 16, 16), order=order, cu_seqlens=begin)
    (out, state), (plain_out, plain_state) = both(version, **arguments)
    assert error(out, plain_out) < TOLERANCE and error(state, plain_state) < TOLERANCE


def gradients(op, inputs: dict, backend: str = "native", **options) -> dict[str, torch.Tensor]:
    """Return the gradient of every input, from random gradients of the output and of the last state."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with kernel_backend(backend):
        outs = op(**leaves, **options)
        torch.manual_seed(1)
        weights = [torch.randn(x.shape).to(outs[0].dtype) for x in outs]
        total = sum((x.double() * weight.double()).sum() for x, weight in zip(outs, weights))
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))


def assert_gradients(version: int, inputs: dict, tolerance: float = TOLERANCE, **options) -> None:
    """Those of the native op are those of the plain one in float64, each in its input's dtype."""
    op = {6: wkv6, 7: wkv7}[version]
    found = gradients(op, inputs, **options)
    exact = gradients(op, {name: x.double() for name, x in inputs.items()}, "torch", **options)
    for name, dx in found.items():
        assert dx.dtype == inputs[name].dtype and dx.isfinite().all(), name
        if exact[name].any():
            assert error(dx, exact[name]) < tolerance, name
        else:
            assert not dx.any(), name


@pytest.fixture
def called(monkeypatch) -> set[str]:
    """Functions of the library that are called: without it plain might be compared with plain."""
    names, call = set(), library.Library.call
    monkeypatch.setattr(
        library.Library, "call", lambda self, name, *x: (names.add(name), call(self, name, *x))[1]
    )
    return names


@pytest.mark.parametrize("K, V", [(16, 16), (64, 64), (64, 96), (20, 7), (5, 70), (128, 128)])
@pytest.mark.parametrize("T", [1, 7, 16, 65, 200])
@pytest.mark.parametrize("version", [6, 7])
def test_gradients_equal_plain(version, T, K, V, called):
    inputs = recurrence_inputs(version, 2, T, 3, K, V, torch.float32)
    assert_gradients(version, inputs | dict(initial_state=torch.randn(2, 3, K, V)))
    assert called == {"wkv", "wkv_backward"}


@pytest.mark.parametrize("version", [6, 7])
def test_gradients_of_bfloat16(version):
    """Outputs and gradients are rounded to 8 bits, nothing else."""
    assert_gradients(version, recurrence_inputs(version, 2, 33, 2, 16, 16, torch.bfloat16), tolerance=4e-3)


@pytest.mark.parametrize("version", [6, 7])
def test_gradients_in_order_and_none_at_pads(version):
    inputs = recurrence_inputs(version, 2, 40, 2, 16, 24, torch.float32)
    order = torch.stack([torch.randperm(40), torch.arange(40)])
    order[1, :5], order[1, 16] = ~order[1, :5], ~order[1, 16]
    assert_gradients(version, inputs | dict(initial_state=torch.randn(2, 2, 16, 24)), order=order)
    found = gradients({6: wkv6, 7: wkv7}[version], inputs, order=order)
    assert not any(dx[1, [0, 1, 2, 3, 4, 16]].any() for name, dx in found.items() if name != "u")


@pytest.mark.parametrize("version", [6, 7])
def test_gradients_of_packed_sequences(version):
    inputs = recurrence_inputs(version, 1, 60, 2, 16, 16, torch.float32)
    begin = torch.tensor([0, 6, 6, 60], dtype=torch.int32)
    order = torch.cat([torch.arange(6).flip(0), torch.arange(6, 60)])[None]
    inputs |= dict(initial_state=torch.randn(3, 2, 16, 16))
    assert_gradients(version, inputs, order=order, cu_seqlens=begin)


@pytest.mark.parametrize("decay", [0.0, -1e-3, -20.0, -math.inf])
@pytest.mark.parametrize("version", [6, 7])
def test_gradients_of_extreme_decays(version, decay):
    """Of a log decay; each alone and among others."""
    inputs = recurrence_inputs(version, 1, 50, 2, 16, 16, torch.float32)
    inputs["w"][:, ::3] = decay
    assert_gradients(version, inputs)
    if version == 6 or decay:  # without decay RWKV-7's state may grow
        assert_gradients(version, inputs | dict(w=torch.full_like(inputs["w"], decay)))


@pytest.mark.parametrize("version", [6, 7])
def test_gradient_of_what_is_broadcast_or_laid_out_otherwise(version):
    inputs = recurrence_inputs(version, 2, 20, 3, 16, 16, torch.float32)
    inputs["w"] = inputs["w"][0, 0]  # [H, K]
    inputs["k"] = inputs["k"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_gradients(version, inputs)


def test_gradients_are_asked_for_once_only():
    inputs = recurrence_inputs(7, 1, 5, 1, 16, 16, torch.float32)
    r = inputs["r"].requires_grad_()
    with kernel_backend("native"):
        out = wkv7(**inputs)[0]
    (dr,) = torch.autograd.grad(out.square().sum(), r, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dr.sum().backward()


@pytest.mark.parametrize("version", [6, 7])
def test_gradients_under_a_checkpoint(version):
    op, inputs = {6: wkv6, 7: wkv7}[version], recurrence_inputs(version, 2, 20, 2, 16, 16, torch.float32)
    expected = gradients(op, inputs)
    found = gradients(lambda **x: checkpoint(op, use_reentrant=False, **x), inputs)
    assert all(torch.equal(found[name], dx) for name, dx in expected.items())


def causal_lm(version: int, **fields) -> VisualRWKVForCausalLM:
    torch.manual_seed(0)
    return awake(VisualRWKVForCausalLM(text_config(version, **fields)))


@torch.no_grad()
def step_by_step(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt of 5 tokens and of those behind it, one by one."""
    out = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    logits = [out.logits]
    for i in range(5, ids.shape[1]):
        step = dict(attention_mask=mask[:, : i + 1], past_key_values=out.past_key_values)
        logits.append(model(ids[:, i : i + 1], **step).logits)
    return torch.cat(logits, 1)[mask.bool()]


def ids_and_mask(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 320, (rows, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[-1, 6] = 0  # pads in the prompt and behind it
    return ids, mask


def assert_accelerated_equals_plain(model: VisualRWKVForCausalLM) -> None:
    """The model becomes an accelerated one."""
    with kernel_backend("torch"):
        expected = step_by_step(model, *ids_and_mask())
    assert native_layers.accelerate_on_cpu(model) is model
    assert error(step_by_step(model, *ids_and_mask()), expected) < TOLERANCE


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_accelerated_model_equals_plain(version, head_dim):
    model = causal_lm(version, head_dim=head_dim, hidden_size=128)
    names = list(model.state_dict())
    assert_accelerated_equals_plain(model)
    assert isinstance(model.lm_head, native_layers.NativeLinear)
    assert isinstance(model.model.layers[0].ffn.key, native_layers.NativeLinear)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("version", [5, 6, 7])
def test_accelerating_a_model_changes_that_model_only(version, called):
    accelerated, other = native_layers.accelerate_on_cpu(causal_lm(version)), causal_lm(version)
    step_by_step(other, *ids_and_mask())
    assert not called
    step_by_step(accelerated, *ids_and_mask())
    assert called == AFTER_OTHERS


@pytest.mark.parametrize("version", [5, 6, 7])
def test_native_backend_serves_any_model(version, called):
    """Recurrences only: the linear layers of a model that is not accelerated are torch's."""
    with kernel_backend("torch"):
        expected = step_by_step(causal_lm(version), *ids_and_mask())
    with kernel_backend("native"):
        assert error(step_by_step(causal_lm(version), *ids_and_mask()), expected) < TOLERANCE
    assert called == {"wkv", "decode"}


def refused(tensors: dict, match: str) -> None:
    with kernel_backend("native"), pytest.raises(RuntimeError, match=match):
        wkv6(**tensors)


def test_native_backend_says_why_it_refuses(monkeypatch):
    inputs = recurrence_inputs(6, 1, 2, 1, 16, 16, torch.float32)
    said = r'kernel_backend\("native"\) is in force, but there is no wkv6 kernel: '
    refused({name: x.double() for name, x in inputs.items()}, said + "native ops compute in float32")
    refused(
        {name: x.to("meta") for name, x in inputs.items()},
        said + "native ops need tensors on a CPU, not on meta",
    )
    refused(
        recurrence_inputs(6, 1, 2, 1, 300, 4, torch.float32),
        said + "keys of 300 elements are larger than 256",
    )
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    refused(inputs, said + "Native ops need a C compiler")


def test_the_former_name_of_the_backend_warns():
    with pytest.warns(DeprecationWarning, match="kernel_backend"), wkv_backend("torch"):
        assert chosen_backend() == "torch"


# --- a token's whole layer ---------------------------------------------------------------------------------

AFTER_OTHERS = {"wkv", "linear", "blocks"}
"""What a prompt and tokens behind it call in an accelerated model."""

WIDTHS = {  # those of a low-rank map are computed 128 at once, those of a register 16, 8 or 4
    "narrow": dict(hidden_size=48, head_dim=16),
    "wide": dict(
        hidden_size=320, head_dim=64, decay_low_rank_dim=160, gate_low_rank_dim=20, mix_low_rank_dim=28
    ),
}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("version", [5, 6, 7])
def test_layer_of_a_token_equals_plain(version, widths, called):
    assert_accelerated_equals_plain(causal_lm(version, **WIDTHS[widths]))
    assert called == AFTER_OTHERS


@pytest.mark.parametrize("version", [5, 6])
def test_layer_with_a_time_mix_narrower_than_the_model(version, called):
    assert_accelerated_equals_plain(causal_lm(version, hidden_size=64, attention_size=32))
    assert called == AFTER_OTHERS


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_layer_of_bfloat16_rounds_no_more_than_torch(version, weights, called, without_int8_products):
    """Layers' outputs and states are rounded and nothing in between."""
    model = causal_lm(version, hidden_size=128).bfloat16()
    exact = native_layers.accelerate_on_cpu(causal_lm(version, hidden_size=128), weights=weights)
    stored = native_layers.accelerate_on_cpu(copy.deepcopy(model), weights=weights).state_dict()
    exact.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in stored.items()})
    expected = step_by_step(exact, *ids_and_mask())
    plain = error(step_by_step(model, *ids_and_mask()), expected)
    called.clear()
    native_layers.accelerate_on_cpu(model, weights=weights)
    assert error(step_by_step(model, *ids_and_mask()), expected) < (1.5 if weights else 1.1) * plain
    assert called == AFTER_OTHERS


@pytest.mark.parametrize("version", [5, 6, 7])
def test_layer_writes_the_state_as_plain_does(version):
    model, (ids, mask) = causal_lm(version), ids_and_mask()
    with torch.no_grad(), kernel_backend("torch"):
        prompt = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        expected, state = prompt.copy(), prompt.copy()
        model(ids[:, 6:7], attention_mask=mask[:, :7], past_key_values=expected)
    with torch.no_grad():
        native_layers.accelerate_on_cpu(model)(ids[:, 6:7], attention_mask=mask[:, :7], past_key_values=state)
    for before, layer, plain in zip(prompt.layers, state.layers, expected.layers):
        for name, tensor in plain.tensors().items():
            assert error(layer.tensors()[name], tensor) < TOLERANCE, name
            assert torch.equal(layer.tensors()[name][1], before.tensors()[name][1]), name  # row 1 read a pad
            assert not torch.equal(layer.tensors()[name][0], before.tensors()[name][0]), name


def watched(model: nn.Module) -> None:
    model.model.layers[1].att.key.register_forward_hook(lambda *_: None)


def with_its_output_doubled(model: nn.Module) -> None:
    model.model.layers[1].ffn.value.register_forward_hook(lambda layer, inputs, out: 2 * out)


def with_its_input_doubled(model: nn.Module) -> None:
    model.model.layers[1].att.key.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))


def with_its_input_doubled_by_keyword(model: nn.Module) -> None:
    def double(att, inputs, kwargs):
        return (2 * inputs[0], *inputs[1:]), kwargs

    model.model.layers[1].att.register_forward_pre_hook(double, with_kwargs=True)


def with_a_forward_of_its_own(model: nn.Module) -> None:
    """As accelerate's hooks replace it."""
    layer = model.model.layers[1].ln1
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


def with_lora(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["key"], init_lora_weights=False)
    peft.inject_adapter_in_model(adapters, model)


def with_a_weight_in_float64(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.ln2.double()
        layer.ln2.register_forward_pre_hook(lambda norm, inputs: inputs[0].double())
        layer.ln2.register_forward_hook(lambda norm, inputs, out: out.float())


def transposed(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.att.output.weight.data = layer.att.output.weight.data.T.contiguous().T


def with_a_norm_without_bias(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.ln1 = nn.LayerNorm(layer.ln1.normalized_shape, bias=False)


def with_another_epsilon(model: nn.Module) -> None:
    model.model.layers[1].ln2.eps = 0.1


def with_one_norm_of_all_heads(model: nn.Module) -> None:
    model.model.layers[1].att.ln_x.num_groups = 1


OTHERWISE = {
    "a norm without bias": (with_a_norm_without_bias, {}, 1, False),
    "another epsilon": (with_another_epsilon, {}, 1, True),
    "one norm of all heads": (with_one_norm_of_all_heads, {}, 1, True),
    "a hook": (watched, {}, 1, True),
    "a hook that changes the output": (with_its_output_doubled, {}, 1, True),
    "a pre-forward hook": (with_its_input_doubled, {}, 1, True),
    "a pre-forward hook with keywords": (with_its_input_doubled_by_keyword, {}, 1, True),
    "a forward of its own": (with_a_forward_of_its_own, {}, 1, True),
    "LoRA": (with_lora, {}, 1, False),
    "a weight of another dtype": (with_a_weight_in_float64, {}, 1, False),
    "a weight laid out otherwise": (transposed, {}, 1, False),
    "a rank that is no multiple of 4": (lambda model: None, {"decay_low_rank_dim": 6}, 1, False),
    "many rows": (lambda model: None, {}, native.MAX_ROWS + 1, False),
}
"""What is done to an accelerated model, its fields, rows of a batch; whether some layers are read in one call still."""


@pytest.mark.parametrize("case", OTHERWISE)
@pytest.mark.parametrize("version", [6, 7])
def test_layers_that_do_not_suit_are_computed_part_by_part(version, case, called):
    change, fields, rows, still_called = OTHERWISE[case]
    model = native_layers.accelerate_on_cpu(causal_lm(version, **fields))
    change(model)
    with kernel_backend("torch"):
        expected = step_by_step(model, *ids_and_mask(rows))
    assert not called
    assert error(step_by_step(model, *ids_and_mask(rows)), expected) < TOLERANCE
    assert ("blocks" in called) == still_called


def test_hooks_of_all_modules_are_called(called):
    model, seen = native_layers.accelerate_on_cpu(causal_lm(7)), []
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda layer, inputs: seen.append(layer)):
        step_by_step(model, *ids_and_mask())
    assert "blocks" not in called and seen.count(model.model.layers[1].ffn.key) == 5


@torch.no_grad()
def test_recorded_past_can_be_taken_back(called):
    """Assisted decoding records: a step in place would leave nothing to go back to."""
    model, (ids, _) = native_layers.accelerate_on_cpu(causal_lm(7)), ids_and_mask()
    state = model(ids[:, :4], use_cache=True).past_key_values
    expected = state.copy()
    for layer in state.layers:
        layer.record_past = True
    for i in (4, 5):
        model(ids[:, i : i + 1], past_key_values=state)
    state.crop(-2)
    for layer, before in zip(state.layers, expected.layers):
        for name, tensor in before.tensors().items():
            assert torch.equal(layer.tensors()[name], tensor)
    assert "blocks" not in called


@torch.no_grad()
@pytest.mark.parametrize("fields, rows", [({"hidden_size": 128}, 2), ({}, 1)])
def test_state_of_others_is_refused(fields, rows):
    """As without native ops, and before a byte of it is read."""
    model, (ids, _) = native_layers.accelerate_on_cpu(causal_lm(7)), ids_and_mask()
    state = causal_lm(7, **fields)(ids[:rows], use_cache=True).past_key_values
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape|initial_state must be"):
        model(ids[:, :1], past_key_values=state)


def test_hooks_see_what_each_layer_hands_on():
    """Those set before, too: a layer stays the same object."""
    model, (ids, _), seen = causal_lm(7), ids_and_mask(), []
    model.model.layers[1].register_forward_hook(lambda layer, inputs, out: seen.append(out[0]))
    native_layers.accelerate_on_cpu(model)
    with torch.no_grad():
        out = model(ids[:, :5], use_cache=True)
        out = model(ids[:, 5:6], past_key_values=out.past_key_values, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and torch.equal(out.hidden_states[2], seen[-1])


# --- the model as an object --------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
def test_changing_the_dtype_afterwards(int8, called):
    """The scales keep their dtype, which is part of the format."""
    model, inputs = native_layers.accelerate_on_cpu(causal_lm(7, hidden_size=128), int8), ids_and_mask()
    expected = step_by_step(model, *inputs)
    called.clear()
    assert error(step_by_step(model.bfloat16(), *inputs), expected) < 0.05
    assert {"linear", "blocks"} <= set(called)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_copies_compute_the_same(weights, tmp_path):
    model, inputs = native_layers.accelerate_on_cpu(causal_lm(7), weights=weights), ids_and_mask()
    torch.save(model, tmp_path / "model")
    copies = [copy.deepcopy(model), torch.load(tmp_path / "model", weights_only=False)]
    expected = step_by_step(model, *inputs)
    del model
    for each in copies:
        assert torch.equal(step_by_step(each, *inputs), expected)


def test_saved_model_is_a_plain_one(tmp_path):
    """One with rounded weights is saved as such: see test_rounded_weights.py."""
    model, inputs = native_layers.accelerate_on_cpu(causal_lm(7, hidden_size=128)), ids_and_mask()
    model.save_pretrained(tmp_path)
    loaded = VisualRWKVForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is nn.Linear
    assert error(step_by_step(loaded, *inputs), step_by_step(model, *inputs)) < TOLERANCE


def test_weights_move_to_huge_pages_and_stay_what_they_are():
    model = causal_lm(6, tie_word_embeddings=True)
    before = {name: (x, x.detach().clone(), x.data_ptr()) for name, x in model.named_parameters()}
    native_layers.accelerate_on_cpu(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (weight, value, address) in before.items():
        assert after[name] is weight and torch.equal(weight, value)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            assert (weight.data_ptr() != address) == (
                name not in ("model.norm.weight", "model.norm.bias") and "embed_norm" not in name
            )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ranges = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in after.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_weights_stay_where_they_are_without_huge_pages(called):
    model, inputs = causal_lm(7), (torch.randint(1, 320, (2, 9)), torch.ones(2, 9))
    expected = step_by_step(model, *inputs)
    before = [weight.data_ptr() for weight in model.parameters()]
    native_layers.accelerate_on_cpu(model, huge_pages=False)
    assert [weight.data_ptr() for weight in model.parameters()] == before
    assert error(step_by_step(model, *inputs), expected) < TOLERANCE
    assert called


@pytest.mark.parametrize("version", [6, 7])
def test_int8_stays_near(version):
    """127 steps to the largest weight of a row round it about as finely as bfloat16's 8 bits do any weight."""
    model = causal_lm(version, hidden_size=128)
    ids, mask = torch.randint(1, 320, (2, 9)), torch.ones(2, 9)
    expected = step_by_step(model, ids, mask)
    native_layers.accelerate_on_cpu(model, int8=True)
    assert model.lm_head.weight.dtype == model.model.layers[0].att.key.weight.dtype == torch.int8
    in_bfloat16 = error(step_by_step(causal_lm(version, hidden_size=128).bfloat16(), ids, mask), expected)
    assert 1e-4 < error(step_by_step(model, ids, mask), expected) < 2 * in_bfloat16


@pytest.mark.parametrize("version", [5, 6, 7])
def test_int4_stays_near(version, called, without_int8_products):
    """15 steps between the largest weights of 32: some sixteen times as coarse as int8. The head is int8."""
    model = causal_lm(version, hidden_size=128)
    ids, mask = torch.randint(1, 320, (2, 9)), torch.ones(2, 9)
    expected = step_by_step(model, ids, mask)
    native_layers.accelerate_on_cpu(model, weights="int4")
    key = model.model.layers[0].att.key
    assert key.weight.dtype == torch.uint8 and key.weight.shape == (128, 64) and key.scale.shape == (128, 4)
    assert model.lm_head.weight.dtype == torch.int8
    called.clear()
    in_int8 = native_layers.accelerate_on_cpu(causal_lm(version, hidden_size=128), weights="int8")
    found, fine = (error(step_by_step(x, ids, mask), expected) for x in (model, in_int8))
    assert 4 * fine < found < 32 * fine
    assert called == AFTER_OTHERS


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_int4_linear_rounds_the_weight_only(dtype):
    """Few rows by the native op, many as torch is asked to: both multiply by the same rounded weight."""
    torch.manual_seed(0)
    original = torch.randn(40, 96)
    original[3, 32:64] = 0
    linear = nn.Linear(96, 40, bias=False)
    linear.weight.data.copy_(original)
    rounded = native_layers.Int4Linear(linear)
    weight, steps = rounded.widened(), rounded.scale.float().abs().repeat_interleave(32, 1)
    # One step where 16 would be needed, and what rounding the scale to bfloat16 adds; else half a step.
    assert ((weight - original).abs() <= 1.05 * steps).all()
    assert ((weight - original).abs() <= 0.55 * steps).float().mean() > 0.95
    for rows in (1, native.MAX_ROWS, native.MAX_ROWS + 1):
        x = torch.randn(rows, 96).to(dtype)
        with torch.no_grad(), kernel_backend("auto" if rows <= native.MAX_ROWS else "torch"):
            # x is rounded to 16 bits as well, so by 1/65278 of its largest number.
            assert error(rounded(x), x.double() @ weight.double().T) < max(1e-4, torch.finfo(dtype).eps)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_numbers_that_have_no_16_bits(kind):
    """Zeros, denormals, infinity and NaN: as plain torch, each in its row."""
    torch.manual_seed(0)
    layer = native_layers.ROUNDED_LINEARS[kind](nn.Linear(288, 40, bias=False))
    x = torch.randn(5, 288)
    expected = native.linear(x, layer.weight, layer.scale)
    x[1] = 0
    x[2] *= 1e-42
    found = native.linear(x, layer.weight, layer.scale)
    assert torch.equal(found[[0, 3, 4]], expected[[0, 3, 4]]) and found[1:3].abs().max() < 1e-38
    x[3, 100], x[4, 200] = float("nan"), float("inf")
    found = native.linear(x, layer.weight, layer.scale)
    assert error(found[0], expected[0]) < 1e-4
    assert found[3].isnan().all() and not found[4].isfinite().any()


WIDTHS_OF_16_BITS = [16, 48, 64, 80, 128, 160, 512, 544, 1184]
"""Parts of a register's columns, of four groups of int4 and of sixteen, and a part after whole ones."""


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_rows_are_rounded_to_16_bits(kind):
    """By at most 1/65278 of a row's largest number, whatever its size, and whatever rows are beside it."""
    torch.manual_seed(0)
    for columns in WIDTHS_OF_16_BITS:
        if kind == "int4" and columns % 32:
            continue
        layer = native_layers.ROUNDED_LINEARS[kind](nn.Linear(columns, 24, bias=False))
        for rows in (1, 3, 4, 6, 8):
            x = torch.randn(rows, columns) * torch.logspace(-8, 8, rows)[:, None]
            found, weight = native.linear(x, layer.weight, layer.scale), layer.widened().double()
            change = (found - x.double() @ weight.T).abs()
            limit = x.abs().amax(1, keepdim=True) / 65278 * weight.abs().sum(1)
            assert (change <= 1.01 * limit).all(), (columns, rows)
            alone = [native.linear(row[None], layer.weight, layer.scale) for row in x]
            assert error(found, torch.cat(alone)) < TOLERANCE


@torch.no_grad()
def test_largest_sums_of_16_bits_do_not_overflow():
    """All numbers the largest there are, in the longest rows whose sums have 32 bits, and in longer ones."""
    for columns in (32768, 32768 + 16):
        weight = torch.full((2, columns), 127, dtype=torch.int8)
        weight[1] = -127
        for sign in (1.0, -1.0):
            found = native.linear(torch.full((4, columns), sign), weight, torch.ones(2))
            expected = torch.tensor([[127.0, -127.0]]) * sign * columns
            assert error(found, expected.expand(4, 2)) < TOLERANCE


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8])
def test_rows_at_once_are_the_rows_alone(rows, dtype):
    """Four rows share the reading of a weight."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 208), torch.randn(12, 208).to(dtype)
    expected = torch.cat([native.linear(row[None], weight) for row in x])
    assert error(native.linear(x, weight), expected) < TOLERANCE


def test_int4_rounds_what_it_can_hold_to_itself():
    """So that a saved model, loaded and rounded again, is the same one."""
    linear = nn.Linear(64, 8, bias=False)
    once = native_layers.Int4Linear(linear)
    linear.weight.data.copy_(once.widened())
    assert torch.equal(native_layers.Int4Linear(linear).widened(), once.widened())
    twice = native_layers.Int4Linear(nn.Linear(64, 8, bias=False))
    twice.load_state_dict(once.state_dict())
    assert torch.equal(twice.widened(), once.widened())


def test_weights_of_no_such_format_are_refused():
    with pytest.raises(ValueError, match="weights must be None, int8 or int4, got 'int3'"):
        native_layers.accelerate_on_cpu(causal_lm(7), weights="int3")


def test_int8_linear_rounds_the_weight_only():
    """Few rows by the native op, many as torch is asked to: both multiply by the same rounded weight."""
    torch.manual_seed(0)
    rounded = native_layers.Int8Linear(linear := nn.Linear(64, 32, bias=False))
    weight = rounded.weight * rounded.scale[:, None]
    assert ((weight - linear.weight).abs() <= rounded.scale[:, None] * 0.5001).all()
    for rows in (1, native.MAX_ROWS, native.MAX_ROWS + 1):
        x = torch.randn(rows, 64)
        with torch.no_grad(), kernel_backend("auto" if rows <= native.MAX_ROWS else "torch"):
            # Few rows of x are rounded to 16 bits as well.
            limit = 1e-4 if rows <= native.MAX_ROWS else TOLERANCE
            assert error(rounded(x), x.double() @ weight.double().T) < limit


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_linear_multiplies(rows, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, 208), torch.randn(12, 208).to(dtype)
    assert error(native.linear(x, weight), x.double() @ weight.double().T) < TOLERANCE


@pytest.mark.parametrize("for_this_cpu", [(), ("-mavx2", "-mfma"), ("-mavx2", "-mfma", "-mf16c")])
def test_each_width_of_a_register(for_this_cpu, monkeypatch, tmp_path, called):
    """They have loads of their own in registers.h. Neither of these is compiled with OpenMP."""
    if for_this_cpu and not torch.cpu._is_avx2_supported():
        pytest.skip("the CPU has no AVX2")
    monkeypatch.setattr(library, "FOR_THIS_CPU", (for_this_cpu,))
    native.build_native_ops(tmp_path)
    for dtype in formats.FLOAT_DTYPES:
        test_linear_multiplies(2, dtype)
    for version in (6, 7):
        assert_gradients(version, recurrence_inputs(version, 2, 20, 2, 20, 70, torch.float32))
    test_int8_linear_rounds_the_weight_only()
    test_int4_linear_rounds_the_weight_only(torch.float32)
    for kind in ("int8", "int4"):
        test_few_rows_are_rounded_to_16_bits(kind)
        test_numbers_that_have_no_16_bits(kind)
    test_largest_sums_of_16_bits_do_not_overflow()
    for version in (5, 6, 7):
        called.clear()
        test_layer_of_a_token_equals_plain(version, "wide", called)


@pytest.mark.parametrize("defaults", ["bfloat16", "float64", "meta"])
@pytest.mark.parametrize("version", [6, 7])
def test_torchs_defaults_change_nothing(version, defaults):
    """C writes float32 on the CPU, whatever `torch.empty` makes."""
    model = native_layers.accelerate_on_cpu(causal_lm(version))
    ids, given = torch.randint(1, 320, (2, 12)), recurrence_inputs(version, 2, 20, 2, 16, 16, torch.float32)

    def compute() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        grads = [x.grad.clone() for x in model.parameters() if x.grad is not None]
        return [*both(version, **given)[0], generated, step_by_step(model, ids, torch.ones_like(ids)), *grads]

    expected = compute()
    try:
        if defaults == "meta":
            with torch.device("meta"):
                out, state = both(version, **given)[0]
                logits = model(ids, use_cache=False).logits
            assert torch.equal(out, expected[0]) and torch.equal(state, expected[1]) and logits.is_cpu
            return
        torch.set_default_dtype(getattr(torch, defaults))
        found = compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 100])
def test_inputs_of_another_width_are_refused(rows, kind):
    layer = nn.Linear(64, 32, bias=False)
    if kind in native_layers.ROUNDED_LINEARS:
        layer = native_layers.ROUNDED_LINEARS[kind](layer)
    else:
        layer = native_layers.native_linear(layer.to(getattr(torch, kind)))
    x = torch.randn(rows, 64, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    with torch.no_grad():
        assert layer(x).shape == (rows, 32)
        for width in (32, 128):
            with pytest.raises(RuntimeError):
                layer(torch.ones(rows, width, dtype=x.dtype))


def test_a_bias_of_another_dtype_is_not_read_as_the_weights():
    layer = native_layers.native_linear(nn.Linear(64, 32).bfloat16())
    layer.bias.data = layer.bias.data.float()
    assert not native_layers._is_like(layer.bias, layer.weight)
    with pytest.raises(RuntimeError, match="The bias must be bfloat16"):
        native.linear_bf16(torch.ones(100, 64, dtype=torch.bfloat16), layer.weight, layer.bias)


def test_transforms_and_tracers_compute_with_torch(called):
    """They look into torch's ops, and would miss what C computes."""
    model, ids = native_layers.accelerate_on_cpu(causal_lm(7)), torch.randint(1, 320, (1, 5))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (ids,), {"labels": ids, "use_cache": False}).loss

    found = torch.func.grad(loss)(weights)
    assert not called
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        assert error(found[name], weight.grad) < TOLERANCE, name
    called.clear()
    with torch.no_grad():
        x = torch.randn(2, 64)
        traced = torch.jit.trace(model.lm_head, torch.randn(2, 64), check_trace=False)
        assert not called
        assert error(traced(x), model.lm_head(x)) < TOLERANCE


def test_layers_that_c_cannot_multiply_are_torchs(called):
    """Columns that are no multiple of 16, and a bias."""
    x = torch.randn(2, 72)
    with torch.no_grad():
        layer = native_layers.native_linear(nn.Linear(72, 8, bias=False))
        assert error(layer(x), x.double() @ layer.weight.double().T) < TOLERANCE
        rounded = native_layers.Int8Linear(nn.Linear(72, 8, bias=False))
        assert error(rounded(x), x.double() @ rounded.widened().double().T) < TOLERANCE
        biased = native_layers.native_linear(nn.Linear(72, 8))
        assert error(biased(x), nn.functional.linear(x, biased.weight, biased.bias)) < TOLERANCE
    assert not called


class Wrapped(torch.Tensor):
    """As a library's quantised weight: its bytes are no float32's, whatever its dtype says."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_of_another_kind_are_not_read(when, called):
    model, inputs = causal_lm(7), ids_and_mask()
    expected = step_by_step(model, *inputs)
    called.clear()
    if when == "after":
        native_layers.accelerate_on_cpu(model)
    for layer in (model.lm_head, *(layer.ffn.value for layer in model.model.layers)):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    if when == "before":
        native_layers.accelerate_on_cpu(model)
        assert type(model.lm_head) is nn.Linear
    assert error(step_by_step(model, *inputs), expected) < TOLERANCE
    assert "linear" in called and "blocks" not in called  # `linear` by the plain weights alone


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_training_step_equals_plain(version, checkpointing, called):
    plain, model = causal_lm(version).train(), native_layers.accelerate_on_cpu(causal_lm(version)).train()
    ids = torch.randint(1, 320, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with kernel_backend("torch"):
        plain(ids, attention_mask=mask, labels=ids).loss.backward()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert called == {"wkv", "wkv_backward", "token_shift", "token_shift_backward"}
    for (name, weight), expected in zip(model.named_parameters(), plain.parameters()):
        assert error(weight.grad, expected.grad) < TOLERANCE, name


def test_vision_tower_stays_as_it_is():
    model = native_layers.accelerate_on_cpu(tiny_vlm(), int8=True)
    changed = [name for name, module in model.named_modules() if isinstance(module, native_layers.Int8Linear)]
    assert changed and all(name == "lm_head" or ".language_model." in name for name in changed)


def test_built_once(cache):
    (library,) = (cache / "visualrwkv_hf").glob("*.so")
    made = library.stat().st_mtime_ns
    assert native.build_native_ops() == library and library.stat().st_mtime_ns == made


def test_refusals(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="Linear has no RWKV block"):
        native_layers.accelerate_on_cpu(nn.Linear(2, 2))
    monkeypatch.setattr(library, "FLAGS", ("-no-such-flag",))
    with pytest.raises(RuntimeError, match="no-such-flag"):
        native.build_native_ops(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"a C compiler \(cc, gcc, clang\)"):
        native.build_native_ops(tmp_path)
    assert not any(tmp_path.iterdir())


# --- what C and Python agree on ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", block.SLOTS)
def test_slots_are_in_the_order_of_c(name):
    assert tuple(slot.name for slot in block.SLOTS[name]) == native.library().contract[name]


def test_formats_and_sizes_are_in_the_order_of_c():
    contract = native.library().contract
    assert tuple(row.tag for row in formats.FORMATS) == contract["FORMATS"]
    floats = tuple(row.tag for row in formats.FORMATS if row.scale_dtype is None)
    assert floats == contract["FLOAT_FORMATS"]
    (group,) = {row.group for row in formats.FORMATS if row.group}
    assert group == contract["GROUP"] == native_layers.Int4Linear.group
    assert block.Sizes._fields == contract["SIZES"]


@pytest.mark.parametrize("version", [5, 6, 7])
def test_every_parameter_of_a_block_has_one_slot(version):
    layer = causal_lm(version).model.layers[1]
    paths = block._PATHS[version]
    slots = [f"{module}.{name}" for module, name in (*paths.vectors, *paths.low_rank) if name]
    slots += [f"{module}.{name}.weight" for module, name in paths.linear if name]
    assert sorted(slots) == sorted(name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("version", [5, 6, 7])
def test_layer_of_float16_equals_plain(version, called):
    """The states that layers keep are rounded to float16, and what one hands to the next."""
    model = causal_lm(version, hidden_size=128).half()
    exact = causal_lm(version, hidden_size=128)
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    with kernel_backend("torch"):
        expected = step_by_step(exact, *ids_and_mask())
        plain = error(step_by_step(model, *ids_and_mask()), expected)
    native_layers.accelerate_on_cpu(model)
    assert error(step_by_step(model, *ids_and_mask()), expected) < 1.1 * plain
    assert called == AFTER_OTHERS


def test_float16_is_read_and_written_as_torch_does(monkeypatch, tmp_path):
    """All numbers of the format, by the conversion that is used where the CPU has no instruction for it."""
    monkeypatch.setattr(library, "FOR_THIS_CPU", ((),))
    native.build_native_ops(tmp_path)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    weight = torch.zeros(len(numbers), 16, dtype=torch.float16)
    weight[:, 0] = numbers
    one = torch.zeros(1, 16)
    one[0, 0] = 1
    found, finite = native.linear(one, weight)[0], numbers.isfinite()
    assert torch.equal(found[finite], numbers[finite].float())


# --- products of many rows ---------------------------------------------------------------------------------


@pytest.fixture
def without_units(monkeypatch):
    """A CPU that multiplies neither bfloat16 nor float16 fast."""
    monkeypatch.setattr(products, "has_unit", lambda dtype: dtype not in products.UNITS)


@pytest.fixture
def panels(monkeypatch) -> list[int]:
    """The rows of the weights that are multiplied panel by panel: without it plain might be compared with plain."""
    seen, multiply = [], native_layers.multiply_panels
    monkeypatch.setattr(
        native_layers,
        "multiply_panels",
        lambda x, rows, *a, **k: (seen.append(rows), multiply(x, rows, *a, **k))[1],
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns, has_bias", [(1000, 72, True), (512, 64, False), (5, 16, True)])
def test_panels_round_the_result_only(rows, columns, has_bias, dtype, without_units):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 7, columns), (rows, columns), (rows,)))
    bias = bias if has_bias else None
    found = products.multiply_panels(x, rows, weight.__getitem__, bias=bias)
    expected = nn.functional.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    assert found.dtype == dtype and found.shape == expected.shape
    assert error(found, expected) < torch.finfo(dtype).eps


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_model_without_units_rounds_no_more_than_torch(version, dtype, without_units, panels):
    model = causal_lm(version, hidden_size=128)
    ids = torch.randint(1, 320, (2, 40))
    exact = model(ids).logits
    plain = error(model.to(dtype)(ids).logits, exact)
    native_layers.accelerate_on_cpu(model)
    assert error(model(ids).logits, exact) < 1.1 * plain
    # Every linear layer of the blocks and the head.
    assert len(panels) == 3 * len(block._PATHS[version].linear) - 3 * (version == 7) * 2 + 1


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_are_widened_in_panels(weights, without_units, without_int8_products, panels):
    model = native_layers.accelerate_on_cpu(causal_lm(7, hidden_size=128), weights=weights)
    plain = native_layers.dequantize(copy.deepcopy(model))
    ids = torch.randint(1, 320, (2, 40))
    assert error(model(ids).logits, plain(ids).logits) < TOLERANCE
    assert len(panels) == 3 * 6 + 1


@torch.no_grad()
def test_towers_and_projectors_multiply_in_panels(without_units, panels):
    model = tiny_vlm().bfloat16()
    inputs = dict(input_ids=prompt(model), pixel_values=pixels(1))
    exact = tiny_vlm()(**inputs).logits
    plain = error(model(**inputs).logits, exact)
    linears = [m for m in model.model.vision_tower.modules() if type(m) is nn.Linear]
    native_layers.accelerate_on_cpu(model)
    panels.clear()
    features = model.get_image_features(inputs["pixel_values"])
    assert len(panels) >= len(linears) and features is not None
    assert error(model(**inputs).logits, exact) < 1.2 * plain


class NarrowProducts(TorchDispatchMode):
    """Note the products that torch computes from bfloat16 or float16: matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_product = any(word in func.name() for word in ("mm", "matmul", "linear", "conv"))
        if is_product and any(isinstance(x, torch.Tensor) and x.dtype in products.UNITS for x in args):
            self.found.append(func.name())
        return func(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_nothing_is_multiplied_slowly_without_units(version, dtype, without_units):
    """A prompt with a picture passes through the tower, the projector and all maps of the language model."""
    model = native_layers.accelerate_on_cpu(tiny_vlm(version=version).to(dtype))
    inputs = dict(input_ids=prompt(model), pixel_values=pixels(1).to(dtype))
    with NarrowProducts() as ours:
        model(**inputs)
    with NarrowProducts() as plain, kernel_backend("torch"):
        model(**inputs)
    assert plain.found and not ours.found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_rank_maps_without_units_round_each_product_once(dtype, without_units):
    torch.manual_seed(0)
    x, w1, w2 = (torch.randn(*shape).to(dtype) for shape in ((2, 5, 64), (64, 8), (8, 48)))
    with kernel_backend("native"):
        (found,) = low_rank([x], [w1], [w2], ["tanh"])
    low = (x.double() @ w1.double()).to(dtype).tanh()
    assert found.dtype == dtype
    assert error(found, low.double() @ w2.double()) < torch.finfo(dtype).eps


def test_low_rank_maps_without_units_have_gradients(without_units):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 64).bfloat16(), torch.randn(64, 8).bfloat16().requires_grad_()
    with kernel_backend("native"):
        matmul(x, weight).sum().backward()
    expected = x.double().sum((0, 1))[:, None].expand(64, 8)
    assert error(weight.grad, expected) < 2**-8


@torch.no_grad()
def test_convolutions_without_units_round_the_result_only(without_units, monkeypatch):
    """A tower's patches: computed in float32, and by torch where torch is asked for."""
    torch.manual_seed(0)
    tower = nn.Sequential(
        nn.Conv2d(3, 40, 4, stride=4), nn.Conv2d(40, 8, 3, padding=1, bias=False)
    ).bfloat16()
    exact, x = copy.deepcopy(tower).double(), torch.randn(2, 3, 16, 16).bfloat16()
    native_layers.replace_convolutions(tower)
    assert all(type(layer) is native_layers.NativeConv2d for layer in tower)
    for layer, same in zip(tower, exact):
        found, expected = layer(x), same(x.double())
        assert found.dtype == torch.bfloat16
        assert error(found, expected) < 2**-8
        x = found
    before, conv = [], nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d,
        "_conv_forward",
        lambda self, x, *weights: (before.append(x.dtype), conv(self, x, *weights))[1],
    )
    tower(torch.randn(1, 3, 8, 8).bfloat16())
    with kernel_backend("torch"):
        tower(torch.randn(1, 3, 8, 8).bfloat16())
    assert before == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_panels_are_for_inference_only(without_units, panels):
    """With a gradient, traced, under autocast or with the torch backend, torch multiplies."""
    layer = native_layers.native_linear(nn.Linear(64, 32).bfloat16())
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), kernel_backend("torch"):
        layer(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert not panels
    with torch.no_grad():
        layer(x)
    assert panels


@pytest.mark.parametrize("weights", [None, "int8"])
def test_who_waits_for_gradients_of_a_layer_gets_them(weights):
    model, seen = causal_lm(7), []
    model.lm_head.register_full_backward_hook(lambda *_: seen.append(1))
    native_layers.accelerate_on_cpu(model, weights=weights)
    model(torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_layers_with_hooks_keep_them(hook):
    model, seen = causal_lm(7), []
    getattr(model.model.layers[0].att.key, hook)(lambda *_: seen.append(1))
    native_layers.accelerate_on_cpu(model)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    assert seen


# --- memory ------------------------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from visualrwkv_hf import VisualRWKVForCausalLM, accelerate_on_cpu

def resident() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

model = VisualRWKVForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
for weight in model.parameters():
    weight.sum()  # read it from the file
accelerate_on_cpu(VisualRWKVForCausalLM(model.config.__class__(**{**model.config.to_dict(), "num_hidden_layers": 1})))
before = resident()
accelerate_on_cpu(model)
print(sum(x.nbytes for x in model.parameters()), resident() - before)
"""


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="weights move on Linux only")
def test_accelerating_keeps_no_second_copy(tmp_path):
    """What is moved to huge pages was mapped from a file, which leaves the memory."""
    config = text_config(7, hidden_size=512, head_dim=64, num_hidden_layers=8)
    VisualRWKVForCausalLM(config).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, more = map(int, done.stdout.split())
    assert weights > 60e6 and more < 0.2 * weights


def test_pages_of_a_file_are_unmapped_only_if_nobody_wrote_to_them(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(2**20))
    storage = torch.UntypedStorage.from_file(str(tmp_path / "weights"), shared=False, nbytes=2**20)
    weight = torch.tensor([], dtype=torch.float32).set_(storage, 0, (2**18,))
    inside = [low <= weight.data_ptr() < high for low, high in memory.mapped_files()]
    assert any(inside) == Path("/proc/self/smaps").exists()
    weight[1000] = 5
    assert not any(low <= weight.data_ptr() < high for low, high in memory.mapped_files())


@pytest.mark.parametrize(("anonymous", "swap"), [(0, 0), (4, 0), (0, 4)])
def test_pages_that_were_written_to_may_be_in_swap(anonymous, swap, monkeypatch):
    entry = f"""7f0000000000-7f0000100000 r--p 00000000 fe:00 1234 /weights
Rss:                1024 kB
Anonymous:             {anonymous} kB
AnonHugePages:         0 kB
Swap:                  {swap} kB
SwapPss:               0 kB
"""
    monkeypatch.setattr(memory.Path, "read_text", lambda *_, **options: entry)
    expected = [] if anonymous or swap else [(0x7F0000000000, 0x7F0000100000)]
    assert memory.mapped_files() == expected


def resident_bytes_of(path: Path) -> int:
    """Return how much of a mapped file is in this process's memory."""
    mappings = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE
    )
    ours = [mapping for mapping in mappings if str(path) in mapping.partition("\n")[0]]
    return sum(1024 * int(re.search(r"^Rss: +(\d+) kB", mapping, re.MULTILINE)[1]) for mapping in ours)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells which pages are in memory")
@torch.no_grad()
def test_the_tower_leaves_the_memory_after_each_picture_of_one_answer(tmp_path):
    clip = vlm_config().vision_config.clip_config.to_dict() | dict(hidden_size=512, intermediate_size=2048)
    tiny_vlm(vision_config={"clip_config": clip, "class_token": "last"}).save_pretrained(tmp_path)
    found = {}
    for huge_pages in (True, False):
        model = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
        native_layers.accelerate_on_cpu(model, huge_pages=huge_pages)
        first, second = (model.get_image_features(pixels(1)).pooler_output[0] for _ in range(2))
        assert torch.equal(first, second)
        size = sum(weight.nbytes for weight in model.model.vision_tower.parameters())
        found[huge_pages] = resident_bytes_of(tmp_path / "model.safetensors") / size
        del model
    assert found[False] < 0.2 and found[True] > 0.8


def test_a_library_is_of_every_file_that_it_was_compiled_from():
    """A file that is left out could change, and the library of the old one would be loaded."""
    found, read = {"ops.c"}, set()
    while left := found - read:
        for name in left:
            text = Path(library.__file__).with_name(name).read_text()
            found |= set(re.findall(r'^#include "(.+)"$', text, re.MULTILINE))
        read |= left
    assert {path.name for path in library.SOURCES} == found and len(found) > 5


def test_a_library_is_for_one_c_library(monkeypatch):
    """Containers on one machine may share a home folder, and have other ones."""
    here = library._fingerprint()
    monkeypatch.setattr(library.os, "confstr", lambda name: "glibc 1.0")
    assert library._fingerprint() != here


# --- the cache's mode --------------------------------------------------------------------------------------


@pytest.fixture
def another_cache(cache, built, tmp_path, monkeypatch):
    """Return the path of a cache folder that is not there, and a function that copies the library into it."""
    folder = tmp_path / "visualrwkv_hf"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (library_file,) = (cache / "visualrwkv_hf").glob("*.so")
    return folder, lambda: shutil.copy(library_file, folder)


@pytest.fixture
def umask_of_groups():
    """Make new files writable for the group, as Fedora and Red Hat do for their users."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode_of(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


def test_a_cache_that_a_notice_made_serves_native_ops(another_cache, umask_of_groups):
    folder, fill = another_cache
    assert model_cache.is_first_notice() and mode_of(folder) == 0o700
    assert not model_cache.is_first_notice() and model_cache.cache_folder() == library.cache_folder()
    fill()
    assert library.load_library()[1].parent == folder


def test_a_cache_of_earlier_versions_loses_the_groups_permission(another_cache, umask_of_groups):
    folder, fill = another_cache
    folder.mkdir()
    assert mode_of(folder) == 0o775
    fill()
    assert library.load_library()[1].parent == folder and mode_of(folder) == 0o755


@pytest.mark.parametrize("named", [True, False], ids=["named", "link"])
def test_other_folders_that_the_group_may_write_to_are_refused_as_they_are(
    named, another_cache, umask_of_groups, tmp_path
):
    """A folder that is given by name may be shared with others; a link leads to one that may be."""
    folder, _ = another_cache
    (shared := tmp_path / "shared").mkdir()
    folder.symlink_to(shared)
    with pytest.raises(RuntimeError, match="another user owns it or may write to it"):
        library.load_library(shared if named else None)
    assert mode_of(shared) == 0o775


# --- the commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerate", [True, False])
def test_commands_accelerate_a_model_on_a_cpu(accelerate):
    model = load_model(str(bundled_model()), device="cpu", accelerate=accelerate, huge_pages=False)
    assert backend_of(model).endswith("native ops" if accelerate else "plain torch")
    assert isinstance(model.lm_head, native_layers.NativeLinear) == accelerate


def test_commands_compute_with_torch_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="computes with plain torch. Native ops need a C compiler"):
        model = load_model(str(bundled_model()), device="cpu")
    assert backend_of(model).endswith("plain torch")
