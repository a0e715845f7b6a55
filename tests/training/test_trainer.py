"""The Trainer's options that touch the loss or the saved files: smoothing, metrics, adapters, logs, refusals."""

import ast
import math
import os
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from tiny_training import QUIET, rows_with_pictures, tiny_model, tiny_processor, trainer_of
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from visualrwkv_hf import (
    TunedState,
    VisualRWKVDataCollator,
    VisualRWKVTrainer,
    VisualRWKVTrainingArguments,
    lora_config,
    loss_visualrwkv,
)
from visualrwkv_hf.training.files import checkpoints_to_discard, discard, move_into


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    rows = rows_with_pictures(tmp_path / "pictures", 4)
    return [{**row, "image": str(tmp_path / "pictures" / row["image"])} for row in rows]


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_several_gpus_of_one_process_are_refused(rows, tmp_path, monkeypatch):
    """torch's DataParallel would split the pictures of a batch by rows of pixels."""
    monkeypatch.setattr(VisualRWKVTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"This process sees 2 GPUs.*accelerate launch"):
        trainer_of(tiny_model(), tmp_path, rows)


# Label smoothing.


def smoothed_by_hand(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> float:
    """Return the mean over samples of the cross entropy with (1 - epsilon) one-hot + epsilon / V targets."""
    of_samples = []
    for row, targets in zip(logits.double(), labels):
        of_tokens = []
        for position in range(len(targets) - 1):
            if (target := int(targets[position + 1])) != -100:
                log_p = F.log_softmax(row[position], -1)
                of_tokens.append(float(-(1 - epsilon) * log_p[target] - epsilon * log_p.mean()))
        of_samples.append(sum(of_tokens) / len(of_tokens))
    return sum(of_samples) / len(of_samples)


@pytest.mark.parametrize("logits_at_once", [loss_visualrwkv.LOGITS_AT_ONCE, 4096], ids=["whole", "sliced"])
def test_smoothed_loss_compares_each_position_with_the_next_token(
    logits_at_once, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(loss_visualrwkv, "LOGITS_AT_ONCE", logits_at_once)
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, rows, label_smoothing_factor=0.2)
    batch = trainer.data_collator(rows)
    found = trainer.compute_loss(model.train(), batch)
    with torch.no_grad():
        expected = smoothed_by_hand(model(**batch).logits, batch["labels"], 0.2)
    assert found.item() == pytest.approx(expected, rel=1e-5)  # float32
    assert found.item() != pytest.approx(model(**batch).loss.item(), rel=1e-3)


@pytest.mark.parametrize("adapters", [False, True], ids=["model", "peft"])
def test_label_smoothing_learns_the_answers_in_40_steps(adapters, rows, tmp_path):
    model = tiny_model()
    if adapters:
        model = peft.get_peft_model(model, lora_config(r=8))
    options = dict(learning_rate=1e-2, learning_rate_final=1e-2, max_steps=40, per_device_train_batch_size=4)
    trainer = trainer_of(model, tmp_path, rows, label_smoothing_factor=0.1, **options)
    trainer.train()
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        output = model.eval()(**batch)
    targets = batch["labels"][:, 1:]
    said = output.logits[:, :-1].argmax(-1)[targets != -100]
    assert (said == targets[targets != -100]).float().mean() > 0.95
    # No distribution has a smoothed cross entropy below the entropy of its targets.
    size, epsilon = model.config.get_text_config().vocab_size, 0.1
    top, rest = 1 - epsilon + epsilon / size, epsilon / size
    assert losses_of(trainer)[-1] > -(top * math.log(top) + (size - 1) * rest * math.log(rest))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        trainer.compute_loss(model, trainer.data_collator(rows)).item(), rel=1e-4
    )


# Metrics.


def token_accuracy(prediction) -> dict[str, float]:
    """Return the share of labels that the most likely token hits."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((logits.argmax(-1) == labels)[labels != -100].mean())}


def test_compute_metrics_is_called_and_chooses_the_best_checkpoint(rows, tmp_path):
    trainer = trainer_of(
        tiny_model(),
        tmp_path,
        rows,
        given={"compute_metrics": token_accuracy},
        learning_rate=1e-2,
        max_steps=4,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="accuracy",
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train()
    found = {
        entry["step"]: entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    assert sorted(found) == [1, 2, 3, 4]
    best = max(found, key=lambda step: (found[step], -step))
    assert trainer.state.best_metric == found[best]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert not (tmp_path / "_unfinished").exists()


def test_predict_returns_logits_and_labels(rows, tmp_path):
    model = tiny_model()
    found = trainer_of(model, tmp_path, rows, per_device_eval_batch_size=4).predict(rows)
    batch = VisualRWKVDataCollator(tiny_processor(model))(rows)
    with torch.no_grad():
        expected = model(**batch).logits
    np.testing.assert_array_equal(found.label_ids, batch["labels"].numpy())
    np.testing.assert_allclose(found.predictions, expected.numpy(), atol=1e-5)
    assert found.metrics["test_loss"] > 0


def test_evaluation_without_metrics_keeps_no_logits(rows, tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, rows)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
    assert output.predictions is None and "eval_loss" in output.metrics


def largest_logits_of_evaluation(trainer) -> tuple[int, float]:
    """Return the most logits that the head computes at once, and the loss."""
    sizes = []
    hook = trainer.model.lm_head.register_forward_hook(
        lambda head, inputs, logits: sizes.append(logits.numel())
    )
    loss = trainer.evaluate()["eval_loss"]
    hook.remove()
    return max(sizes), loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_of_the_loss_alone_computes_logits_in_slices(smoothing, rows, tmp_path, monkeypatch):
    trainer = trainer_of(
        tiny_model(), tmp_path, rows, per_device_eval_batch_size=4, label_smoothing_factor=smoothing
    )
    trainer.model.skip_logits = False
    whole, expected = largest_logits_of_evaluation(trainer)
    trainer.model.skip_logits = None
    monkeypatch.setattr(loss_visualrwkv, "LOGITS_AT_ONCE", 4096)
    sliced, found = largest_logits_of_evaluation(trainer)
    assert sliced <= 4096 < whole
    assert found == pytest.approx(expected, rel=1e-5)  # float32: sums in another order


def test_evaluation_with_a_loss_function_of_ones_own_has_logits(rows, tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.mean()

    trainer = trainer_of(tiny_model(), tmp_path, rows, given={"compute_loss_func": own_loss})
    assert math.isfinite(trainer.evaluate()["eval_loss"])


# Options that would compute a wrong loss.


def test_l2_wrap_is_refused_in_fp16(rows, tmp_path, monkeypatch):
    """Its gradient has a fixed size, and unscaling would divide it by 65536. A CPU has no fp16, so it is pretended."""
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    model = tiny_model()
    with pytest.raises(ValueError, match=r"L2Wrap \(0.0001\) would have no effect: use bf16"):
        trainer_of(model, tmp_path, rows)
    trainer_of(model, tmp_path, rows, given={"compute_loss_func": max})  # computes no L2Wrap
    model.config.get_text_config().l2_wrap = 0.0
    trainer_of(model, tmp_path, rows)


def test_options_that_would_compute_a_wrong_loss_are_refused(rows, tmp_path):
    from accelerate import ParallelismConfig

    with pytest.raises(ValueError, match="use_liger_kernel: the Liger kernels do not support VisualRWKV"):
        VisualRWKVTrainingArguments(str(tmp_path), use_liger_kernel=True)
    with pytest.raises(ValueError, match=r"label_smoothing_factor \(1.5\) must be at least 0 and below 1"):
        VisualRWKVTrainingArguments(str(tmp_path), label_smoothing_factor=1.5)
    split = ParallelismConfig(cp_size=2)
    with pytest.raises(ValueError, match="parallelism_config: cp_size=2 would split a sequence"):
        VisualRWKVTrainingArguments(str(tmp_path), parallelism_config=split, use_cpu=True)
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor \(0.1\) has no effect with compute_loss_func"
    ):
        trainer_of(tiny_model(), tmp_path, rows, given={"compute_loss_func": max}, label_smoothing_factor=0.1)
    with pytest.raises(TypeError, match="must be VisualRWKVTrainingArguments, got TrainingArguments"):
        VisualRWKVTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True))


def test_a_loss_function_of_ones_own_sees_the_logits_and_the_labels(rows, tmp_path):
    seen = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        seen.append((outputs.logits.shape[:2], labels.shape))
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    options = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2)
    trainer = trainer_of(tiny_model(), tmp_path, rows, given={"compute_loss_func": own_loss}, **options)
    trainer.train()
    assert len(seen) == 3 and all(logits == labels for logits, labels in seen)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def test_noisy_embeddings_train(rows, tmp_path):
    """NEFTune adds noise to the embeddings: the loss differs from that without, and is still learned."""
    losses = []
    for alpha in (None, 5.0):
        options = dict(max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2)
        trainer = trainer_of(tiny_model(), tmp_path, rows, neftune_noise_alpha=alpha, **options)
        trainer.train()
        losses.append(losses_of(trainer))
    plain, noisy = losses
    assert plain[0] != noisy[0] and noisy[-1] < noisy[0]


# Adapters that belong to the model (`add_adapter`), and their checkpoints.


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "transformers"])
def test_a_model_with_adapters_is_saved_at_every_checkpoint(stock, rows, tmp_path):
    model = tiny_model()
    model.add_adapter(lora_config(train_projector=False, r=4))
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    trainer = trainer_of(model, tmp_path, rows, stock=stock, **options)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", tmp_path):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            path.name for path in folder.iterdir()
        }
        assert not (folder / "config.json").exists() and not (folder / "modeling_visualrwkv.py").exists()
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        loaded = tiny_model()
        assert not torch.allclose(loaded.eval()(**batch).logits, expected, atol=1e-3)
        loaded.load_adapter(str(tmp_path))
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected)


def test_training_with_adapters_of_the_model_is_resumed(rows, tmp_path):
    def run(folder: Path, steps: int, resume: str | None = None):
        model = tiny_model()
        torch.manual_seed(1)  # the adapter's random matrix
        model.add_adapter(lora_config(train_projector=False, r=4))
        options = dict(save_strategy="steps", save_steps=2, learning_rate=1e-2, lr_scheduler_type="constant")
        trainer = trainer_of(model, folder, rows, max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=resume)
        return losses_of(trainer)

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    assert run(tmp_path / "parts", 4, get_last_checkpoint(str(tmp_path / "parts"))) == whole
    ours, theirs = (
        load_file(tmp_path / name / "checkpoint-4" / "adapter_model.safetensors")
        for name in ("parts", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["adapters", "tuned state"])
def test_the_best_checkpoint_is_loaded_though_it_holds_a_part_of_the_model(kind, rows, tmp_path):
    """The metric falls, so the first checkpoint is the best one and not what the model has at the end."""
    model, scores = tiny_model(), iter([3.0, 2.0, 1.0])
    if kind == "adapters":
        model.add_adapter(lora_config(train_projector=False, r=4))
    else:
        TunedState.attach(model)
    trainer = trainer_of(
        model,
        tmp_path,
        rows,
        given={"compute_metrics": lambda prediction: {"score": next(scores)}},
        learning_rate=1e-2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="score",
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.save_model()
    name = "adapter_model.safetensors" if kind == "adapters" else "tuned_state.safetensors"
    found, best, last = (load_file(tmp_path / part / name) for part in ("", "checkpoint-1", "checkpoint-3"))
    assert all(torch.equal(found[key], best[key]) for key in best)
    assert any(not torch.equal(best[key], last[key]) for key in best)


def test_saved_adapters_name_their_base_by_an_absolute_path(rows, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText

    tiny_model().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    own = AutoModelForImageTextToText.from_pretrained("base")
    own.add_adapter(lora_config(r=4))
    own.save_pretrained("own")
    wrapped = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained("base"), lora_config(r=4))
    arguments = VisualRWKVTrainingArguments("wrapped", **QUIET)
    VisualRWKVTrainer(wrapped, arguments, train_dataset=rows).save_model()
    monkeypatch.chdir("/")
    for folder in ("own", "wrapped"):
        found = peft.PeftConfig.from_pretrained(tmp_path / folder).base_model_name_or_path
        assert found == str(tmp_path / "base")


# The order of the samples.


def test_one_of_two_processes_resumes_in_the_second_epoch_with_its_samples(rows, tmp_path, monkeypatch):
    """8 samples and two processes: each reads 4 in an epoch. The resumed run begins with the sixth of 8."""
    rows = [{**row, "id": f"{row['id']} {number}"} for number in range(2) for row in rows]

    def loader_of_the_first_process(self):
        sampler = self._get_train_sampler()
        loader = DataLoader(self.train_dataset, batch_size=1, sampler=sampler, collate_fn=self.data_collator)
        return prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)

    monkeypatch.setattr(VisualRWKVTrainer, "get_train_dataloader", loader_of_the_first_process)

    def run(folder: Path, steps: int, **options) -> list[str]:
        trainer = trainer_of(
            tiny_model(),
            folder,
            rows,
            max_steps=steps,
            save_strategy="steps",
            save_steps=5,
            train_sampling_strategy="original",
            per_device_train_batch_size=1,
        )
        collate, read = trainer.data_collator, []
        trainer.data_collator = lambda rows: read.extend(row["id"] for row in rows) or collate(rows)
        trainer.train(**options)
        return read

    whole = run(tmp_path / "whole", 8)
    assert len(set(whole[:4])) == 4 and whole[1:4] != whole[5:]
    run(tmp_path / "parts", 5)
    assert run(tmp_path / "parts", 8, resume_from_checkpoint=True) == whole[5:]


# What is printed.


@pytest.mark.parametrize("silent", [False, True], ids=["progress", "plain"])
def test_logged_numbers_are_printed_as_numbers(silent, rows, tmp_path, capsys):
    trainer = trainer_of(tiny_model(), tmp_path, rows, max_steps=2, disable_tqdm=silent)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    printed = [ast.literal_eval(line) for line in lines]
    assert len(printed) == 2
    for entry, loss in zip(printed, losses_of(trainer)):
        assert all(isinstance(value, int | float) for value in entry.values())
        assert entry["loss"] == pytest.approx(loss, rel=1e-3)


# Files.


def test_moved_files_replace_old_weights_and_the_configuration_comes_last(tmp_path, monkeypatch):
    source, target = tmp_path / "new", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "sub/file", "z.txt"):
        (source / name).write_text(f"new {name}")
    for name in ("model.safetensors", "config.json", "notes.txt"):
        (target / name).write_text("old")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    move_into(source, target)
    assert moved[-1] == "config.json"
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {
        "config.json": "new config.json",
        "model-00001-of-00002.safetensors": "new model-00001-of-00002.safetensors",
        "sub/file": "new sub/file",
        "z.txt": "new z.txt",
        "notes.txt": "old",
    }
    assert not source.exists()


def test_a_merged_model_replaces_an_adapter(tmp_path):
    """With `adapter_config.json` beside it, transformers would put the adapter on top of a base that it names."""
    source, target = tmp_path / "new", tmp_path / "target"
    for folder, names in (
        (source, ["config.json", "model.safetensors"]),
        (target, ["adapter_config.json", "adapter_model.safetensors", "README.md"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    move_into(source, target)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "file").write_text("x")
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # killed before anything is deleted
    discard(folder)
    assert not folder.exists() and list((tmp_path / "_unfinished").rglob("file"))


@pytest.mark.parametrize(
    ("limit", "best", "gone"),
    [
        (None, None, []),
        (0, None, []),
        (2, None, ["1", "2"]),
        (1, None, ["1", "2", "3"]),
        (1, "1", ["2", "3"]),
        (2, "1", ["2", "3"]),
        (3, "2", ["1"]),
        (9, None, []),
    ],
)
def test_the_newest_and_the_best_checkpoint_are_kept(limit, best, gone):
    assert checkpoints_to_discard(["1", "2", "3", "4"], limit, best) == [Path(name) for name in gone]
