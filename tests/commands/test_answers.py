"""`visualrwkv ask --choices` and `--json-schema`, and `caption --json-schema`: they print what the model says."""

import json
import re

import pytest
import torch
from chats import inputs_of, picture, user
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from visualrwkv_hf import Chat, TunedState
from visualrwkv_hf.cli.app import app

QUESTION = "Which colour is it?"
CHOICES = ["red", "a red dot", "no"]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def red(tmp_path):
    picture("red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def schema(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return tmp_path / "schema.json"


def run(command, *arguments):
    return CliRunner().invoke(app, [command, *map(str, arguments), "--device", "cpu"])


def assert_refused(result, sentence):
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_choices_are_printed_with_their_probabilities(folder, red):
    result = run("ask", "--model", folder, red, QUESTION, "--choices", ", ".join(CHOICES), "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    content = [{"type": "image", "url": str(red)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    scores = model.score(inputs, CHOICES, tokenizer=processor, end_of_turn=True)
    found = {row["answer"]: row for row in printed["choices"]}
    assert list(found) == sorted(CHOICES, key=lambda answer: -found[answer]["probability"])
    assert printed["answer"] == next(iter(found))
    for i, answer in enumerate(CHOICES):
        assert found[answer]["probability"] == pytest.approx(float(scores.probabilities[0, i]), abs=1e-4)
        assert found[answer]["log_probability"] == pytest.approx(float(scores.log_probs[0, i]), abs=1e-3)
        assert sum(found[answer]["tokens"]) == pytest.approx(found[answer]["log_probability"], abs=1e-4)
    lines = run("ask", "--model", folder, red, QUESTION, "--choices", ",".join(CHOICES)).stdout.splitlines()
    assert [line.rsplit(None, 1)[0].strip() for line in lines] == list(found)
    assert [float(line.split()[-1].rstrip("%")) for line in lines] == pytest.approx(
        [100 * row["probability"] for row in found.values()], abs=0.01
    )


def test_an_answer_fits_the_schema(folder, red, schema):
    pytest.importorskip("llguidance", reason="needs the extra structured")
    result = run("ask", "--model", folder, red, QUESTION, "--json-schema", schema)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["colour"] in ("red", "blue")


def test_an_answer_matches_an_expression_or_a_grammar(folder, red, tmp_path):
    pytest.importorskip("llguidance", reason="needs the extra structured")
    (tmp_path / "grammar.lark").write_text('start: "x" ("y" | "z") "w"')
    for options, wanted in (
        (["--regex", "[0-9]{4}"], "[0-9]{4}"),
        (["--grammar", tmp_path / "grammar.lark"], "x[yz]w"),
    ):
        result = run("ask", "--model", folder, red, QUESTION, *options)
        assert result.exit_code == 0, result.stderr
        assert re.fullmatch(wanted, result.stdout.strip())
        (pictures := tmp_path / f"pictures{options[0]}").mkdir()
        picture("red").save(pictures / "red.png")
        arguments = ["--model", folder, "--prompt", QUESTION, pictures, "--output", pictures / "out.jsonl"]
        result = run("caption", *arguments, *options)
        assert result.exit_code == 0, result.stderr
        assert re.fullmatch(wanted, json.loads((pictures / "out.jsonl").read_text())["text"])


def test_captions_fit_the_schema(folder, red, schema, tmp_path):
    pytest.importorskip("llguidance", reason="needs the extra structured")
    (pictures := tmp_path / "pictures").mkdir()
    for name in ("red", "green", "blue"):
        picture(name).save(pictures / f"{name}.png")
    output = tmp_path / "out.jsonl"
    arguments = ["--model", folder, "--prompt", QUESTION, "--output", output, pictures, "--batch-size", 2]
    result = run("caption", *arguments, "--json-schema", schema, "--max-new-tokens", 60)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 3
    assert all(json.loads(row["text"])["colour"] in ("red", "blue") for row in rows)
    schema.write_text(json.dumps({"type": "object"}))
    result = run("caption", *arguments, "--json-schema", schema, "--max-new-tokens", 60)
    assert_refused(result, "was begun with json_schema")
    result = run("caption", *arguments, "--max-new-tokens", 60)
    assert_refused(result, "was begun with json_schema")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--choices", ""], "--choices needs answers with commas between them, got ''."),
        (["--choices", "yes,,no"], "--choices needs answers with commas between them"),
        (["--choices", "yes, yes"], "--choices names an answer twice"),
        (["--json"], "--json prints the probabilities of --choices, which are missing."),
        (["--choices", "yes", "--json-schema", "none.json"], "Give either --choices or --json-schema"),
        (["--json-schema", "none.json"], "none.json"),
        (["--grammar", "none.lark"], "none.lark"),
        (["--choices", "yes", "--regex", "a"], "Give either --choices or --regex, not both"),
        (["--regex", "a", "--json-schema", "a.json"], "--json-schema and --regex cannot be given together"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, red, options, sentence):
    assert_refused(run("ask", "--model", folder, red, QUESTION, *options), sentence)


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever loads the model fails."""
    pytest.importorskip("llguidance", reason="needs the extra structured")
    monkeypatch.setattr("visualrwkv_hf.cli.ask.load_model", None)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--regex", "(a"], "regex parse error: unclosed group"),
        (["--regex", ""], "A regular expression can have 1 to 65536 characters, got 0."),
        (["--grammar", "{}"], 'unknown name: "other"'),
    ],
)
def test_a_form_that_is_wrong_is_refused_before_the_weights_are_read(
    folder, red, tmp_path, options, sentence, no_weights
):
    (tmp_path / "wrong").write_bytes(b"start: other")
    options = [option.format(tmp_path / "wrong") for option in options]
    assert_refused(run("ask", "--model", folder, red, QUESTION, *options), sentence)


def test_a_grammar_that_is_no_text_is_refused_before_the_weights_are_read(folder, red, tmp_path, no_weights):
    (tmp_path / "wrong").write_bytes(b"\xff\xfe")
    result = run("ask", "--model", folder, red, QUESTION, "--grammar", tmp_path / "wrong")
    assert_refused(result, "is no text in UTF-8")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "is no JSON"),
        ("[1]", "must be an object"),
        ('{"type": "integer", "minimum": 2, "maximum": 1}', "No text fits what the answer must look like"),
        ('{"type": "colour"}', "Invalid type: colour"),
    ],
)
def test_a_schema_that_no_answer_fits_is_refused_before_the_weights_are_read(
    folder, red, schema, text, sentence, no_weights
):
    schema.write_text(text)
    assert_refused(run("ask", "--model", folder, red, QUESTION, "--json-schema", schema), sentence)


# --- a tuned state --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A state after which the model answers something else."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    state = TunedState.of(model)
    generator = torch.Generator().manual_seed(0)
    for weight in state.parameters():
        weight.data.normal_(std=1e3, generator=generator)
    state.save_pretrained(target := tmp_path_factory.mktemp("tuned"))
    return target


def test_commands_begin_with_a_tuned_state(folder, tuned, red, tmp_path):
    question = (red, QUESTION, "--choices", "red,no", "--json")
    plain, other = (
        json.loads(run("ask", "--model", folder, *question, *options).stdout)["choices"][0]["tokens"]
        for options in ((), ("--tuned-state", tuned))
    )
    assert plain != other
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    inputs = inputs_of(processor, user(QUESTION, "red"))
    state = TunedState.from_pretrained(tuned, model)
    output = model.generate(**inputs, initial_state=state, max_new_tokens=8, do_sample=False)
    (wanted,) = processor.post_process_image_text_to_text(output, prompt_length=inputs["input_ids"].shape[1])
    (tmp_path / "pictures").mkdir()
    red.rename(tmp_path / "pictures" / "red.png")
    options = ("--prompt", QUESTION, "--max-new-tokens", 8, "--tuned-state", tuned, "--model", folder)
    result = run("caption", tmp_path / "pictures", "--output", tmp_path / "out.jsonl", *options)
    assert result.exit_code == 0, result.stderr
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["text"] == wanted


def test_a_chat_begins_with_a_tuned_state(folder, tuned, red):
    """The first answer and a follow-up, which goes on from the state that was kept."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    chat = Chat(model, processor, max_new_tokens=8, initial_state=TunedState.from_pretrained(tuned, model))
    chat.add_picture(str(red))
    wanted = ["".join(chat.ask(question)) for question in (QUESTION, "And why?")]
    options = ["chat", red, "--model", folder, "--max-new-tokens", 8, "--device", "cpu"]
    lines = f"{QUESTION}\nAnd why?\n"
    result = CliRunner().invoke(app, [*map(str, options), "--tuned-state", str(tuned)], input=lines)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "".join(f"{line}\n" for line in wanted)
    assert CliRunner().invoke(app, [*map(str, options)], input=lines).stdout != result.stdout


@pytest.mark.parametrize("command", ["ask", "chat", "serve"])
def test_a_tuned_state_of_another_model_or_none_is_refused(folder, tuned, red, tmp_path, command):
    if command == "serve":
        pytest.importorskip("uvicorn", reason="needs the extra serve")
    other = save_tiny_model(tmp_path / "other", version=7)

    def refused(model, state):
        given = {"ask": (red, QUESTION, "--model", model), "chat": ("--model", model)}
        return run(command, *given.get(command, (model, "--port", 0)), "--tuned-state", state)

    sentence = "The tuned state is for another model: rwkv_version 6 there, 7 here"
    assert_refused(refused(other, tuned), sentence)
    assert_refused(refused(folder, tmp_path), "There is no tuned_state.safetensors")
    assert_refused(refused(folder, tmp_path / "nowhere"), f"There is no folder {tmp_path / 'nowhere'}.")


@pytest.mark.parametrize("picture", ["data:image/png;base64,AAAA", "A" * 9000, "ftp://example.org/a.png"])
def test_the_name_of_no_picture_is_not_repeated_at_length(folder, picture):
    """It may be a picture's content."""
    result = run("ask", "--model", folder, picture, QUESTION)
    assert_refused(result, "picture")
    assert len(result.stderr) < 300
    assert ("Only http" in result.stderr) == picture.startswith("ftp")
