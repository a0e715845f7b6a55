"""lm-evaluation-harness on a local task of easy-VQA: its `hf-multimodal` counts what our own `generate` answers."""

from pathlib import Path

import pytest

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is in an extra test environment: pip install lm_eval"
)
pytest.importorskip("easy_vqa", reason="the rows are those of easy-VQA: pip install easy-vqa")

from easy_vqa_rows import exact_matches, messages, own_answers, rows, save_model_that_knows_half, save_rows
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
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
