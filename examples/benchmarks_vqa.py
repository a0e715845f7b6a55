"""The benchmarks of the original's evaluation: how their files are read, asked, written and scored. One table.

A question file is the original's, which is LLaVA's: JSON lines with `question_id`, `image` and `text`, LLaVA
conversations (JSON or JSON lines), or MMBench's tab-separated table with its pictures in base64. What is written is
what the official scorer or the upload page of the benchmark reads.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import vqa_metrics as metrics

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
OPTION_LETTER_CN = "请直接回答选项字母。"
IMAGE = "<image>"


class Question(NamedTuple):
    """A row of a question file.

    key: what the scorer knows it by; MME's two questions about a picture have the same.
    image: the picture's path below the image folder, or the picture in base64 if `is_base64`; None without one.
    text: what the user says.
    prompt: the text that the answer file repeats.
    record: the row as it is in the file.
    """

    key: str | int
    image: str | None
    text: str
    prompt: str
    record: dict[str, Any]
    is_base64: bool = False


class Answer(NamedTuple):
    """A question and what the model said: "" where the question could not be asked."""

    question: Question
    text: str
    was_asked: bool = True


Truth = Path | None
"""The file or folder given as --annotations."""


# --- Reading ----------------------------------------------------------------------------------------------------------


def json_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the position of each record and the record, from JSON lines or from one JSON list."""
    content = path.read_text(encoding="utf-8-sig")
    if content.lstrip().startswith("["):
        records = [(f"{path}, item {n}", record) for n, record in enumerate(_parsed(content, str(path)), 1)]
    else:
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        records = ((where, _parsed(line, where)) for where, line in lines)
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a record must be an object, got {str(record)[:80]!r}.")
        yield where, record


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def read_questions(path: Path, suffix: str = "") -> list[Question]:
    """JSON records with `text`, or with `conversations`, whose first turn is the question.

    Args:
        path: JSON lines or one JSON list.
        suffix: a sentence to end every question with.

    Raises:
        ValueError: a record is malformed; the message says where it is.
    """
    return [_question(where, record, suffix) for where, record in json_records(path)]


def _question(where: str, record: dict, suffix: str) -> Question:
    text = record.get("text")
    if text is None and record.get("conversations"):
        text = record["conversations"][0].get("value")
    keys = [record[name] for name in ("question_id", "questionId", "id") if name in record]
    if not isinstance(text, str) or not keys:
        raise ValueError(f"{where}: a question needs `text` or `conversations`, and `question_id` or `id`.")
    image = record.get("image")
    if image is None and IMAGE in text:
        raise ValueError(f"{where}: the text has an {IMAGE}, but there is no `image`.")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"{where}: `image` must be one path, got {image!r}.")
    text = "\n".join(part for part in (text.replace(IMAGE, "").strip(), suffix) if part)
    return Question(keys[0], image, text, text, record)


def read_science_questions(path: Path, suffix: str = "") -> list[Question]:
    """As `read_questions`; the stored prompt has an `<image>` where there is a picture: the scorer looks for it."""
    questions = read_questions(path, suffix)
    return [q._replace(prompt=f"{IMAGE}\n{q.text}") if q.image else q for q in questions]


OPTIONS = ("A", "B", "C", "D")


def read_mmbench(path: Path, suffix: str = "", request: str = OPTION_LETTER) -> list[Question]:
    """The rows of MMBench's table: hint, question, the options that there are, and the request for a letter.

    Args:
        path: tab-separated, with a header; its pictures are base64.
        suffix: not used: every release asks for the letter.
        request: in the table's language.

    Raises:
        ValueError: columns are missing, or a line has more or fewer cells than the header.
    """
    csv.field_size_limit(2**31 - 1)  # a picture is a cell
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        missing = {"index", "question", "image"} - set(table.fieldnames or ["index", "question", "image"])
        if missing:
            raise ValueError(f"{path} has no columns {', '.join(sorted(missing))}.")
        return [_mmbench_question(f"{path}, line {table.line_num}", row, request) for row in table]


def _mmbench_question(where: str, row: dict, request: str) -> Question:
    if None in row or None in row.values():
        raise ValueError(f"{where}: it has not as many cells as the header.")
    if not row["index"].isdecimal():
        raise ValueError(f"{where}: the index must be a number, got {row['index']!r}.")
    lines = [row[name] for name in ("hint", "question") if _is_there(row.get(name))]
    lines += [f"{letter}. {row[letter]}" for letter in OPTIONS if _is_there(row.get(letter))]
    text = "\n".join([*lines, request])
    record = {name: cell for name, cell in row.items() if name != "image"}
    return Question(int(row["index"]), row["image"], text, text, record, is_base64=True)


def _is_there(cell: str | None) -> bool:
    return cell is not None and cell.strip().lower() not in ("", "nan", "none")


def read_mmbench_cn(path: Path, suffix: str = "") -> list[Question]:
    return read_mmbench(path, suffix, OPTION_LETTER_CN)


# --- Writing what the official scorer takes, where that is not LLaVA's answer file -----------------------------------


def _write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_vqa(answers: Sequence[Answer], folder: Path, truth: Truth) -> Path:
    """For VQAv2's server: normalised answers; with the whole test split given, "" for what was not asked."""
    said = {answer.question.key: metrics.vqa_answer(answer.text) for answer in answers}
    keys = [q.key for q in read_questions(truth)] if truth else list(said)
    rows = [{"question_id": key, "answer": said.get(key, "")} for key in keys]
    return _write_json(folder / "submission.json", rows)


def write_gqa(answers: Sequence[Answer], folder: Path, truth: Truth) -> Path:
    """For GQA's `eval.py`."""
    rows = [{"questionId": str(a.question.key), "prediction": gqa_answer(a.text)} for a in answers]
    return _write_json(folder / "testdev_balanced_predictions.json", rows)


def gqa_answer(text: str) -> str:
    return text.rstrip(".").lower()


def write_documents(answers: Sequence[Answer], folder: Path, truth: Truth) -> Path:
    """For the server of DocVQA and InfographicVQA."""
    rows = [{"questionId": answer.question.key, "answer": answer.text} for answer in answers]
    return _write_json(folder / "submission.json", rows)


NOT_UPLOADED = {"hint", "category", "source", "image", "comment", "l2-category"}


def write_mmbench(answers: Sequence[Answer], folder: Path, truth: Truth) -> Path:
    """Write an Excel table for MMBench's server: the questions, with a column `prediction` after the options."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    kept = [n for n in (answers[0].question.record if answers else ()) if n not in NOT_UPLOADED]
    after = sum(name in ("index", "question", *OPTIONS) for name in kept)
    book = Workbook()
    sheet = book.active
    sheet.append([*kept[:after], "prediction", *kept[after:]])
    for number, (question, text, _) in enumerate(answers, start=2):
        cells = [str(question.record[name]) for name in kept]
        for column, value in enumerate([*cells[:after], text, *cells[after:]], start=1):
            cell = sheet.cell(number, column, ILLEGAL_CHARACTERS_RE.sub("", value) or None)
            cell.data_type = "s" if cell.value else cell.data_type  # "=1" is an answer, not a formula
        sheet.cell(number, kept.index("index") + 1, question.key)
    book.save(folder / "submission.xlsx")
    return folder / "submission.xlsx"


def write_mme(answers: Sequence[Answer], folder: Path, truth: Truth) -> Path | None:
    """For MME's `calculation.py`: a text file for each task, with picture, question, truth and answer in a line."""
    if truth is None:
        return None
    target = folder / "mme"
    target.mkdir(exist_ok=True)
    for task, rows in mme_rows(answers, truth).items():
        lines = ["\t".join([row.file, row.question, row.truth, _one_line(row.answer)]) for row in rows]
        (target / f"{task}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- Scoring ----------------------------------------------------------------------------------------------------------

Scores = dict[str, float]


def score_gqa(answers: Sequence[Answer], truth: Truth) -> Scores | None:
    """With GQA's `testdev_balanced_questions.json`."""
    if truth is None:
        return None
    true = json.loads(truth.read_text(encoding="utf-8"))
    keys = _known([str(a.question.key) for a in answers], true, truth)
    return {"accuracy": metrics.mean(gqa_answer(a.text) == true[k]["answer"] for k, a in zip(keys, answers))}


def _known(keys: list, true: dict, truth: Path) -> list:
    if unknown := [key for key in keys if key not in true]:
        raise ValueError(f"{truth} has no answers to {len(unknown)} questions, the first is {unknown[0]!r}.")
    return keys


def score_textvqa(answers: Sequence[Answer], truth: Truth) -> Scores | None:
    """With `TextVQA_0.5.1_val.json`; a question is found by its picture and its words."""
    if truth is None:
        return None
    rows = json.loads(truth.read_text(encoding="utf-8"))["data"]
    true = {(str(row["image_id"]), row["question"].lower()): row["answers"] for row in rows}
    keys = [(str(a.question.key), _without_ocr(a.question.text).lower()) for a in answers]
    keys = _known(keys, true, truth)
    return {"accuracy": metrics.mean(metrics.vqa_accuracy(a.text, true[k]) for k, a in zip(keys, answers))}


def _without_ocr(text: str) -> str:
    """The question alone: without the words read in the picture, and the request for a short answer."""
    extra = (SHORT_ANSWER, "Reference OCR token:")
    return "\n".join(line for line in text.split("\n") if not line.startswith(extra))


def score_science(answers: Sequence[Answer], truth: Truth) -> Scores | None:
    """Score by the letters in the file's own second turns; "with pictures" is the original's IMG-accuracy."""
    rows = [(a, a.question.record.get("conversations", [])) for a in answers]
    if not all(len(turns) > 1 for _, turns in rows):
        return None
    right = [(a, metrics.option_letter(a.text) == _true_letter(a, turns[1])) for a, turns in rows]
    return {
        "accuracy": metrics.mean(hit for _, hit in right),
        "accuracy with pictures": metrics.mean(hit for answer, hit in right if answer.question.image),
    }


def _true_letter(answer: Answer, turn: dict) -> str:
    letter = metrics.option_letter(turn["value"])
    if letter is None:
        raise ValueError(f"Question {answer.question.key}: no option's letter in {turn['value']!r}.")
    return letter


def score_pope(answers: Sequence[Answer], truth: Truth) -> Scores | None:
    """With POPE's folder of `coco_pope_*.json`, whose labels are in the order of the category's questions."""
    if truth is None:
        return None
    scores = {}
    for category, rows in _by(answers, lambda a: a.question.record.get("category")).items():
        labels = [record for _, record in json_records(truth / f"coco_pope_{category}.json")]
        if [label["image"] for label in labels[: len(rows)]] != [a.question.image for a in rows]:
            raise ValueError(f"The pictures of {category!r} are not those of {truth}, in its order.")
        true = [label["label"] == "yes" for label in labels[: len(rows)]]
        found = [  # what was not asked is wrong, and an empty answer would be "yes"
            metrics.pope_says_yes(answer.text) if answer.was_asked else not right
            for answer, right in zip(rows, true)
        ]
        scores[f"F1 {category}"] = metrics.f1(found, true)
        scores[f"accuracy {category}"] = metrics.mean(a == b for a, b in zip(found, true))
    return {"F1": metrics.mean(v for name, v in scores.items() if name.startswith("F1")), **scores}


def _by(items: Sequence, key: Callable) -> dict[Any, list]:
    groups: dict[Any, list] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


MME_TASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}


class MMERow(NamedTuple):
    """A line of MME's answer files; `file` names the picture's two questions."""

    file: str
    question: str
    truth: str
    answer: str


def mme_rows(answers: Sequence[Answer], truth: Path) -> dict[str, list[MMERow]]:
    """Task -> its lines, both questions of a picture together, with the truths of MME's release in `truth`."""
    tasks = _by(answers, lambda a: a.question.record.get("category"))
    return {task: _mme_task(task, rows, truth) for task, rows in tasks.items()}


def _mme_task(task: str, answers: list[Answer], truth: Path) -> list[MMERow]:
    folder = truth / str(task)
    if (folder / "questions_answers_YN").is_dir():
        folder /= "questions_answers_YN"
    rows = []
    for question, text, _ in answers:
        file = Path(str(question.key)).with_suffix(".txt").name
        asked = question.text.replace(SHORT_ANSWER, "").strip()
        rows.append(MMERow(file, *_mme_truth(folder / file, asked), text))
    return sorted(rows, key=lambda row: row.file)


def _mme_truth(path: Path, asked: str) -> tuple[str, str]:
    """The question as the release writes it (its white space differs), and its answer."""
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        question, _, answer = line.rstrip().rpartition("\t")
        if question.split() == asked.split():
            return question.strip(), answer.strip()
    raise ValueError(f"{path} has no question {asked!r}.")


def score_mme(answers: Sequence[Answer], truth: Truth) -> Scores | None:
    """With MME's release: a task's accuracy and that of pictures with both answers right, in percent, are added."""
    if truth is None:
        return None
    scores = {task: _mme_task_score(rows) for task, rows in mme_rows(answers, truth).items()}
    sums = {name: sum(scores.get(task, 0.0) for task in tasks.split()) for name, tasks in MME_TASKS.items()}
    return {**sums, **scores}


def _mme_task_score(rows: list[MMERow]) -> float:
    right = [(row.file, metrics.mme_answer(row.answer) == row.truth.lower()) for row in rows]
    pictures = _by(right, lambda pair: pair[0]).values()
    accuracy = metrics.mean(hit for _, hit in right)
    return 100 * (accuracy + metrics.mean(all(hit for _, hit in pair) for pair in pictures))


def _score_by(**measures: Callable[[str, Sequence[str]], float]) -> Callable:
    def score(answers: Sequence[Answer], truth: Truth) -> Scores | None:
        """Score by the file's own `answers`; exact match is what the original reports."""
        references = [_references(answer.question.record) for answer in answers]
        if not all(references):
            return None
        pairs = list(zip(answers, references))
        return {
            name.replace("_", " "): metrics.mean(measure(a.text, true) for a, true in pairs)
            for name, measure in measures.items()
        }

    return score


def _references(record: dict) -> list[str]:
    """The record's right answers: `answers`, or the one `answer` or label; none if it has none."""
    found = record.get("answers", record.get("answer", record.get("label", [])))
    return [str(answer) for answer in (found if isinstance(found, list) else [found])]


# --- The table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A row of the table.

    read: question file -> questions.
    write: answers -> the file for the official scorer; None where that is `answers.jsonl`.
    score: answers -> metrics; None where only the benchmark's server can tell.
    annotations: what `--annotations` is, if the benchmark takes any.
    rwkv7_suffix: a sentence that the original adds to the questions for an RWKV-7 model.
    max_new_tokens: the longest answer, the original's.
    """

    read: Callable[..., list[Question]] = read_questions
    write: Callable[[Sequence[Answer], Path, Truth], Path | None] | None = None
    score: Callable[[Sequence[Answer], Truth], Scores | None] | None = None
    annotations: str = ""
    rwkv7_suffix: str = ""
    max_new_tokens: int = 128


DOCUMENTS = Benchmark(
    write=write_documents, score=_score_by(ANLS=metrics.anls, exact_match=metrics.exact_match)
)

BENCHMARKS = {
    "vqav2": Benchmark(write=write_vqa, annotations="the questions of the whole test split"),
    "gqa": Benchmark(write=write_gqa, score=score_gqa, annotations="testdev_balanced_questions.json"),
    "textvqa": Benchmark(score=score_textvqa, annotations="TextVQA_0.5.1_val.json"),
    "scienceqa": Benchmark(read=read_science_questions, score=score_science, rwkv7_suffix=OPTION_LETTER),
    "pope": Benchmark(score=score_pope, annotations="POPE's folder of coco_pope_*.json"),
    "mme": Benchmark(
        write=write_mme, score=score_mme, annotations="the folder MME_Benchmark_release_version"
    ),
    "mmbench": Benchmark(read=read_mmbench, write=write_mmbench),
    "mmbench_cn": Benchmark(read=read_mmbench_cn, write=write_mmbench),
    "docvqa": DOCUMENTS,
    "infographicvqa": DOCUMENTS,
    "chartqa": Benchmark(
        score=_score_by(relaxed_accuracy=metrics.relaxed_match, exact_match=metrics.exact_match)
    ),
}
