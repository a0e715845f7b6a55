"""lmms-eval through the server's OpenAI door: it counts what our own `generate` answers. And its metrics judge ours."""

import importlib
import itertools
from pathlib import Path
from random import Random

import add_examples  # noqa: F401
import pytest
from PIL import ImageFile

pytest.importorskip("lmms_eval", reason="lmms-eval is in an extra test environment: pip install lmms_eval")
pytest.importorskip("easy_vqa", reason="the rows are those of easy-VQA: pip install easy-vqa")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")

from easy_vqa_rows import exact_matches, messages, own_answers, rows, save_model_that_knows_half, save_rows
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from serving import running
from transformers import AutoProcessor

from visualrwkv_hf.inference.server import build_app

# lmms_eval has Pillow accept half a picture, for all of the process and so for all other tests in it.
ImageFile.LOAD_TRUNCATED_IMAGES = False

TASKS = Path(__file__).parent / "eval" / "lmms_eval"


@pytest.fixture
def metrics():
    return importlib.import_module("vqa_metrics")


def test_exact_match_through_the_server_is_our_own_count(tmp_path, monkeypatch):
    model = save_model_that_knows_half(tmp_path / "easy-model")
    monkeypatch.chdir(tmp_path)
    save_rows(tmp_path / "easy_vqa")
    app = build_app(model)
    with running(app) as url:
        results = simple_evaluate(
            model="openai",
            model_args=f"model=easy-model,base_url={url}/v1,api_key=none,num_concurrent=3",
            tasks=["easy_vqa"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            batch_size=1,
            bootstrap_iters=0,
        )
    samples = sorted(results["samples"]["easy_vqa"], key=lambda sample: sample["doc_id"])
    processor = AutoProcessor.from_pretrained(model)
    prompts = [
        processor.apply_chat_template(messages(row), add_generation_prompt=True, tokenize=False)
        for row in rows()
    ]
    own = own_answers(app.state.model, processor, prompts)
    assert [sample["filtered_resps"][0] for sample in samples] == own
    count = exact_matches(own)
    assert 0 < count < len(own)
    assert results["results"]["easy_vqa"]["exact_match,none"] == pytest.approx(count / len(own))


def test_vqa_normalisation_is_theirs(metrics):
    """On 20,000 texts of what the rules look at: punctuation, numbers, articles, contractions."""
    random, theirs = Random(0), EvalAIAnswerProcessor()
    words = ["1", "2,000", "3.5", "3.", "a", "An", "THE", "None", "ten", "dog's", "somebody'd", "lets", "x"]
    parts = [
        *metrics.PUNCTUATION,
        ".",
        "'",
        "\n",
        "\t",
        " ",
        " ",
        ". ",
        *words,
        *EvalAIAnswerProcessor.CONTRACTIONS,
    ]
    texts = ["".join(random.choices(parts, k=random.randint(0, 9))) for _ in range(20_000)]
    texts += [contraction.lower() for contraction in EvalAIAnswerProcessor.CONTRACTIONS]
    assert [metrics.vqa_answer(text) for text in texts] == [theirs(text) for text in texts]


def test_relaxed_accuracy_is_theirs(metrics):
    texts = ["", "0", "0.0", "5", "5.2", "5.3", "10%", "0.1", "9.6%", "-5", "yes", "Yes", "%", "1e3", "1,000"]
    for answer, reference in itertools.product(texts, repeat=2):
        assert metrics.relaxed_match(answer, [reference]) == relaxed_correctness(answer, reference)
