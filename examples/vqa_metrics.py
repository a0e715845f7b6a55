"""The metrics of the benchmarks in benchmarks_vqa.py: from texts to numbers, as their official scorers count.

Sources: VQA (Antol et al. 2015, evaluation code of visualqa.org and EvalAI), POPE (Li et al. 2023), MME (Fu et al.
2023), ScienceQA (Lu et al. 2022), ChartQA (Masry et al. 2022, section 5.1), ANLS (Biten et al. 2019).
"""

import re
from collections.abc import Iterable, Sequence

from anls_star import anls_score

CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""

WITH_APOSTROPHE = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction that lacks one of its apostrophes -> the contraction; the last one is the official table's slip."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIODS_TAKEN_OUT = 32
"""The official code hands a flag of that value to `re.sub` where it takes a count."""


def vqa_answer(text: str) -> str:
    """An answer as VQA compares it: lower case, no articles, no punctuation, numbers as digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"[\n\t]", " ", text.strip()).strip()
    given = text
    for mark in PUNCTUATION:
        is_between_words = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if is_between_words else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=PERIODS_TAKEN_OUT)
    words = [DIGITS.get(word, word) for word in text.split()]
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(1, matches / 3), the mean over leaving out each person's reference once."""
    answer = vqa_answer(answer)
    references = [vqa_answer(reference) for reference in references]
    others = [references[:i] + references[i + 1 :] for i in range(len(references))]
    return mean(min(1.0, left.count(answer) / 3) for left in others)


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Without case, outer white space and full stops."""
    return _plain(answer) in map(_plain, references)


def _plain(text: str) -> str:
    return text.lower().strip().strip(".").strip()


def anls(answer: str, references: Iterable[str]) -> float:
    """1 - normalised edit distance to the nearest reference, 0 if that is below a half."""
    return anls_score(gt=tuple(references), pred=answer)


def relaxed_match(answer: str, references: Iterable[str]) -> bool:
    """Within 5 % of a reference that is a number, else the same without case."""
    return any(_relaxed(answer, reference) for reference in references)


def _relaxed(answer: str, reference: str) -> bool:
    number, true = _number(answer), _number(reference)
    if number is None or not true:  # nothing is within 5 % of 0
        return answer.lower() == reference.lower()
    return abs(number - true) / abs(true) <= 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def option_letter(text: str) -> str | None:
    """The option that a ScienceQA answer names: "B", "B. because …" or "… The answer is B. …"."""
    if start := re.match(r"([A-E])(\. |$)", text):
        return start[1]
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None


def pope_says_yes(text: str) -> bool:
    """POPE: no "No", "no" or "not" in the first sentence."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def mme_answer(text: str) -> str:
    """MME: "yes" or "no" if it is within the first four characters, else "other"."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def mean(values: Iterable[float]) -> float:
    """The mean, 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def f1(found: Sequence[bool], true: Sequence[bool]) -> float:
    """Return the F1 score of the class True; 0 if none was found."""
    hits = sum(a and b for a, b in zip(found, true))
    return 2 * hits / (sum(found) + sum(true)) if hits else 0.0
