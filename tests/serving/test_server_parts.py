"""The server's parts alone: how tokens are chosen, how text is cut, who is next, which variables a template has."""

import asyncio
import threading
from dataclasses import fields

import pytest
import torch
from paths import ROOT
from patience import PATIENCE

from visualrwkv_hf.inference.server_generation import AnswerText, Job, Line, Sampler
from visualrwkv_hf.inference.server_limits import Access, Budget, Limits, Refusal
from visualrwkv_hf.inference.server_requests import Asked, template_variables
from visualrwkv_hf.processing_visualrwkv import release_chat_template

# --- the text of an answer ------------------------------------------------------------------------------


def decode(ids):
    """Ids are bytes."""
    return bytes(ids).decode("utf-8", "replace")


def pieces_of(data, stops=(), strip=True):
    """The pieces of an answer of these bytes, and whether a stop string ended it."""
    text, pieces = AnswerText(decode, stops, strip), []
    for byte in data:
        pieces.append(text.add(byte))
        if text.stopped:
            break
    return [piece for piece in [*pieces, text.end()] if piece], text.stopped


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("answer", ["", " a b ", "\n\n x", "é🙂你", "a \n b", "   "])
def test_pieces_are_the_answer(answer, strip):
    pieces, stopped = pieces_of(answer.encode(), strip=strip)
    assert "".join(pieces) == (answer.strip() if strip else answer)
    assert not stopped
    assert all(piece == piece.strip() or piece.strip() for piece in pieces if strip)


@pytest.mark.parametrize(
    "data", [b"\xff" * 50, b"a\xf0\x9f", b"\xf0" * 9 + "🙂".encode() + b"\xe4", b"\x80x\xff"]
)
def test_bytes_that_are_no_characters_are_what_they_are_in_one_piece(data):
    assert "".join(pieces_of(data, strip=False)[0]) == decode(data)


def test_stop_strings_and_their_beginnings():
    assert pieces_of(b"one two three", ["two"]) == (["o", "n", "e"], True)
    assert "".join(pieces_of(b"one twx three", ["two"])[0]) == "one twx three"
    assert "".join(pieces_of(b"aab", ["ab"])[0]) == "a"
    assert "".join(pieces_of(b"one tw", ["two"])[0]) == "one tw"  # it ends with half of one
    assert "".join(pieces_of(b"x end. y", ["end", ". y"])[0]) == "x"
    assert pieces_of(b"  \n first", ["\n"])[1] is False  # white space before an answer is no part of it
    assert pieces_of("né🙂".encode(), ["🙂"]) == (["n", "é"], True)


def test_a_held_piece_is_not_sent_twice():
    text = AnswerText(decode, ["ababc"], strip=False)
    sent = [text.add(byte) for byte in b"abababc"]
    assert "".join(sent) == "ab" and text.stopped and text.end() == ""


# --- the start ------------------------------------------------------------------------------------------


def test_a_start_that_fails_ends():
    """Another program may bind the same address while the model is loaded, and listen first."""
    from starlette.applications import Starlette

    from visualrwkv_hf.inference.server_connections import bound_socket, make_server

    app = Starlette()
    app.state.line = Line(None, 1)
    first = bound_socket("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = bound_socket("127.0.0.1", port)
    first.listen()
    raised = []

    def run():
        try:
            make_server(app, Limits(), Access()).run([second])
        except OSError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive() and not app.state.line.thread.is_alive()
    assert raised[0].startswith(f"Cannot listen on 127.0.0.1 port {port}: ")
    first.close()
    second.close()


# --- tokens ---------------------------------------------------------------------------------------------


def chosen(scores, answer=(), temperature=0.0, top_p=1.0, **fields):
    """The token that follows `answer`, whose tokens came after a prompt of tokens 0 and 1."""
    sampler = Sampler(Asked("chat", **fields), 2, temperature, top_p)
    return int(sampler(torch.tensor([[0, 1, *answer]]), torch.tensor([scores])).argmax())


def test_penalties_are_openai_s():
    scores = [3.0, 2.0, 1.5, 0.0]
    assert chosen(scores, [0, 0]) == 0
    assert chosen(scores, [0, 0], presence_penalty=0.9) == 0
    assert chosen(scores, [0, 0], presence_penalty=1.1) == 1
    assert chosen(scores, [0, 0], frequency_penalty=0.4) == 0  # 3 - 2 * 0.4 = 2.2
    assert chosen(scores, [0, 0], frequency_penalty=0.6) == 1
    assert chosen(scores, [], presence_penalty=2, frequency_penalty=2) == 0  # the prompt does not count
    assert chosen(scores, [3], presence_penalty=-2, frequency_penalty=-2) == 3


def test_bias_is_added_and_wakes_no_forbidden_token():
    assert chosen([3.0, 2.0, 1.0], bias={0: -100, 1: -100}) == 2
    assert chosen([3.0, 2.0, float("-inf")], bias={2: 100}) == 0


def test_samples_follow_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampler = Sampler(Asked("chat", seed=0), 0, 0.7, 1.0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[int(sampler(torch.tensor([[0]]), scores).argmax())] += 1
    # Five standard deviations of a share of 4000 draws are below 0.04.
    torch.testing.assert_close(counts / 4000, torch.softmax(scores[0] / 0.7, -1), atol=0.04, rtol=0)


def test_top_p_leaves_the_most_probable_tokens():
    scores = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25])).tolist()
    for top_p, kept in ((0.0, {1}), (0.49, {1}), (0.6, {1, 3}), (0.8, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        assert {chosen(scores, temperature=1.0, top_p=top_p, seed=seed) for seed in range(200)} == kept


def test_a_seed_gives_the_same_tokens_and_leaves_torch_s_own_random_numbers():
    scores = torch.zeros(1, 50)
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def drawn(seed):
        sampler = Sampler(Asked("chat", seed=seed), 0, 1.0, 1.0)
        return [int(sampler(torch.tensor([[0]]), scores).argmax()) for _ in range(5)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)
    assert torch.equal(state, torch.get_rng_state())


# --- who is next ----------------------------------------------------------------------------------------


def line_of(jobs, waiting=8):
    """What a line does of jobs that all wait while its first one is held, in its order."""
    done, held = [], threading.Event()

    async def run():
        line = Line(lambda job: (held.wait(), done.append(job.asked)), waiting)
        first = Job("first", [], "nobody")
        line.join(first)
        while line._waiting:
            await asyncio.sleep(0.01)
        try:
            for client, name in jobs:
                line.join(Job(name, [], client))
            held.set()
            while len(done) <= len(jobs):
                await asyncio.sleep(0.01)
        finally:
            held.set()
            line.close()
            line.thread.join(PATIENCE)

    asyncio.run(run())
    return done[1:]


def test_clients_take_turns():
    jobs = [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]
    assert line_of(jobs) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_line_that_is_full_refuses_and_one_client_may_fill_half_of_it():
    with pytest.raises(Refusal, match="Too many requests wait") as refused:
        line_of([("a", n) for n in range(5)])
    assert refused.value.status == 503
    with pytest.raises(Refusal, match="Too many requests wait"):
        line_of([(str(n), n) for n in range(9)])


class Panic(BaseException):
    """As a library in Rust raises it."""


def test_a_job_that_fails_or_leaves_does_not_hold_the_others():
    def work(job):
        if job.asked == "panic":
            raise Panic
        if job.asked == "bad":
            raise RuntimeError("broken")
        if job.asked == "refused":
            raise ValueError("not\nlike this")
        job.put(job.asked)

    async def run():
        line = Line(work, 8)
        jobs = [Job(name, [], "a") for name in ("panic", "bad", "refused", "good")]
        for job in jobs:
            line.join(job)
        events = [await asyncio.wait_for(job.events.get(), PATIENCE) for job in jobs]
        gone = Job("gone", [], "a")
        line.leave(gone)
        assert await gone.events.get() is None
        line.close()
        with pytest.raises(Refusal, match="stopping"):
            line.join(gone)
        return events

    panic, bad, refused, good = asyncio.run(run())
    for failed in (panic, bad):
        assert (failed.status, str(failed)) == (500, "The answer failed. The server's log says why.")
    assert (refused.status, str(refused)) == (400, "not like this.")
    assert good == "good"


# --- what is allowed ------------------------------------------------------------------------------------


def test_the_variables_of_our_template_are_found_with_their_types():
    assert template_variables(release_chat_template("middle")) == {
        "image_position": str,
        "sandwich_history": bool,
    }


@pytest.mark.parametrize(
    "host, allowed",
    [
        *[
            (host, True)
            for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "my.org:1")
        ],
        *[
            (host, False)
            for host in (
                "",
                "evil.org",
                "evil.org:8000",
                "localhost.evil.org",
                "127.0.0.1.evil.org",
                "my.org.evil.org",
            )
        ],
    ],
)
def test_names_of_the_server(host, allowed):
    assert Access(allowed_hosts=("My.org",)).allows_host(host) is allowed
    assert Access(allowed_hosts=("*",)).allows_host(host)


def test_a_budget_is_taken_and_given_back():
    budget = Budget(10)
    budget.take(5, "one")
    budget.take(3, "other")
    with pytest.raises(Refusal, match="busy") as refused:
        budget.take(3, "third")
    assert refused.value.status == 503
    budget.give_back(5, "one")
    assert budget.take(5, "one") == 5


def test_a_client_can_have_half_of_the_budget():
    budget = Budget(10)
    budget.take(4, "one")
    with pytest.raises(Refusal, match="Your other requests are large") as refused:
        budget.take(2, "one")
    assert refused.value.status == 503
    assert budget.take(5, "other") == 5
    budget.give_back(4, "one")
    assert budget.take(5, "one") == 5 and budget.taken == {"one": 5, "other": 5}


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "9", None, True])
def test_limits_are_positive_numbers(value):
    with pytest.raises(ValueError, match="pictures must be a number above 0"):
        Limits(pictures=value)


def test_the_docs_list_every_limit_and_its_default():
    page = (ROOT / "docs/serving.md").read_text("utf-8")
    for limit in fields(Limits):
        default = f"{limit.default:,}".removesuffix(".0")
        row = f"| `--max-{limit.name.replace('_', '-')}` | {default} | {limit.metadata['help'].rstrip('.')} |"
        assert row in page


def test_api_keys_can_be_sent():
    for key in ("", "two words", "schlüssel", "a\n"):
        with pytest.raises(ValueError, match="printable ASCII"):
            Access(api_keys=(key,))


def test_the_variables_of_a_strangers_template_are_read_or_left_out():
    template = (
        "{% set a = a | default('x') %}{% set b = b | default %}{% set c = c | default(d) %}{% set e = 1 %}"
    )
    assert template_variables(template) == {"a": str}
