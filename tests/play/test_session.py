"""What a visitor may ask for, and what they have of it: their own texts, in their turn, until they cancel."""

from __future__ import annotations

import json
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest

from dft_kernels.commands import main as cli
from dft_kernels.generation.settings import Settings
from dft_kernels.generation.stream import Stream
from dft_kernels.play.session import (
    CANCELLED,
    CHARACTERS,
    DONE,
    LONGEST,
    MOST_WAITING,
    WAITING,
    WRITING,
    Served,
    Session,
    Turns,
)
from dft_kernels.targets import target_file

PROMPT = "The cat sat ."


def ask(served: Served, prompt: str = PROMPT, **more: Any) -> Any:
    (name,) = served.rulers
    given = {"length": 12, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "diversity": 0.0}
    return served.ask(prompt, **{**given, "style": name, "target": name, **more})


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "Stream"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": ""}, "prompt must hold a word, got an empty one. Write how a text begins."),
        ({"prompt": " \n\t"}, "prompt must hold a word, got an empty one."),
        ({"prompt": None}, "prompt must hold a word, got an empty one."),
        ({"prompt": "cat " * 505}, "prompt must have, with the new tokens, at most 512 tokens, the model's positions, "
                                   "got a sequence of 517. Shorten it, or ask for fewer tokens."),
        ({"length": 0}, "length must be a whole number in 1..256, got 0."),
        ({"length": 257}, "length must be a whole number in 1..256, got 257."),
        ({"length": 1.5}, "length must be a whole number in 1..256, got 1.5."),
        ({"length": None}, "length must be a whole number in 1..256, got None."),
        ({"length": float("nan")}, "length must be a whole number in 1..256, got nan."),
        ({"seed": -1}, "seed must be a whole number in 0..4294967295, got -1."),
        ({"seed": 1 << 32}, "seed must be a whole number in 0..4294967295, got 4294967296."),
        ({"style": "/etc/passwd"}, "style must be one of "),
        ({"target": "literary"}, "target must be one of "),
        ({"gamma": "1"}, "gamma must be a number in -2..2, got '1'."),
        ({"temperature": None}, "temperature must be a number in 0..2, got None."),
        ({"temperature": -1.0}, "temperature must be a number in 0..2, got -1.0."),
        ({"temperature": 0.0, "diversity": 0.1}, "steps must hold no temperature with the likeliest token"),
        ({"bound": float("inf")}, "bound must be a number in 0..1, got inf."),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(served: Served, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        ask(served, **given)
    assert said in str(raised.value)


def test_a_huge_prompt_is_not_tokenized(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "tokenizer", None)
    with pytest.raises(ValueError, match="prompt must have at most 100,000 characters, got 100,001"):
        ask(served, "c" * (CHARACTERS + 1))


def test_the_longest_text_leaves_room_for_a_prompt(served: Served, tokenizer: Any, target: Any, file: str) -> None:
    assert served.longest == 256
    from tiny_models import far

    long = Served({"long": far(max_position_embeddings=1 << 14)}, tokenizer, {file: target})
    assert long.longest == LONGEST


def test_the_defaults_leave_the_model_as_it_is(served: Served) -> None:
    asked = ask(served)
    assert asked.settings == (Settings(), Settings())
    assert asked.steps == ([], [])
    assert ask(served, temperature=0).settings[0] == Settings(temperature=0)


def settled(served: Served, **more: Any) -> Any:
    """With every step in use."""
    steps = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "top_n_sigma": 3, "diversity": 0.2, "gamma": 0.5}
    return ask(served, **steps, bound=0.1, **more)


def test_both_texts_are_those_of_streams(served: Served, model: Any, tokenizer: Any) -> None:
    asked, session = settled(served, seed=3), Session()
    assert [len(one) for one in asked.steps] == [0, 7]
    states = []
    for _ in session.write(served, asked):
        states.append((session.state, *(len(one.drawn) for one in session.written)))
    assert states[0] == (WRITING, 0, 0)
    assert all(abs(first - second) <= 1 or first < 12 for _, first, second in states)
    assert session.state == DONE
    for one, settings in zip(session.written, asked.settings, strict=True):
        with Stream(model, tokenizer, [asked.ids], 12, 3, settings.steps(tokenizer)) as stream:
            list(stream)
        assert one.drawn == stream.drawn[0]
        assert one.text == stream.texts()[0]
    plain, shifted = session.written
    assert plain.kl == 0
    assert shifted.kl > 0
    assert threads() == []
    assert served.turns._line == []


def test_a_base_has_the_settings_too(model: Any, tokenizer: Any, target: Any, file: str) -> None:
    from tiny_models import far

    base = far(vocab_size=len(tokenizer), max_position_embeddings=512)
    served = Served({"base": base, "tiny": model.train()}, tokenizer, {file: target}, base="base", style_base=file)
    assert not model.training
    assert served.sides == ["base", "tiny"]
    asked, session = ask(served, min_p=0.1), Session()
    assert asked.settings == (Settings(min_p=0.1),) * 2
    list(session.write(served, asked))
    assert all(one.drawn for one in session.written)
    assert "--base base" in served.command_line(asked)
    assert "--compare" not in served.command_line(asked)


def test_cancelling_ends_at_the_next_token(served: Served) -> None:
    session = Session()
    going = session.write(served, ask(served, length=200))
    for _ in range(4):
        next(going)
    before = [len(one.drawn) for one in session.written]
    session.cancel()
    list(going)
    assert session.state == CANCELLED
    assert all(len(one.drawn) <= count + 1 for one, count in zip(session.written, before, strict=True))
    assert threads() == []
    list(session.write(served, ask(served)))
    assert session.state == DONE


def test_who_leaves_gives_the_turn_up(served: Served) -> None:
    going = Session().write(served, ask(served, length=200))
    next(going)
    next(going)
    assert threads() == ["Stream"] * 2
    going.close()
    assert threads() == []
    assert served.turns._line == []


def test_two_visitors_have_each_their_own_and_one_waits(served: Served) -> None:
    first, second = Session(), Session()
    one = first.write(served, ask(served, length=20, seed=1))
    next(one)
    other = second.write(served, ask(served, "It was late .", length=20, seed=2))
    next(other)
    assert (second.state, second.before, first.state) == (WAITING, 1, WRITING)
    assert [written.drawn for written in second.written] == [[], []]
    list(one)
    next(other)
    assert second.state == WRITING
    list(other)
    texts = [[written.text for written in mine.written] for mine in (first, second)]
    assert texts[0] != texts[1]
    alone = Session()
    list(alone.write(served, ask(served, length=20, seed=1)))
    assert [written.text for written in alone.written] == texts[0]


def test_who_waits_may_cancel(served: Served) -> None:
    first, second = Session(), Session()
    one, other = first.write(served, ask(served)), second.write(served, ask(served))
    next(one)
    next(other)
    second.cancel()
    list(other)
    assert second.state == CANCELLED
    assert first.state == WRITING
    list(one)
    assert first.state == DONE


def test_who_leaves_while_waiting_leaves_the_line(served: Served) -> None:
    first, second, third = (Session() for _ in range(3))
    going = [one.write(served, ask(served)) for one in (first, second, third)]
    for one in going:
        next(one)
    assert third.before == 2
    going[1].close()
    next(going[2])
    assert third.before == 1
    list(going[0])
    list(going[2])
    assert (first.state, third.state) == (DONE, DONE)
    assert served.turns._line == []


def test_a_text_at_a_time(served: Served) -> None:
    session = Session()
    going = session.write(served, ask(served))
    next(going)
    with pytest.raises(ValueError, match="the text before must be finished, got one that is being written"):
        next(session.write(served, ask(served)))
    assert session.state == WRITING
    list(going)


def test_a_failing_model_fails_its_visitor_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    session, asked = Session(), ask(served)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(served.by_side[0], "generate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(session.write(served, asked))
    assert served.turns._line == []
    list(session.write(served, asked))
    assert session.state == DONE


def test_the_line_is_in_order_and_has_an_end() -> None:
    turns = Turns()
    places = [turns.enter() for _ in range(MOST_WAITING + 1)]
    assert [turns.before(one) for one in places] == list(range(MOST_WAITING + 1))
    with pytest.raises(ValueError, match=f"visitors who wait must be fewer than {MOST_WAITING}, got {MOST_WAITING}"):
        turns.enter()
    turns.leave(places[1])
    assert [turns.before(places[at]) for at in (0, 2)] == [0, 1]


def test_the_pair_as_json_lines(served: Served, tokenizer: Any, model: Any) -> None:
    session = Session()
    assert session.jsonl(served) == ""
    list(session.write(served, settled(served, seed=5)))
    lines = [json.loads(line) for line in session.jsonl(served).splitlines()]
    assert len(lines) == 2
    for line, written in zip(lines, session.written, strict=True):
        assert (line["model"], line["prompt"], line["text"], line["seed"]) == ("tiny", PROMPT, written.text, 5)
        assert line["tokens"] == len(written.drawn)
        values = {**line["settings"], "style": line["settings"]["style"] and tuple(line["settings"]["style"])}
        with Stream(
            model, tokenizer, [tokenizer(PROMPT)["input_ids"]], line["length"], 5, Settings(**values).steps(tokenizer)
        ) as again:
            list(again)
        assert again.texts() == [line["text"]]


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_writes_the_same(
    model: Any, folder: Path, tokenizer: Any, target: Any, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = Served({str(folder): model}, tokenizer, {file: target}, style_base=file)
    session, asked = Session(), settled(served, prompt='The cat\'s "$HOME" ; ` sat', seed=7)
    list(session.write(served, asked))
    words = shlex.split(served.command_line(asked))
    assert words[:2] == ["dft-kernels", "sample"]
    assert cli.main([*words[1:], "--out", str(tmp_path / "pair.jsonl")]) == 0
    capsys.readouterr()
    assert (tmp_path / "pair.jsonl").read_text() == session.jsonl(served)


def test_distances_are_of_the_chosen_target(served: Served, tokenizer: Any, target: Any, file: str) -> None:
    session = Session()
    assert session.distances(served) == []
    list(session.write(served, ask(served, length=100)))
    columns = session.distances(served)
    assert len(columns) == 2
    of = {one.label: one for one in columns[0]}
    assert of["token frequencies, L2"].ratio is not None
    assert target_file.load(file).about.name == "made"
