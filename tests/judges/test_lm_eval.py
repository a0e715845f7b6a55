"""lm-evaluation-harness on local tasks of easy-VQA: it counts what our own `generate` answers, and `score` compares."""

import importlib
from pathlib import Path

import add_examples  # noqa: F401
import pytest
import torch

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is in an extra test environment: pip install lm_eval"
)
pytest.importorskip("easy_vqa", reason="the rows are those of easy-VQA: pip install easy-vqa")

from easy_vqa_rows import exact_matches, messages, own_answers, rows, save_model_that_knows_half, save_rows
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

TASKS = Path(__file__).parent / "eval" / "lm_eval"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model_that_knows_half(tmp_path_factory.mktemp("model"))


def chat_prompt(processor, row: dict) -> str:
    return processor.apply_chat_template(messages(row), add_generation_prompt=True, tokenize=False)


def plain_prompt(processor, row: dict) -> str:
    return f"User: <image>\n{row['question']}\n\nAssistant:"


PROMPTS = {"easy_vqa_chat": chat_prompt, "easy_vqa_plain": plain_prompt}


@pytest.mark.parametrize(("task", "batch_size"), [("easy_vqa_chat", 5), ("easy_vqa_plain", 1)])
def test_exact_match_is_our_own_count(task, batch_size, model, tmp_path, monkeypatch):
    save_rows(tmp_path / "easy_vqa")
    monkeypatch.chdir(tmp_path)
    results = simple_evaluate(
        model="hf-multimodal",
        model_args={"pretrained": str(model), "device": "cpu", "dtype": "float32"},
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=task == "easy_vqa_chat",
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    processor = AutoProcessor.from_pretrained(model)
    own = own_answers(
        AutoModelForImageTextToText.from_pretrained(model),
        processor,
        [PROMPTS[task](processor, row) for row in rows()],
    )
    assert [sample["filtered_resps"][0] for sample in samples] == own
    count = exact_matches(own)
    assert 0 < count < len(own)
    assert results["results"][task]["exact_match,answer"] == pytest.approx(count / len(own))


def plain_log_prob(model, processor, row: dict, answer: str) -> tuple[float, bool]:
    """The log-softmax over a plain forward at the tokens of an answer, summed, and whether each is the largest."""
    text = chat_prompt(processor, row)
    (image,) = (part["image"] for part in messages(row)[0]["content"] if part["type"] == "image")
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = torch.tensor([processor.tokenizer.encode(f" {answer}", add_special_tokens=False)])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        logits = model(**whole).logits[0, -ids.shape[1] - 1 : -1].float()
    log_probs = logits.log_softmax(-1)
    return float(log_probs.gather(1, ids[0, :, None]).sum()), torch.equal(logits.argmax(-1), ids[0])


def test_tasks_with_and_without_pictures_may_be_asked_at_once(model):
    module = importlib.import_module("lm_eval_model")
    lm = module.VisualRWKVMultimodalLM(str(model), device="cpu", dtype="float32")
    visual = {"visual": [Image.new("RGB", (64, 64), "red")]}
    arguments = [("User: <image>\nWhich?\n\nAssistant:", " red", visual), ("The sky is", " blue")]
    requests = [Instance("loglikelihood", {}, each, 0) for each in arguments]
    together = lm.loglikelihood(requests, disable_tqdm=True)
    apart = [lm.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    assert [one[0] for one in together] == pytest.approx([one[0] for one in apart], abs=1e-5)
    assert lm.loglikelihood(requests[::-1], disable_tqdm=True)[0][0] == pytest.approx(apart[1][0], abs=1e-5)


def test_answers_are_compared_by_their_probabilities(model, tmp_path, monkeypatch):
    """The picture is encoded once for the thirteen answers to a question."""
    module = importlib.import_module("lm_eval_model")
    save_rows(tmp_path / "easy_vqa")
    monkeypatch.chdir(tmp_path)
    lm = module.VisualRWKVMultimodalLM(str(model), device="cpu", dtype="float32")
    encoded = []
    lm.model.model.vision_tower.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    results = simple_evaluate(
        model=lm,
        tasks=["easy_vqa_choices"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert encoded == [1] * len(rows())
    samples = sorted(results["samples"]["easy_vqa_choices"], key=lambda sample: sample["doc_id"])
    own, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    choices = [argument[1].strip() for argument in samples[0]["arguments"]]
    right, greedy = 0, 0
    for row, sample in zip(rows(), samples, strict=True):
        plain = [plain_log_prob(own, processor, row, choice) for choice in choices]
        found = [tuple(answer) for answer in sample["filtered_resps"]]
        assert [float(one) for one, _ in found] == pytest.approx([one for one, _ in plain], abs=1e-4)
        assert [str(flag) for _, flag in found] == [str(flag) for _, flag in plain]
        greedy += sum(flag for _, flag in plain)
        best = max(range(len(choices)), key=lambda index: plain[index][0])
        right += choices[best] == row["answer"]
    assert results["results"]["easy_vqa_choices"]["acc,none"] == pytest.approx(right / len(rows()))
    assert 0 < right < len(rows()) and greedy
