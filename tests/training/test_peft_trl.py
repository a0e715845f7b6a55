"""PEFT's LoRA and TRL's SFTTrainer and GRPOTrainer on pictures, as their users run them."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from chats import FIRST
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from tiny_training import (
    COLOURS,
    finetune,
    lora_command,
    rows_with_pictures,
    save_tiny_model,
    tiny_model,
    tiny_processor,
    write_data,
)
from transformers import AutoModelForImageTextToText

from visualrwkv_hf import (
    StateStore,
    VisualRWKVDataCollator,
    VisualRWKVForConditionalGeneration,
    load_conversations,
    lora_config,
)
from visualrwkv_hf.inference import load_model

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

QUESTION = "Which colour?"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, rows_with_pictures(folder, 4))


def batch_of(model, data: Path) -> dict[str, torch.Tensor]:
    return VisualRWKVDataCollator(tiny_processor(model))(list(load_conversations(data)))


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    model.eval()
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


# LoRA.


@pytest.mark.parametrize("version", [5, 6, 7])
def test_adapters_are_trained_saved_loaded_and_merged(version, data, tmp_path):
    model = peft.get_peft_model(tiny_model(version), lora_config(r=4, lora_alpha=8))
    adapted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapted if "lora_" in name}
    assert kinds == {"receptance", "key", "value", "output"} | ({"gate"} if version < 7 else set())
    assert all("language_model" in name for name in adapted if "lora_" in name)
    assert any("multi_modal_projector" in name for name in adapted)

    batch = batch_of(model, data)
    before = logits(model, batch)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    trained = logits(model, batch)
    assert not torch.allclose(trained, before, atol=1e-2)

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(version), tmp_path)
    assert torch.equal(logits(loaded, batch), trained)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, VisualRWKVForConditionalGeneration)
    # float32: W x + B A x against (W + B A) x
    torch.testing.assert_close(logits(merged, batch), trained, atol=1e-4, rtol=1e-4)


def test_a_compressor_is_trained_with_the_projector():
    """It belongs to the part "projector" (v7.03, v7.04)."""
    model = peft.get_peft_model(
        tiny_model(7, compressor_num_layers=1, compressor_num_tokens=5, **FIRST), lora_config(r=4)
    )
    names = [
        name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name
    ]
    assert any(".compressor." in name for name in names)
    assert all(".compressor." in name or ".multi_modal_projector." in name for name in names)


def prompt_tuned(model) -> "peft.PeftModel":
    """Return an RWKV-7 that forgets slowly, with eight learned vectors of random values before each prompt."""
    for block in model.model.language_model.layers:
        block.att.w0.data.fill_(-12)
        block.att.a0.data.fill_(-12)
    text = model.config.text_config
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=8,
            token_dim=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_attention_heads=text.hidden_size // text.head_dim,
        ),
    )
    return tuned.eval()


@torch.no_grad()
def greedy_by_forward(model, inputs: dict, count: int) -> list[list[int]]:
    """Return the prompt and the likeliest `count` tokens after it, all read anew for each."""
    inputs = dict(inputs)
    for _ in range(count):
        word = model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
        mask = inputs["attention_mask"]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], word], 1)
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return inputs["input_ids"].tolist()


@pytest.mark.parametrize("prompt", ["picture", "two turns", "long text"])
def test_a_learned_prompt_is_read_before_the_question(prompt):
    """PEFT puts it before the prompt by a method of its own, so nothing may have read the prompt before that."""
    model = prompt_tuned(tiny_model(7))
    chats = {
        "picture": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        "two turns": [{"role": role, "content": QUESTION} for role in ("user", "assistant", "user")],
        "long text": [{"role": "user", "content": QUESTION * 60}],
    }
    processor = tiny_processor(model.get_base_model())
    text = processor.apply_chat_template(chats[prompt], add_generation_prompt=True)
    pictures = [Image.new("RGB", (56, 56), "red")] if prompt == "picture" else None
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    assert prompt != "long text" or inputs["input_ids"].shape[1] > 512
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = greedy_by_forward(model, inputs, greedy["max_new_tokens"])
    for _ in range(2):  # the first call leaves a method of the model in the model's own attributes
        assert model.generate(**inputs, **greedy).tolist() == expected
    store = StateStore(4)
    assert model.generate(**inputs, **greedy, state_store=store).tolist() == expected and not len(store)
    base = model.get_base_model()
    assert base.generate(**inputs, **greedy).tolist() == greedy_by_forward(base, inputs, 6)
    once = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    found, plain = once.logits[0], logits(base, inputs)[:, -1]
    assert (found - plain).abs().max() > 1e-2, "the learned prompt changes the answer"
    torch.testing.assert_close(found, logits(model, inputs)[:, -1], atol=1e-4, rtol=1e-4)  # float32


def test_a_learned_prompt_cannot_follow_a_kept_state():
    model = prompt_tuned(tiny_model(7))
    processor = tiny_processor(model.get_base_model())
    chat = [{"role": "user", "content": QUESTION}]
    state = model.get_base_model().read(processor, [*chat, {"role": "assistant", "content": "Red."}])
    inputs = processor(text=processor.apply_chat_template(chat), return_tensors="pt")
    with pytest.raises(ValueError, match="it has not read the learned prompt"):
        model.generate(**inputs, past_key_values=state, max_new_tokens=2)


def test_finetune_with_lora_saves_adapters_or_the_merged_model(data, tmp_path, capsys):
    base = save_tiny_model(tmp_path / "base")
    sizes = ["--max-steps", 2, "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1]
    command = [*lora_command(base, data), *sizes]
    finetune(*command, "--output-dir", tmp_path / "adapter")
    script, *merge = shlex.split(capsys.readouterr().err.rpartition("Next: python ")[2])
    finetune(*command, "--output-dir", tmp_path / "merged", "--merge-lora")
    assert f"Next: visualrwkv ask --model {tmp_path / 'merged'} PICTURE" in capsys.readouterr().err
    runpy.run_path(script)["main"](*map(Path, merge))  # what the first run has said
    assert f"Next: visualrwkv ask --model {tmp_path / 'adapter'}-merged PICTURE" in capsys.readouterr().err

    model = AutoModelForImageTextToText.from_pretrained(base)
    batch = batch_of(model, data)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    expected = logits(adapted, batch)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-4)
    by_hand = load_model(str(tmp_path / "adapter-merged"), "cpu", accelerate=False)
    torch.testing.assert_close(logits(by_hand, batch), expected, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: base" in card
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()
    # What the card says works as it is written, beside a base model without code.
    for file in base.glob("*.py"):
        file.unlink()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("path/or/name", "adapter") + "\nprint(type(model).__name__, len(processor.tokenizer))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("PeftModel "), done.stderr
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(typer.BadParameter, match="base, is not there: say with --base where it is"):
        runpy.run_path(script)["main"](tmp_path / "adapter", tmp_path / "other")
    runpy.run_path(script)["main"](tmp_path / "adapter", tmp_path / "other", str(tmp_path / "elsewhere"))
    assert (tmp_path / "other" / "model.safetensors").exists()
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)


# TRL.


def chats(answers: bool) -> Dataset:
    """A column of chats and one of pictures: TRL's form for pictures."""
    rows = []
    for colour in COLOURS[:4]:
        question = {"role": "user", "content": QUESTION}
        row = {"prompt": [question], "images": [Image.new("RGB", (56, 56), colour)]}
        if answers:
            answer = {"role": "assistant", "content": f"It is {colour}."}
            row = {"messages": [question, answer], "images": row["images"]}
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.mark.parametrize("assistant_only", [False, True], ids=["all tokens", "answers"])
def test_sft_trainer(assistant_only, tmp_path):
    model = tiny_model()
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=None,
        assistant_only_loss=assistant_only,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=chats(answers=True), processing_class=tiny_processor(model)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    if assistant_only:  # then TRL's labels are ours
        rows = list(chats(answers=True))
        theirs = trainer.data_collator([dict(row) for row in rows])
        ours = VisualRWKVDataCollator(tiny_processor(model))(rows)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_grpo_trainer_generates_and_learns(tmp_path):
    """Answers are rewarded by their letters and length; generation keeps its state, as everywhere."""
    model = tiny_model()
    seen, calls = [], []

    def note(module, args, kwargs) -> None:
        """Whether this is a training step, how many tokens are read, and whether there are pictures."""
        pixels = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs") is not None
        calls.append((module.training and torch.is_grad_enabled(), kwargs["input_ids"].shape[1], pixels))

    model.register_forward_pre_hook(note, with_kwargs=True)

    def reward(completions, **kwargs) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        seen.extend(texts)
        return [float(text.count("e") + len(text) % 7) for text in texts]

    arguments = trl.GRPOConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        seed=0,
    )
    before = model.lm_head.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=chats(answers=False),
        processing_class=tiny_processor(model),
    )
    trainer.train()
    assert len(seen) == 8 and len(set(seen)) > 1
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(log) == 2 and all(entry["reward_std"] > 0 for entry in log)
    assert not torch.equal(model.lm_head.weight, before)
    assert all(pictures for training, _, pictures in calls if training)
    generated = [(length, pictures) for training, length, pictures in calls if not training]
    assert generated[0][0] > 17 and generated[0][1]  # the prompt with its picture, then word by word
    assert {length for length, _ in generated[1:6]} == {1}
