"""The training loss by hand: cross entropy per sample or per token, and L2Wrap's pull on the largest logits."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import awake, pixels, prompt, text_config, tiny_vlm
from transformers import Trainer, TrainingArguments

from visualrwkv_hf import VisualRWKVForCausalLM, loss_visualrwkv
from visualrwkv_hf.loss_visualrwkv import visualrwkv_loss

LOGITS = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([[1, 2, 3, 4, 5, 6], [-100, -100, 7, -100, 8, -100], [-100] * 6])


def by_hand() -> list[list[float]]:
    """Losses of each sample: position t predicts label t + 1."""
    losses = []
    for logits, labels in zip(LOGITS.tolist(), LABELS.tolist()):
        pairs = [(logits[t], labels[t + 1]) for t in range(5) if labels[t + 1] != -100]
        losses.append([math.log(sum(map(math.exp, row))) - row[label] for row, label in pairs])
    return losses


def loss(reduction: str, num_items: int | None = None, l2_wrap: float = 0.0) -> torch.Tensor:
    return visualrwkv_loss(
        LOGITS, LABELS, text_config(7, loss_reduction=reduction, l2_wrap=l2_wrap), num_items
    )


def test_mean_of_samples_counts_a_sample_without_labels_as_zero():
    expected = sum(sum(sample) / max(len(sample), 1) for sample in by_hand()) / 3
    assert loss("sample").item() == pytest.approx(expected, rel=1e-6)  # computed in float32


def test_mean_of_tokens_and_of_accumulated_tokens():
    total = sum(map(sum, by_hand()))
    assert loss("token").item() == pytest.approx(total / 7, rel=1e-6)
    assert loss("token", num_items=20).item() == pytest.approx(total / 20, rel=1e-6)


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_packed_samples_count_as_those_of_several_rows(reduction):
    """Samples of different lengths, one of them empty and one without labels."""
    lengths = (6, 5, 0, 2)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    config = text_config(7, loss_reduction=reduction)
    logits = torch.cat([LOGITS[row % 3, :length] for row, length in enumerate(lengths)])[None]
    labels = torch.cat([LABELS[row % 3, :length] for row, length in enumerate(lengths)])[None]
    labels[:, bounds[1:-1].long()] = -100
    rows = torch.full((4, 6), -100)
    for row, (start, end) in enumerate(pairwise(bounds)):
        rows[row, : end - start] = labels[0, start:end]
    expected = visualrwkv_loss(LOGITS[[0, 1, 2, 0]], rows, config)
    found = visualrwkv_loss(logits, labels, config, cu_seq_lens_q=bounds)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_l2_wrap_pulls_each_largest_logit_whatever_the_gradient():
    def gradient(l2_wrap: float, scale: float) -> torch.Tensor:
        logits = LOGITS.clone().requires_grad_()
        config = text_config(7, l2_wrap=l2_wrap)
        (scale * visualrwkv_loss(logits, LABELS, config)).backward()
        return logits.grad

    for scale in (1.0, 0.0):
        extra = gradient(1e-4, scale) - gradient(0.0, scale)
        expected = torch.zeros_like(LOGITS)
        largest, index = LOGITS.max(-1, keepdim=True)
        torch.testing.assert_close(
            extra, expected.scatter(-1, index, largest * 1e-4 / 18), atol=1e-12, rtol=1e-6
        )
    assert loss("sample", l2_wrap=1e-4).item() == loss("sample").item()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"logits are for \(3, 6\) positions, labels for \(3, 5\)"):
        visualrwkv_loss(LOGITS, LABELS[:, 1:], text_config(7))


@pytest.mark.parametrize("num_items", [None, 30])
@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_slices_give_the_loss_and_the_gradients_of_the_whole(monkeypatch, reduction, num_items):
    """And the logits only to those who ask for them."""
    model = tiny_vlm(version=7, scan="bidirectional").float()  # logits in float64, losses in float32
    model.config.text_config.loss_reduction = reduction
    samples = _samples(model)
    batch = _collate(samples) | {"num_items_in_batch": num_items}

    def step() -> tuple:
        model.zero_grad()
        output = model(**batch, use_cache=False)
        (3 * output.loss).backward()
        return output, {name: weight.grad.clone() for name, weight in model.named_parameters()}

    whole, expected = step()
    assert "logits" in whole
    per_position = model.config.text_config.vocab_size
    monkeypatch.setattr(loss_visualrwkv, "LOGITS_AT_ONCE", 7 * per_position)  # no divisor of the positions
    most = most_positions(model.lm_head)
    sliced, gradients = step()
    assert max(most) == 7, "the head never saw more than a slice"
    torch.testing.assert_close(sliced.loss, whole.loss, atol=0, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    assert sliced.logits is None and len(sliced.to_tuple()) == len(whole.to_tuple()) - 1
    asked_for = model(**batch, use_cache=False, skip_logits=False)
    assert torch.equal(asked_for.logits, whole.logits) and torch.equal(asked_for.loss, whole.loss)
    with torch.no_grad():
        assert model(**batch, use_cache=False).logits is not None, "an evaluation needs them"


HEADS = {
    "text": lambda: awake(VisualRWKVForCausalLM(text_config(7))),
    "vlm": lambda: tiny_vlm(version=7, scan="unidirectional"),
}


@pytest.fixture(params=HEADS)
def head(request):
    return HEADS[request.param]().float()


def test_logits_are_skipped_or_kept_as_asked(head):
    """By argument, or for a trainer that passes none by the attribute of the model."""
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = head(ids, labels=ids)
    skipped = head(ids, labels=ids, skip_logits=True)
    assert whole.logits.shape[:2] == (2, 9) and skipped.logits is None
    torch.testing.assert_close(skipped.loss, whole.loss, atol=0, rtol=1e-6)
    head.skip_logits = True
    assert head(ids, labels=ids).logits is None
    assert head(ids, labels=ids, skip_logits=False).logits is not None
    assert head(ids).logits is not None, "without labels the logits are all there is"
    with pytest.raises(ValueError, match="skip_logits=True needs labels"):
        head(ids, skip_logits=True)


@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_shift_labels_are_the_labels_where_they_are_predicted(head, reduction, skip_logits):
    head.config.get_text_config().loss_reduction = reduction
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = head(ids, labels=labels).loss
    for given in ({}, {"labels": labels}, {"labels": torch.full_like(labels, -100)}):
        loss = head(ids, shift_labels=shifted, skip_logits=skip_logits, **given).loss
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"logits are for \(2, 9\) positions, shift_labels for \(2, 8\)"):
        head(ids, shift_labels=shifted[:, 1:])


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}], ids=str)
def test_a_process_with_a_part_of_each_sequence_is_refused(head, monkeypatch, sizes):
    """Context and sequence parallelism of accelerate: the state would start anew in every part."""
    config = SimpleNamespace(
        cp_enabled="cp_size" in sizes, sp_enabled="sp_size" in sizes, cp_size=1, sp_size=1
    )
    config.__dict__.update(sizes)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", config)
    ids = torch.randint(1, 300, (2, 9))
    assert head(ids, labels=ids).loss.isfinite()
    with pytest.raises(ValueError, match="splits each sequence over processes"):
        head(ids, shift_labels=ids)


def test_trainer_smooths_the_label_of_the_next_token(head, tmp_path):
    """`label_smoothing_factor`: the Trainer computes that loss itself, from logits that predict the next label."""
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(head, arguments)
    with torch.no_grad():
        loss = trainer.compute_loss(head, {"input_ids": ids, "labels": ids})
        logits = head(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_trainer_counts_the_labels_that_are_predicted(head, tmp_path):
    """`num_items_in_batch`: all but the first of each sample, which no position predicts."""
    head.config.get_text_config().loss_reduction = "token"
    trainer = Trainer(head, TrainingArguments(tmp_path, report_to=[], use_cpu=True, save_strategy="no"))
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    count = trainer._get_num_items_in_batch([{"input_ids": ids, "labels": ids}], torch.device("cpu"))
    assert int(count) == 16
    whole = head(ids, labels=ids).loss
    torch.testing.assert_close(head(ids, labels=ids, num_items_in_batch=count).loss, whole)
    assert trainer.label_names == ["labels"], "shift_labels must not look like labels to the Trainer"


def test_batches_without_labels_have_no_loss(head):
    """Trainer counts them as 0 items, by which nothing may be divided."""
    head.config.get_text_config().loss_reduction = "token"
    ids = torch.ones(1, 5, dtype=torch.int64)
    for count in (None, 0, torch.tensor(0)):
        loss = head(ids, labels=torch.full_like(ids, -100), num_items_in_batch=count).loss
        assert loss.item() == 0


def most_positions(head: torch.nn.Module) -> list[int]:
    seen: list[int] = []
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_accumulated_gradients_equal_those_of_one_batch(tmp_path, reduction):
    """Trainer with 1 x 4 and 4 x 1 samples of different lengths: one optimizer step, the same weights."""
    weights = []
    for batch_size in (4, 1):
        model = tiny_vlm(version=7, scan="unidirectional").float()
        model.config.text_config.loss_reduction = reduction
        model.config.text_config.l2_wrap = (
            0.0  # its pull depends on the micro-batch's size, as the original's
        )
        arguments = TrainingArguments(
            tmp_path / f"{reduction}{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
        )
        Trainer(model, arguments, train_dataset=_samples(model), data_collator=_collate).train()
        weights.append(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)


def _samples(model) -> list[dict]:
    samples = []
    for row in range(4):
        ids = prompt(model, before=3, after=8, seed=row)[0]
        labels = ids.clone()
        labels[: 20 + row] = -100
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels(1, seed=row)[0]})
    return samples


def _collate(samples: list[dict]) -> dict:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
