"""examples/evaluate.py: every benchmark's files in and out, its prompts and metrics, processes, kills, bad rows."""

import base64
import csv
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import typer
from openpyxl import load_workbook
from paths import EXAMPLES
from patience import PATIENCE
from PIL import Image
from tiny_training import COLOURS, save_tiny_model, tiny_model, tiny_processor

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module", autouse=True)
def examples_on_path():
    """As Python runs a script: with its folder first on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "evaluate", raising=False)  # lm_eval imports a library of this name
        yield


@pytest.fixture(scope="module")
def evaluate(examples_on_path):
    return importlib.import_module("evaluate")


@pytest.fixture(scope="module")
def benchmarks(examples_on_path):
    return importlib.import_module("benchmarks_vqa")


@pytest.fixture(scope="module")
def metrics(examples_on_path):
    return importlib.import_module("vqa_metrics")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, records: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_json(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (60, 56), colour)


# --- One file of each benchmark ------------------------------------------------------------------------------------


def llava_rows(folder: Path, count: int = 3, **fields) -> list[dict]:
    """LLaVA's question rows, and their pictures in `folder`."""
    rows = []
    for number, colour in enumerate(COLOURS[:count]):
        picture(colour).save(folder / f"{colour}.png")
        text = f"What is shape {number}?\n{SHORT}"
        rows.append({"question_id": number, "image": f"{colour}.png", "text": text} | fields)
    return rows


def vqav2(folder: Path) -> tuple[Path, Path]:
    rows = llava_rows(folder)
    whole = [*rows, {"question_id": 77, "image": "elsewhere.jpg", "text": "Not in test-dev?"}]
    return write_lines(folder / "q.jsonl", rows), write_lines(folder / "all.jsonl", whole)


def gqa(folder: Path) -> tuple[Path, Path]:
    rows = [row | {"question_id": f"20{row['question_id']}"} for row in llava_rows(folder)]
    true = {row["question_id"]: {"answer": "red"} for row in rows} | {"99": {"answer": "no"}}
    return write_lines(folder / "q.jsonl", rows), write_json(folder / "true.json", true)


def textvqa(folder: Path) -> tuple[Path, Path]:
    rows = llava_rows(folder)
    ocr = "Reference OCR token: NOKIA, 3310"
    for row in rows:
        row |= {"question_id": f"id{row['question_id']}", "text": row["text"].replace("\n", f"\n{ocr}\n")}
    true = [
        {"image_id": f"id{n}", "question": f"What is SHAPE {n}?", "answers": ["nokia"] * 2 + ["the 3310"] * 8}
        for n in range(3)
    ]
    return write_lines(folder / "q.jsonl", rows), write_json(folder / "true.json", {"data": true})


def scienceqa(folder: Path) -> tuple[Path, None]:
    """A JSON list of conversations; the last one without a picture."""
    rows = []
    for row, letter in zip(llava_rows(folder), ["A", "B. two", "The answer is C."]):
        human = f"<image>\nWhich {row['question_id']}?\nA. one\nB. two\nC. three"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": letter}]
        rows.append({"id": str(row["question_id"]), "image": row["image"], "conversations": turns})
    rows[2].pop("image")
    rows[2]["conversations"][0]["value"] = rows[2]["conversations"][0]["value"].removeprefix("<image>\n")
    return write_json(folder / "q.json", rows), None


def pope(folder: Path) -> tuple[Path, Path]:
    """Categories in turn, as a shuffled file has them."""
    rows, labels = [], folder / "coco"
    for category in ("random", "popular", "adversarial"):
        rows += llava_rows(folder, count=2, category=category)
        lines = [{"image": f"{colour}.png", "label": label} for colour, label in zip(COLOURS, ["yes", "no"])]
        write_lines(labels / f"coco_pope_{category}.json", lines)
    rows = [row | {"question_id": number} for number, row in enumerate(rows[::2] + rows[1::2])]
    return write_lines(folder / "q.jsonl", rows), labels


def mme(folder: Path) -> tuple[Path, Path]:
    """Two tasks, whose truths lie in a folder of their own or not; the release has a double space."""
    release = folder / "release"
    rows = []
    for task, place in (("existence", ""), ("code_reasoning", "questions_answers_YN")):
        (release / task / place).mkdir(parents=True)
        for colour in COLOURS[:2]:
            (folder / task).mkdir(exist_ok=True)
            picture(colour).save(folder / task / f"{colour}.png")
            asked = [f"Is it {colour}? Please answer yes or no.", "Is it big? Please answer yes or no."]
            key = f"{task}/{colour}.png"
            rows += [
                {"question_id": key, "image": key, "text": f"{q}\n{SHORT}", "category": task} for q in asked
            ]
            lines = [f"{asked[0].replace('? ', '?  ')}\tYes", f"{asked[1]}\tNo"]
            (release / task / place / f"{colour}.txt").write_text("\n".join(lines) + "\n")
    return write_lines(folder / "q.jsonl", rows), release


MMBENCH_COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"]
MMBENCH_COLUMNS += ["l2-category", "comment", "split"]


def mmbench(folder: Path) -> tuple[Path, None]:
    """The second question has two options and no hint, the third a line break in a cell."""
    rows = []
    for number, colour in enumerate(COLOURS[:3]):
        file = io.BytesIO()
        picture(colour).save(file, "JPEG")
        cells = {"index": 10 + number, "question": f"Which {number}?", "hint": "Look.", "answer": "A"}
        cells |= {"A": "one", "B": "two", "C": "three", "D": "four", "split": "dev"}
        rows.append(cells | {"image": base64.b64encode(file.getvalue()).decode()})
    rows[1] |= {"hint": "nan", "C": "", "D": "None"}
    rows[2] |= {"hint": 'A "hint"\nof two lines'}
    with (folder / "q.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, MMBENCH_COLUMNS, delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return folder / "q.tsv", None


def documents(folder: Path) -> tuple[Path, None]:
    return write_lines(folder / "q.jsonl", llava_rows(folder, answers=["42", "forty-two"])), None


FILES: dict[str, Callable[[Path], tuple[Path, Path | None]]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "mmbench_cn": mmbench,
    "docvqa": documents,
    "infographicvqa": documents,
    "chartqa": documents,
}


def run(evaluate, name: str, model: Path, questions: Path, out: Path, **options) -> None:
    options = dict(max_new_tokens=4, batch_size=2, cpu=True) | options
    evaluate.main(name, str(model), questions, out, **options)


# --- Files in, files out -------------------------------------------------------------------------------------------


def test_every_benchmark_has_a_file_here(benchmarks):
    assert FILES.keys() == benchmarks.BENCHMARKS.keys()


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_answered_in_order_and_written_for_the_scorer(
    name, evaluate, benchmarks, model, tmp_path
):
    path, truth = FILES[name](tmp_path)
    out = tmp_path / "out"
    run(evaluate, name, model, path, out, annotations=truth)

    benchmark = benchmarks.BENCHMARKS[name]
    asked = benchmark.read(path)
    answers = read_lines(out / "answers.jsonl")
    assert [(a["question_id"], a["prompt"]) for a in answers] == [(q.key, q.prompt) for q in asked]
    assert all(a["metadata"] == {} for a in answers)
    assert len({a["text"] for a in answers}) > 1  # the model looks at the question
    assert (out / "scores.json").exists() == (benchmark.score is not None)
    if benchmark.write:
        said = [benchmarks.Answer(question, answer["text"]) for question, answer in zip(asked, answers)]
        again = tmp_path / "again"
        again.mkdir()
        official = benchmark.write(said, again, truth)
        assert {p.relative_to(again) for p in again.rglob("*")} <= {
            p.relative_to(out) for p in out.rglob("*")
        }
        if official.suffix == ".json":
            assert official.read_text() == (out / official.name).read_text()


def written(benchmarks, name: str, folder: Path, texts: list[str]) -> tuple[Path, dict | None]:
    """The official file and the scores for these answers."""
    path, truth = FILES[name](folder)
    benchmark = benchmarks.BENCHMARKS[name]
    questions = benchmark.read(path)
    assert len(questions) == len(texts)
    answers = [benchmarks.Answer(*pair) for pair in zip(questions, texts)]
    return (
        benchmark.write and benchmark.write(answers, folder, truth),
        benchmark.score and benchmark.score(answers, truth),
    )


def test_vqav2_is_normalised_and_fills_the_whole_split(benchmarks, tmp_path):
    file, _ = written(benchmarks, "vqav2", tmp_path, ["The dog's.", "Two", "yes, it is"])
    assert json.loads(file.read_text()) == [
        {"question_id": 0, "answer": "dog 's"},
        {"question_id": 1, "answer": "2"},
        {"question_id": 2, "answer": "yes it is"},
        {"question_id": 77, "answer": ""},
    ]


def test_gqa(benchmarks, tmp_path):
    file, scores = written(benchmarks, "gqa", tmp_path, ["Red.", "blue", "red"])
    assert json.loads(file.read_text())[0] == {"questionId": "200", "prediction": "red"}
    assert scores == {"accuracy": pytest.approx(2 / 3)}


def test_textvqa_finds_questions_behind_ocr_and_counts_as_vqa_does(benchmarks, tmp_path):
    """Two of ten persons say Nokia: 2/3, but 1/3 where one of them is left out."""
    _, scores = written(benchmarks, "textvqa", tmp_path, ["Nokia.", "3310", "phone"])
    assert scores == {"accuracy": pytest.approx(((8 * 2 / 3 + 2 * 1 / 3) / 10 + 1 + 0) / 3)}


def test_scienceqa_counts_pictures_apart(benchmarks, tmp_path):
    _, scores = written(benchmarks, "scienceqa", tmp_path, ["A", "A. one", "So. The answer is C."])
    assert scores == {"accuracy": pytest.approx(2 / 3), "accuracy with pictures": 0.5}


def test_pope_is_the_mean_of_three_categories(benchmarks, tmp_path):
    """The rows' labels are yes yes yes no no no, of random, popular, adversarial each time."""
    texts = ["Yes", "No, there is not.", "yes", "Yes", "No. Yes", "There is no one"]
    _, scores = written(benchmarks, "pope", tmp_path, texts)
    assert scores == {
        "F1": pytest.approx((2 / 3 + 0 + 1) / 3),
        "F1 random": pytest.approx(2 / 3),
        "accuracy random": 0.5,
        "F1 popular": 0.0,
        "accuracy popular": 0.5,
        "F1 adversarial": 1.0,
        "accuracy adversarial": 1.0,
    }


def test_pope_counts_what_was_not_asked_as_wrong(benchmarks, tmp_path):
    """An empty answer has no "no" in it and would be "yes"."""
    path, truth = pope(tmp_path)
    answers = [benchmarks.Answer(question, "", False) for question in benchmarks.read_questions(path)]
    scores = benchmarks.score_pope(answers, truth)
    assert set(scores.values()) == {0.0}


def test_pope_refuses_labels_of_other_pictures(benchmarks, tmp_path):
    path, truth = pope(tmp_path)
    (truth / "coco_pope_popular.json").write_text('{"image": "red.png", "label": "yes"}\n')
    questions = benchmarks.read_questions(path)
    with pytest.raises(ValueError, match="The pictures of 'popular' are not those of"):
        benchmarks.score_pope([benchmarks.Answer(q, "yes") for q in questions], truth)


def test_mme_lines_pair_up_and_pairs_count_once_more(benchmarks, tmp_path):
    """Existence: both right, then one: 75 % of answers and 50 % of pictures. Code: nothing is right."""
    texts = ["Yes", "no, small", "Yes.\nIt is", "yes"] + ["maybe", "It is not"] * 2
    folder, scores = written(benchmarks, "mme", tmp_path, texts)
    assert scores == {"perception": 125, "cognition": 0, "existence": 125, "code_reasoning": 0}
    lines = [line.split("\t") for line in (folder / "existence.txt").read_text().splitlines()]
    assert lines == [
        ["green.txt", "Is it green?  Please answer yes or no.", "Yes", "Yes. It is"],
        ["green.txt", "Is it big? Please answer yes or no.", "No", "yes"],
        ["red.txt", "Is it red?  Please answer yes or no.", "Yes", "Yes"],
        ["red.txt", "Is it big? Please answer yes or no.", "No", "no, small"],
    ]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench_is_uploaded_as_a_table(name, benchmarks, tmp_path):
    """An answer like a formula stays text; what Excel cannot hold is left out."""
    file, scores = written(benchmarks, name, tmp_path, ["A", "=1+1", "B\x02"])
    assert scores is None
    sheet = load_workbook(file).active
    assert sheet["G3"].data_type == "s"
    head, *rows = sheet.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows == [
        (10, "Which 0?", "one", "two", "three", "four", "A", "A", "dev"),
        (11, "Which 1?", "one", "two", None, "None", "=1+1", "A", "dev"),
        (12, "Which 2?", "one", "two", "three", "four", "B", "A", "dev"),
    ]


def test_documents_count_by_edit_distance_and_exactly(benchmarks, tmp_path):
    """ "forty-tw" is 1 of 9 letters away, "fifty" more than half."""
    file, scores = written(benchmarks, "docvqa", tmp_path, [" 42.", "Forty-tw", "fifty"])
    assert json.loads(file.read_text())[1] == {"questionId": 1, "answer": "Forty-tw"}
    assert scores == {"ANLS": pytest.approx((2 / 3 + 8 / 9 + 0) / 3), "exact match": pytest.approx(1 / 3)}


def test_charts_count_within_5_percent(benchmarks, tmp_path):
    _, scores = written(benchmarks, "chartqa", tmp_path, ["44", "44.2", "FORTY-TWO"])
    assert scores == {"relaxed accuracy": pytest.approx(2 / 3), "exact match": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [("9.6%", "10%", True), ("0.1", "10%", True), ("0", "0.0", False), ("0.0", "0.0", True), ("", "", True)]
    + [("inf", "5", False), ("Yes", "yes", True), ("2,000", "2000", False)],
)
def test_relaxed_match(answer, reference, expected, metrics):
    assert metrics.relaxed_match(answer, [reference]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A", "A"), ("B. two", "B"), ("BC", None), ("I say: The answer is E.", "E"), ("", None)]
    + [("The answer is A. The answer is B.", None), ("F", None)],
)
def test_option_letter(text, expected, metrics):
    assert metrics.option_letter(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("dont", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("None", "0")]
    + [("a b-c", "b c"), ("b- c", "b c"), ("3.5 cm.", "3.5 cm"), ("1,000", "1000"), ("an\nAPPLE\t", "apple")],
)
def test_vqa_answer(text, expected, metrics):
    assert metrics.vqa_answer(text) == expected


# --- Prompts -------------------------------------------------------------------------------------------------------


def prompts(evaluate, benchmarks, name: str, folder: Path, version: int = 6, **settings) -> list[str]:
    """What the model reads, with one `<image>` for each picture."""
    tiny = tiny_model(version, image_position="middle" if version == 6 else "first")
    tiny.config.save_pretrained(folder / "config")
    path, _ = FILES[name](folder)
    _, questions = evaluate.read_benchmark(name, path, str(folder / "config"))
    fields = dict(image_folder=str(folder), image_position=None) | settings
    processor = tiny_processor(tiny)
    settings = evaluate.Settings(name, "", "", max_new_tokens=1, dtype="", **fields)
    texts = []
    for row in range(len(questions)):
        batch = evaluate.prepare([row], questions, processor, settings)
        assert not batch.errors
        (text,) = processor.tokenizer.batch_decode(batch.inputs["input_ids"])
        count = tiny.config.num_image_tokens
        texts.append(text.replace("<image>" * count, "<image>"))
    return texts


@pytest.mark.parametrize(
    ("image_position", "expected"),
    [
        (None, f"User: What is shape 0?\n<image>\nWhat is shape 0?\n{SHORT}\n\nAssistant:"),
        ("first", f"User: <image>\nWhat is shape 0?\n{SHORT}\n\nAssistant:"),
        ("last", f"User: What is shape 0?\n{SHORT}\n<image>\n\nAssistant:"),
    ],
)
def test_prompt_of_llava_rows(image_position, expected, evaluate, benchmarks, tmp_path):
    texts = prompts(evaluate, benchmarks, "vqav2", tmp_path, image_position=image_position)
    assert texts[0] == expected


def test_prompt_of_mmbench(evaluate, benchmarks, tmp_path):
    texts = prompts(evaluate, benchmarks, "mmbench", tmp_path, image_position="first")
    options = "A. one\nB. two\nC. three\nD. four"
    assert texts == [
        f"User: <image>\nLook.\nWhich 0?\n{options}\n{LETTER}\n\nAssistant:",
        f"User: <image>\nWhich 1?\nA. one\nB. two\n{LETTER}\n\nAssistant:",
        f'User: <image>\nA "hint"\nof two lines\nWhich 2?\n{options}\n{LETTER}\n\nAssistant:',
    ]


def test_prompt_of_mmbench_in_chinese(evaluate, benchmarks, tmp_path):
    texts = prompts(evaluate, benchmarks, "mmbench_cn", tmp_path, image_position="first")
    assert texts[1] == "User: <image>\nWhich 1?\nA. one\nB. two\n请直接回答选项字母。\n\nAssistant:"


@pytest.mark.parametrize(("version", "request_"), [(6, ""), (7, f"\n{LETTER}")])
def test_prompt_of_science(version, request_, evaluate, benchmarks, tmp_path):
    """The original asks RWKV-7 for the letter; a question without a picture is text alone."""
    texts = prompts(evaluate, benchmarks, "scienceqa", tmp_path, version, image_position="first")
    question = "Which {}?\nA. one\nB. two\nC. three" + request_ + "\n\nAssistant:"
    assert texts[0] == "User: <image>\n" + question.format(0)
    assert texts[2] == "User: " + question.format(2)


# --- Processes and kills -------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(name: str, model: Path, questions: Path, out: Path, *options: object) -> list[str]:
    script = [EXAMPLES / "evaluate.py", name, "--model", model, "--questions", questions, "--output-dir", out]
    return [str(part) for part in (*script, "--cpu", *options)]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """33 questions about 8 pictures."""
    folder = tmp_path_factory.mktemp("many")
    rows = llava_rows(folder, 8)
    return write_lines(folder / "q.jsonl", [rows[n % 8] | {"question_id": n} for n in range(33)])


@pytest.fixture(scope="module")
def in_one_go(evaluate, model, many, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("one")
    run(evaluate, "docvqa", model, many, out, batch_size=1)
    return (out / "answers.jsonl").read_text()


def test_two_processes_give_what_one_gives(model, many, in_one_go, tmp_path):
    two = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    plain = "--mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *two.split(), *plain.split()]
    options = ("--max-new-tokens", 4, "--batch-size", 3)
    done = subprocess.run(
        [*launch, *command("docvqa", model, many, tmp_path / "out", *options)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "answers.jsonl").read_text() == in_one_go
    shares = [len(read_lines(path)) for path in sorted((tmp_path / "out" / "parts").glob("*-*.jsonl"))]
    assert shares == [17, 16]
    assert done.stdout.count("33 answers") == 1


def test_after_a_kill_it_goes_on(evaluate, model, many, in_one_go, tmp_path):
    parts = tmp_path / "out" / "parts"
    options = ("--max-new-tokens", 4, "--batch-size", 1)
    process = subprocess.Popen(
        [sys.executable, *command("docvqa", model, many, tmp_path / "out", *options)],
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    first = parts / "0001-0.jsonl"
    while process.poll() is None:
        if first.exists() and first.stat().st_size:  # it is empty for a moment
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(read_lines(first))
    assert 0 < before < 33
    with first.open("ab") as file:
        file.write('{"row": 32, "text": "ü'.encode()[:-1])  # and a line that the kill tore, within a letter

    run(evaluate, "docvqa", model, many, tmp_path / "out", batch_size=1)
    assert len(read_lines(parts / "0002-0.jsonl")) == 33 - before
    assert (tmp_path / "out" / "answers.jsonl").read_text() == in_one_go


def test_a_finished_run_asks_nothing_again(evaluate, model, tmp_path, monkeypatch):
    path, _ = documents(tmp_path)
    run(evaluate, "docvqa", model, path, tmp_path / "out")
    before = (tmp_path / "out" / "answers.jsonl").read_text()
    monkeypatch.setattr(evaluate, "answer_rows", None)
    run(evaluate, "docvqa", model, path, tmp_path / "out")
    assert (tmp_path / "out" / "answers.jsonl").read_text() == before


def failure(capsys, *arguments, **options) -> str:
    """What the script says when it gives up."""
    with pytest.raises(typer.Exit):
        run(*arguments, **options)
    return capsys.readouterr().err


def test_answers_of_other_settings_are_refused(evaluate, model, tmp_path, capsys):
    path, _ = documents(tmp_path)
    run(evaluate, "docvqa", model, path, tmp_path / "out")
    assert "max_new_tokens was 4, now 5" in failure(
        capsys, evaluate, "docvqa", model, path, tmp_path / "out", max_new_tokens=5
    )
    weights = Path(model) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    os.utime(weights, ns=(before, before + 10**9))  # trained again
    assert "weights was" in failure(capsys, evaluate, "docvqa", model, path, tmp_path / "out")
    os.utime(weights, ns=(before, before))
    path.write_text(path.read_text() + "\n")
    assert "questions_sha256 was" in failure(capsys, evaluate, "docvqa", model, path, tmp_path / "out")


def test_two_answers_to_one_row_are_refused(evaluate, model, tmp_path, capsys):
    path, _ = documents(tmp_path)
    run(evaluate, "docvqa", model, path, tmp_path / "out")
    write_lines(tmp_path / "out" / "parts" / "0001-1.jsonl", [{"row": 2, "text": "again"}])
    assert "two answers to row 2" in failure(capsys, evaluate, "docvqa", model, path, tmp_path / "out")


def test_pictures_can_be_read_ahead(evaluate, model, many, in_one_go, tmp_path):
    run(evaluate, "docvqa", model, many, tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "answers.jsonl").read_text() == in_one_go


# --- Short, empty and bad files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file_gives_empty_answers_and_no_score(name, evaluate, model, tmp_path):
    path, truth = FILES[name](tmp_path)
    path.write_text("[]" if path.suffix == ".json" else "")
    run(evaluate, name, model, path, tmp_path / "out", annotations=truth)
    assert (tmp_path / "out" / "answers.jsonl").read_text() == ""
    assert not (tmp_path / "out" / "scores.json").exists()


def test_one_row_is_enough(evaluate, model, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", llava_rows(tmp_path, 1, answers=["x"]))
    run(evaluate, "chartqa", model, path, tmp_path / "out", batch_size=64)
    assert len(read_lines(tmp_path / "out" / "answers.jsonl")) == 1


BAD_ROWS = {
    "missing": lambda row: row | {"image": "gone.png"},
    "broken": lambda row: row | {"image": "broken.png"},
    "reserved": lambda row: row | {"text": "Say <|endoftext|>"},
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_refused_or_counted_as_wrong(kind, evaluate, model, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    rows = llava_rows(tmp_path, 5, answers=["x"])
    rows[1] = BAD_ROWS[kind](rows[1])
    path = write_lines(tmp_path / "q.jsonl", rows)
    message = failure(capsys, evaluate, "docvqa", model, path, tmp_path / "out")
    assert ("gone.png" if kind == "missing" else "question 1: ") in message
    assert "--skip-bad-rows" in message

    run(evaluate, "docvqa", model, path, tmp_path / "out", skip_bad_rows=True)
    answers = read_lines(tmp_path / "out" / "answers.jsonl")
    assert [bool(a["metadata"]) for a in answers] == [False, True, False, False, False]
    assert answers[1]["text"] == ""
    assert "1 rows could not be asked" in capsys.readouterr().out


def test_a_mended_row_is_asked_when_the_run_goes_on(evaluate, model, tmp_path):
    path, _ = documents(tmp_path)
    (tmp_path / "green.png").unlink()
    run(evaluate, "docvqa", model, path, tmp_path / "out", skip_bad_rows=True)
    picture("green").save(tmp_path / "green.png")
    run(evaluate, "docvqa", model, path, tmp_path / "out")
    assert [a["metadata"] for a in read_lines(tmp_path / "out" / "answers.jsonl")] == [{}, {}, {}]
    assert [r["row"] for r in read_lines(tmp_path / "out" / "parts" / "0002-0.jsonl")] == [1]


GOOD = '{"question_id": 1, "text": "Why?"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"question_id": 2', "q.jsonl, line 2 is no JSON"),
        (GOOD + "\n" + '{"text": "Why?"}', "q.jsonl, line 3: a question needs"),
        (GOOD + '{"question_id": 2, "conversations": []}', "q.jsonl, line 2: a question needs"),
        (GOOD + "5", "q.jsonl, line 2: a record must be an object, got '5'"),
        (GOOD + '{"question_id": 2, "text": "<image> Why?"}', "line 2: the text has an <image>"),
        (
            GOOD + '{"question_id": 2, "text": "Why?", "image": ["a.png", "b.png"]}',
            "line 2: `image` must be one",
        ),
        ("[" + GOOD + ", {}]", "q.jsonl, item 2: a question needs"),
        ("[" + GOOD, "q.jsonl is no JSON"),
    ],
)
def test_a_malformed_row_is_named(content, message, benchmarks, tmp_path):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError) as error:
        benchmarks.read_questions(tmp_path / "q.jsonl")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tquestion\timage\n1\tWhy?\n", "q.tsv, line 2: it has not as many cells"),
        (
            "index\tquestion\timage\n1\tWhy?\tabc\n2\tHow?\tabc\tmore\n",
            "q.tsv, line 3: it has not as many cells",
        ),
        ("index\tquestion\timage\nx\tWhy?\tabc\n", "q.tsv, line 2: the index must be a number, got 'x'"),
        ("index\tquestion\n1\tWhy?\n", "q.tsv has no columns image"),
    ],
)
def test_a_malformed_table_is_named(content, message, benchmarks, tmp_path):
    (tmp_path / "q.tsv").write_text(content)
    with pytest.raises(ValueError) as error:
        benchmarks.read_mmbench(tmp_path / "q.tsv")
    assert message in str(error.value)


def test_an_unknown_benchmark_is_refused_with_those_there_are(evaluate, model, tmp_path, capsys):
    path, _ = documents(tmp_path)
    message = failure(capsys, evaluate, "vqa", model, path, tmp_path / "out")
    assert "must be one of vqav2, gqa" in message and "got 'vqa'" in message
