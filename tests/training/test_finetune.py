"""`examples/finetune.py` as a user runs it: presets, resuming after a kill, a full disk, NaN, a push to the Hub."""

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_training
import torch
import tqdm.auto
import transformers
import yaml
from hub_client import client_process, weights_of
from hub_server import Hub
from patience import PATIENCE
from PIL import Image
from safetensors.torch import load_file
from tiny_training import (
    COLOURS,
    TEXT_SAMPLE,
    finetune,
    finetune_module,
    lora_command,
    rows_with_pictures,
    save_tiny_model,
    tiny_model,
    tiny_processor,
    trainer_of,
    write_data,
)
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

from visualrwkv_hf import (
    TunedState,
    VisualRWKVDataCollator,
    VisualRWKVTrainer,
    load_conversations,
    train_only,
)
from visualrwkv_hf.training import learning_rate_at, training_card
from visualrwkv_hf.training.card import base_model_of
from visualrwkv_hf.training.conversations import sample_order

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """8 pictures and a text."""
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, [*rows_with_pictures(folder), TEXT_SAMPLE])


@pytest.fixture(scope="module")
def command(model, data) -> list[str]:
    """6 steps of 2 x 1 samples, over one epoch's end; a checkpoint every other step."""
    sizes = ["--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 2, "--max-steps", STEPS]
    times = ["--save-steps", 2, "--logging-steps", 1, "--learning-rate", 1e-3, "--report-to", "none"]
    return ["--model", model, "--data", data, "--preset", "stage2", "--use-cpu", *sizes, *times]


def losses(folder: Path) -> list[tuple[int, float]]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(found: Path, expected: Path) -> None:
    """The same losses and weights, to the bit."""
    assert losses(found) == losses(expected)
    ours, theirs = tensors(found), tensors(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finetune(*command, "--output-dir", folder)
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    return folder


# The recipe.


def test_stage_2_trains_language_model_and_projector_alone(model, uninterrupted):
    before, after = tensors(model), tensors(uninterrupted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = ("model.vision_tower.", "model.language_model.embed_tokens.")
    assert changed == {name for name in before if not name.startswith(frozen)}


def test_stage_1_trains_the_projector_alone(command, model, tmp_path):
    """A batch is a text alone."""
    finetune(*command, "--output-dir", tmp_path, "--preset", "stage1", "--save-strategy", "no")
    before, after = tensors(model), tensors(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_the_output_is_a_model_with_its_processor_and_a_card(uninterrupted, data):
    model = AutoModelForImageTextToText.from_pretrained(uninterrupted)
    assert 261 in model.generation_config.eos_token_id
    assert AutoProcessor.from_pretrained(uninterrupted).num_image_tokens_of(1) == 17
    card = (uninterrupted / "README.md").read_text()
    assert "| samples | 9 |" in card and "| preset | stage2 |" in card and f"| steps | {STEPS} |" in card
    assert f"`{data.name}`, sha256 `" in card and str(data.parent) not in card


def original_rate(step: int, accumulation: int, warm_up: int) -> float:
    """The original's rule, in micro-batches, for 100 of them and 1e-3 to 1e-5."""
    real_step, warm_up = step * accumulation, warm_up * accumulation
    progress = min(1, max(0, (real_step - warm_up + 1) / (100 - warm_up)))
    rate = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * progress))
    return rate * (0.1 + 0.9 * real_step / warm_up) if real_step < warm_up else rate


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("warm_up", [0, 5])
def test_the_schedule_is_the_originals(accumulation, warm_up):
    total = 100 // accumulation
    for step in range(total + 1):
        rate = learning_rate_at(
            step,
            initial=1e-3,
            final=1e-5,
            total_steps=total,
            warmup_steps=warm_up,
            accumulation=accumulation,
        )
        assert rate == pytest.approx(original_rate(step, accumulation, warm_up), rel=1e-12)


def test_parameter_groups_betas_and_the_rate_in_training(tmp_path, data):
    model = tiny_model()
    train_only(model, ["language_model"])
    trainer = trainer_of(
        model,
        tmp_path,
        load_conversations(data),
        learning_rate=1e-3,
        learning_rate_final=1e-4,
        weight_decay=0.1,
        warmup_steps=2,
        max_steps=4,
        per_device_train_batch_size=1,
    )
    trainer.train()
    decayed, others = trainer.optimizer.param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert all(names[id(w)].endswith(("weight", "_w1", "_w2", "faaaa")) for w in decayed["params"])
    assert all(sum(size > 1 for size in weight.shape) == 1 for weight in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == sum(w.requires_grad for w in model.parameters())
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == (0.9, 0.99) and decayed["eps"] == 1e-8
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    options = dict(initial=1e-3, final=1e-4, total_steps=4, warmup_steps=2)
    assert rates == pytest.approx([learning_rate_at(step, **options) for step in range(4)])
    assert decayed["lr"] == others["lr"]


def test_unknown_parts_and_options_are_refused(command, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"must be some of vision_tower, .*, got \['projecter'\]"):
        train_only(tiny_model(), ["projecter"])
    preset = tmp_path / "preset.yaml"
    preset.write_text("learning_rat: 1")
    with pytest.raises(SystemExit):
        finetune_module().parse([*map(str, command), "--preset", str(preset)])
    assert "has unknown options: learning_rat." in capsys.readouterr().err


def test_the_command_line_comes_on_top_of_a_preset(command):
    options, arguments = finetune_module().parse([*map(str, command), "--train", "vision_tower"])
    assert (arguments.learning_rate, arguments.learning_rate_final) == (1e-3, 1.5e-5)
    assert (
        options.train == ["vision_tower"]
        and options.max_length == 2048
        and arguments.activation_checkpointing
    )


def test_a_preset_can_name_the_model_and_the_data(tmp_path, capsys):
    preset = tmp_path / "preset.yaml"
    preset.write_text("model: base\ndata: train.json")
    parse = finetune_module().parse
    options, _ = parse(["--preset", str(preset), "--use-cpu", "--output-dir", str(tmp_path)])
    assert (options.model, options.data) == ("base", "train.json")
    preset.write_text("model: base")
    with pytest.raises(SystemExit):
        parse(["--preset", str(preset), "--use-cpu"])
    assert "arguments are required: --data" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["stage1", "stage2", "lora", "state"])
def test_presets_are_options(preset, command):
    options, arguments = finetune_module().parse([*map(str, command), "--preset", preset])
    rates = finetune_module().read_preset(preset)
    assert options.preset == preset and rates["learning_rate_final"] < rates["learning_rate"]
    assert arguments.learning_rate_final == rates["learning_rate_final"]
    assert arguments.weight_decay == 0 and arguments.max_grad_norm == 1
    assert bool(arguments.activation_checkpointing) == (preset == "stage2")


def test_a_refused_option_is_a_sentence_of_the_command_line(command, capsys):
    with pytest.raises(SystemExit):
        finetune_module().parse([*map(str, command), "--use-liger-kernel"])
    assert "error: use_liger_kernel: the Liger kernels do not support" in capsys.readouterr().err


def test_a_card_names_the_base_model_and_never_its_path(tmp_path):
    folder = tmp_path / "colours"
    folder.mkdir()
    assert base_model_of("me/colours-base") == "me/colours-base"
    assert base_model_of(str(folder)) == "colours"
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: me/first\n---\n# Colours\n")
    assert base_model_of(str(folder)) == "me/first"
    for broken in ("---\nbase_model: [\n---\n", "# no metadata", f"---\nbase_model: {tmp_path}\n---\n"):
        (folder / "README.md").write_text(broken)
        assert base_model_of(str(folder)) == "colours"
    card = training_card("a title", {"steps": 2}, base_model="me/first", kind="adapter")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "me/first"
    assert 'base, adapter = "me/first"' in card and "PeftModel.from_pretrained(model, adapter)" in card


def test_the_preset_state_trains_a_tuned_state_alone(command, model, tmp_path):
    finetune(*command, "--output-dir", tmp_path, "--preset", "state", "--tuned-layers", 1, "--max-steps", 2)
    assert not list(tmp_path.rglob("model*.safetensors"))
    state = TunedState.from_pretrained(tmp_path, AutoModelForImageTextToText.from_pretrained(model))
    assert not len(state.layers[0]) and all(weight.any() for weight in state.layers[1].values())
    card = (tmp_path / "README.md").read_text()
    assert "| trained parts | the initial state of layers [1] |" in card
    assert "initial_state=TunedState.from_pretrained(state, model)" in card and str(model) not in card


def test_a_tuned_state_is_trained_alone(command, capsys):
    with pytest.raises(SystemExit):
        finetune_module().parse([*map(str, command), "--preset", "state", "--lora"])
    assert "--tuned-state trains nothing else: leave --lora out." in capsys.readouterr().err


def test_packed_samples_cannot_begin_with_a_tuned_state(command, capsys):
    with pytest.raises(SystemExit):
        finetune_module().parse([*map(str, command), "--preset", "state", "--padding-free"])
    assert "Packed samples cannot begin with a tuned state" in capsys.readouterr().err


def test_packed_samples_train_as_padded_ones(command, data, tmp_path):
    """Steps with accumulated gradients, with an evaluation among them."""
    options = ["--max-steps", 2, "--save-steps", 2, "--logging-steps", 1, "--gradient-accumulation-steps", 2]
    options += ["--per-device-train-batch-size", 3, "--eval-strategy", "steps", "--eval-steps", 1]
    options += ["--eval-data", data]
    for name, packed in (("padded", []), ("packed", ["--padding-free"])):
        finetune(*command, "--output-dir", tmp_path / name, *options, *packed)
    (padded, packed) = ([loss for _, loss in losses(tmp_path / name)] for name in ("padded", "packed"))
    assert len(padded) == 2 and packed == pytest.approx(padded, rel=1e-3)


def test_evaluation_while_training(command, data, tmp_path):
    times = ["--eval-strategy", "steps", "--eval-steps", 1, "--max-steps", 2, "--save-strategy", "no"]
    finetune(*command, "--output-dir", tmp_path, "--eval-data", data, *times)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    first, second = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert second < first
    assert "| last evaluation loss |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_evaluation_that_fails_leaves_what_was_trained(kind, command, model, data, tmp_path, monkeypatch):
    def fail(self):
        raise MemoryError("no memory for the evaluation")

    name = f"{kind}_model.safetensors" if kind == "adapter" else "model.safetensors"
    if kind == "adapter":
        pytest.importorskip("peft")
        command = lora_command(model, data)
    options = ["--eval-data", data, "--max-steps", 1, "--save-strategy", "no"]
    finetune(*command, "--output-dir", tmp_path / "whole", *options)
    monkeypatch.setattr(VisualRWKVTrainer, "evaluate", fail)
    with pytest.raises(MemoryError):
        finetune(*command, "--output-dir", tmp_path / "failed", *options)
    ours, theirs = (load_file(tmp_path / folder / name) for folder in ("failed", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert "| last evaluation loss |" in (tmp_path / "whole" / "README.md").read_text()


def test_tensorboard_is_written_if_installed(command, monkeypatch):
    pytest.importorskip("tensorboard")
    without = [part for part in map(str, command) if part not in ("--report-to", "none")]
    assert finetune_module().parse(without)[1].report_to == ["tensorboard"]
    module = finetune_module()
    monkeypatch.setattr(module, "is_tensorboard_available", lambda: False)
    assert module.parse(without)[1].report_to == []


@pytest.mark.parametrize(("strategy", "repeat"), [("original", "reversed"), ("original_v7.01", "permuted")])
def test_samples_come_in_the_originals_order_over_all_epochs(
    strategy, repeat, command, tmp_path, monkeypatch
):
    """9 samples, 4 in a step, 2 steps an epoch, 6 steps: the list is read five times. Resumed in the middle too."""
    names, read = [*COLOURS, "text"], []
    encode = VisualRWKVDataCollator.encode

    def noted(self, row):
        read.append(names.index(row["id"]))
        return encode(self, row)

    monkeypatch.setattr(VisualRWKVDataCollator, "encode", noted)
    order = ["--train-sampling-strategy", strategy, "--output-dir", tmp_path]
    sizes = ["--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2]
    finetune(*command, *order, *sizes)
    expected = sample_order(9, epoch=0, epoch_steps=STEPS, micro_batch_size=4, repeat=repeat)
    assert read == expected

    read.clear()
    shutil.rmtree(tmp_path / "checkpoint-6")
    finetune(*command, *order, *sizes, "--resume-from-checkpoint", tmp_path / "checkpoint-4")
    assert read == expected[4 * 4 :]


# Overfitting.


@pytest.mark.parametrize("version", [5, 6, 7])
def test_eight_samples_are_learned_by_heart(version, tmp_path):
    rows = rows_with_pictures(tmp_path)
    for row in rows:
        row["image"] = str(tmp_path / row["image"])
    model = tiny_model(version)
    train_only(model, ["projector", "language_model"])
    trainer = trainer_of(
        model,
        tmp_path,
        rows,
        learning_rate=1e-2,
        learning_rate_final=1e-2,
        max_steps=60,
        per_device_train_batch_size=8,
    )
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 0.02
    model.eval()
    processor = tiny_processor(model)
    for row, colour in zip(rows, COLOURS):
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        inputs = processor(images=Image.open(row["image"]), text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        answers = processor.post_process_image_text_to_text(
            output, prompt_length=inputs["input_ids"].shape[1]
        )
        assert answers == [f"It is {colour}."]


# Stopped and resumed.


def killed(command: list, folder: Path, prepare) -> None:
    """Runs the command in a process that `prepare` makes end without warning."""

    def run() -> None:
        prepare()
        finetune(*command, "--output-dir", folder)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 9


def die_in(name: str, step: int):
    """A method of the trainer that ends the process when it is called behind so many steps."""

    def prepare() -> None:
        original = getattr(VisualRWKVTrainer, name)

        def method(self, *args, **kwargs):
            if self.state.global_step == step:
                os._exit(9)
            return original(self, *args, **kwargs)

        setattr(VisualRWKVTrainer, name, method)

    return prepare


@pytest.mark.parametrize(
    ("method", "step", "newest"),
    [
        ("training_step", 1, None),
        ("training_step", 3, 2),
        ("training_step", 5, 4),
        ("_save_optimizer_and_scheduler", 4, 2),
        ("_save_rng_state", 4, 2),
    ],
    ids=lambda value: str(value).strip("_"),
)
def test_training_goes_on_behind_a_kill_as_if_there_had_been_none(
    method, step, newest, command, uninterrupted, tmp_path
):
    killed(command, tmp_path, die_in(method, step))
    assert get_last_checkpoint(tmp_path) == (newest and str(tmp_path / f"checkpoint-{newest}"))
    finetune(*command, "--output-dir", tmp_path, "--resume-from-checkpoint", "last")
    assert_equal(tmp_path, uninterrupted)
    assert not list(tmp_path.glob("_*"))


def killed_while_running(command: list, folder: Path, chance: random.Random) -> bool:
    """Resume the training in a process and kill it after some steps, at any moment of a step or a checkpoint.

    Returns whether it was killed; a training that ends first was not.
    """
    told, tell = os.pipe()

    def run() -> None:
        # tqdm's lock is shared with forked processes, and one that was killed may have taken it with it.
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
            bar.set_lock(threading.RLock())
        step = VisualRWKVTrainer.training_step

        def telling(self, *args, **kwargs):
            os.write(tell, b".")
            return step(self, *args, **kwargs)

        VisualRWKVTrainer.training_step = telling
        finetune(*command, "--output-dir", folder, "--resume-from-checkpoint", "last")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(tell)
    try:
        steps = chance.randrange(1, 6)
        if all(os.read(told, 1) for _ in range(steps)):  # nothing is read when the process has ended
            time.sleep(chance.random() * 0.1)
            process.kill()
        process.join(PATIENCE)
    finally:
        os.close(told)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_training_survives_kills_at_random_moments(kills, command, tmp_path):
    """Every checkpoint that is found after a kill is whole, and the training ends as if there had been none."""
    steps = 3 * kills + 3
    command = [*command, "--max-steps", steps, "--save-steps", 1, "--save-total-limit", 2]
    finetune(*command, "--output-dir", tmp_path / "uninterrupted")
    files = {path.name for path in (tmp_path / "uninterrupted" / f"checkpoint-{steps}").iterdir()}
    folder, chance = tmp_path / "killed", random.Random(0)
    happened = 0
    for _ in range(kills):
        happened += killed_while_running(command, folder, chance)
        for checkpoint in folder.glob("checkpoint-*"):
            assert {path.name for path in checkpoint.iterdir()} == files
            assert load_file(checkpoint / "model.safetensors")
            assert torch.load(checkpoint / "optimizer.pt", weights_only=True)
            assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert happened >= min(kills, 3)
    finetune(*command, "--output-dir", folder, "--resume-from-checkpoint", "last")
    assert_equal(folder, tmp_path / "uninterrupted")
    assert not list(folder.glob("_*"))


def test_a_full_disk_leaves_the_checkpoint_before(command, uninterrupted, tmp_path, monkeypatch):
    def on_full_disk(save, path_of):
        def save_half(*args, **kwargs):
            path = Path(path_of(*args))
            if "checkpoint-4" in path.parts:
                save(*args, **kwargs)
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return save(*args, **kwargs)

        return save_half

    before = None
    for module, name in ((transformers.modeling_utils, "safe_save_file"), (torch, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, on_full_disk(getattr(module, name), lambda _, path, *rest: path))
            with pytest.raises(OSError, match="No space left on device"):
                finetune(*command, "--output-dir", tmp_path, "--resume-from-checkpoint", "last")
        assert [path.name for path in sorted(tmp_path.glob("*")) if path.is_dir()] == ["checkpoint-2"]
        files = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
        assert before in (None, files)
        before = files
    finetune(*command, "--output-dir", tmp_path, "--resume-from-checkpoint", "last")
    assert_equal(tmp_path, uninterrupted)


def test_the_best_checkpoint_is_found_under_its_name(command, data, tmp_path):
    best = ["--eval-strategy", "steps", "--eval-steps", 1, "--load-best-model-at-end", "true"]
    limits = ["--save-total-limit", 1, "--save-steps", 1, "--max-steps", 2]
    finetune(*command, "--output-dir", tmp_path, "--eval-data", data, *best, *limits)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == state["best_model_checkpoint"]


def test_a_loss_that_is_nan_stops_and_names_the_step(command, tmp_path):
    rates = ["--learning-rate", 1e30, "--learning-rate-final", 1e30]
    with pytest.raises(FloatingPointError, match=r"The loss is (nan|inf) in step 2 \(learning rate 1e\+30\)"):
        finetune(*command, "--output-dir", tmp_path, *rates)


# To the Hub.


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({"hf_ann": "ann"}) as hub:
        yield hub


def test_a_merged_model_is_pushed_without_its_adapter(hub, tmp_path, data):
    """The last step is a checkpoint, whose adapter must not stay beside the model."""
    pytest.importorskip("peft")
    base = save_tiny_model(tmp_path / "base")
    command = [*lora_command(base, data), "--merge-lora"]
    push = ["--push-to-hub", "--hub-model-id", "ann/merged", "--output-dir", tmp_path / "out"]
    with client_process(hub.url, tmp_path / "cache") as client:
        client(tiny_training.finetune, *command, *push, "--max-steps", 1, token="hf_ann")
    pushed, kept = hub.repos["ann/merged"].files(), {path.name for path in (tmp_path / "out").iterdir()}
    for names in (set(pushed), kept):
        assert "model.safetensors" in names and not any(name.startswith("adapter") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "lora", "--train", "vision_tower"], "--lora adapts the language_model"),
        (["--lora", "--train", "projector"], "--lora adapts the language_model"),
        (["--merge-lora"], "--merge-lora merges adapters: it needs --lora"),
        (["--tuned-layers", "0"], "--tuned-layers are those of --tuned-state"),
        (["--lora-r", "8"], "--lora-r describes adapters: it needs --lora"),
        (["--lora-alpha", "8"], "--lora-alpha describes adapters: it needs --lora"),
        (["--lora-dropout", "0.1"], "--lora-dropout describes adapters: it needs --lora"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message, command, capsys):
    with pytest.raises(SystemExit):
        finetune_module().parse([*map(str, command), *options])
    assert message in capsys.readouterr().err


def test_push_to_hub_with_a_card(hub, command, tmp_path):
    push = [
        "--push-to-hub",
        "--hub-model-id",
        "ann/colours",
        "--max-steps",
        2,
        "--output-dir",
        tmp_path / "out",
    ]
    with client_process(hub.url, tmp_path / "cache") as client:
        client(tiny_training.finetune, *command, *push, token="hf_ann")
        pulled = client(weights_of, "ann/colours")
    files = hub.repos["ann/colours"].files()
    card = hub.blobs[files["README.md"].sha256].decode()
    assert "# colours" in card and "| samples | 9 |" in card and "| preset | stage2 |" in card
    assert {"processor_config.json", "tokenizer.json", "modeling_visualrwkv.py"} <= files.keys()
    assert not any(name.startswith(("checkpoint-", "_")) for name in files)
    trained = tensors(tmp_path / "out")
    assert {name: tensor.numpy().tobytes() for name, tensor in trained.items()} == pulled
