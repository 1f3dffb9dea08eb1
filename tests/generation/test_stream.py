"""Text as it is drawn: the draws of a seed, whatever else draws; an end, a cancellation, an error; the thread's end."""

from __future__ import annotations

import gc
import threading
from itertools import zip_longest
from typing import Any

import pytest
import torch
from tiny_models import far as tiny
from tiny_models import tokenizer  # noqa: F401 - a fixture
from torch import Tensor
from transformers import LogitsProcessor

from dft_kernels.generation.sampling import Sampling, continuations, roll_out
from dft_kernels.generation.steps import ordered, warpers
from dft_kernels.generation.stream import Stream
from dft_kernels.generation.temperature import Diversity

PROMPTS = [[5, 6, 7], [8]]
LENGTH = 8


class Told(LogitsProcessor):
    """Has a function called at each draw."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.told(input_ids, scores)


class Script(Told):
    """Leaves one token alone at each draw."""

    def __init__(self, tokens: list[int]) -> None:
        left = iter(tokens)
        super().__init__(
            lambda _, scores: torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor(next(left)), 0)
        )


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def drawn(stream: Stream) -> list[list[int]]:
    """The tokens of a stream, of which `drawn` has the same."""
    rows: list[list[int]] = [[] for _ in stream.prompts]
    for step in stream:
        for row, one in zip(rows, step, strict=True):
            row += [] if one is None else [one.token]
    assert rows == [[one.token for one in row] for row in stream.drawn]
    return rows


def rolled(model: Any, steps: list[Any], seed: int, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    found = roll_out(model, prompts, LENGTH, 2, seed, logits_processor=ordered(steps))
    return [[token for token in row if token >= 0] for row in found.target.tolist()]


@pytest.mark.parametrize("steps", [[], [*warpers(0.8, 0.9, 0.01), Diversity(0.1)]], ids=["plain", "steps"])
def test_the_draws_are_those_of_a_roll_out(model: Any, tokenizer: Any, steps: list[Any]) -> None:  # noqa: F811
    state = torch.get_rng_state()
    made = [drawn(Stream(model, tokenizer, PROMPTS, LENGTH, seed, steps)) for seed in (3, 4)]
    assert torch.equal(state, torch.get_rng_state())
    assert made == [rolled(model, steps, seed) for seed in (3, 4)]
    assert made[0] != made[1]


def test_a_token_has_its_entropy_and_distance(model: Any, tokenizer: Any) -> None:  # noqa: F811
    steps = warpers(0.5)
    stream = Stream(model, tokenizer, [[5, 6, 7]], LENGTH, 3, steps)
    ids = [5, 6, 7]
    for (one,) in stream:
        assert one is not None
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        log_q = (own / 0.5).log_softmax(-1)
        assert one.entropy == pytest.approx(float(-(log_q.exp() * log_q).sum()), rel=1e-4, abs=1e-5)
        assert one.kl == pytest.approx(float((log_q.exp() * (log_q - own)).sum()), rel=1e-4, abs=1e-5)
        ids.append(one.token)
    assert {one.kl for one in stream.drawn[0]} != {0.0}
    plain = Stream(model, tokenizer, [[5, 6, 7]], LENGTH, 3)
    assert {one.kl for step in plain for one in step if one is not None} == {0.0}


def test_streams_and_whoever_draws_beside_them(model: Any, tokenizer: Any) -> None:  # noqa: F811
    streams = [Stream(model, tokenizer, PROMPTS, LENGTH, seed) for seed in (3, 4)]
    torch.manual_seed(7)
    seen = []
    for _ in zip_longest(*streams):
        seen.append(float(torch.rand(())))
    assert [[[one.token for one in row] for row in stream.drawn] for stream in streams] == [
        rolled(model, [], 3),
        rolled(model, [], 4),
    ]
    torch.manual_seed(7)
    assert seen == [float(torch.rand(())) for _ in seen]


def test_the_likeliest_tokens(model: Any, tokenizer: Any) -> None:  # noqa: F811
    stream = Stream(model, tokenizer, PROMPTS, LENGTH, greedy=True)
    tokens = drawn(stream)
    greedy = continuations(model, tokenizer, PROMPTS, LENGTH, **Sampling(temperature=0).keywords())
    assert stream.written() == greedy
    assert tokens == [row if len(row) == LENGTH else [*row, 2] for row in greedy]
    assert all(one.entropy == 0 < one.kl for row in stream.drawn for one in row)  # of one token: -log of its share


def test_a_text_ends(model: Any, tokenizer: Any) -> None:  # noqa: F811
    whole = rolled(model, [], 3, [[5], [6]])
    end = next(token for token in whole[0] if token not in whole[1])
    at = whole[0].index(end) + 1
    model.generation_config.eos_token_id = [2, end]
    try:
        stream = Stream(model, tokenizer, [[5], [6]], LENGTH, 3)
        steps = list(stream)
    finally:
        model.generation_config.eos_token_id = 2
    assert [one.token for one in stream.drawn[0]] == whole[0][:at]
    assert [step[0] is None for step in steps] == [number >= at for number in range(len(steps))]
    assert stream.written()[0] == whole[0][: at - 1]
    assert stream.texts()[0].strip() == tokenizer.decode(whole[0][: at - 1])


def test_a_character_is_shown_whole(model: Any) -> None:
    class Bytes:
        eos_token_id = None

        def decode(self, ids: list[int], **_: Any) -> str:
            return b"".join({5: b"a", 6: b"\xc3", 7: b"\xa9"}[one] for one in ids).decode(errors="replace")

    stream = Stream(model, Bytes(), [[5]], 4, steps=[Script([5, 6, 7, 6])])
    shown = []
    for _ in stream:
        shown += stream.texts()
    assert shown == ["a", "a", "aé", "aé"]
    assert stream.texts() == ["aé\ufffd"]  # what is cut off stays so


def test_nothing_is_computed_before_it_is_asked_for(model: Any, tokenizer: Any) -> None:  # noqa: F811
    calls: list[int] = []
    step = Told(lambda ids, scores: calls.append(ids.shape[1]) or scores)
    with Stream(model, tokenizer, [[5, 6]], LENGTH, 3, [step]) as stream:
        assert calls == []
        next(stream)
        assert calls == [2]
        next(stream)
        assert calls == [2, 3]
    assert not stream._thread.is_alive()
    assert list(stream) == []
    assert calls == [2, 3]


def test_a_cancellation_from_another_thread(model: Any, tokenizer: Any) -> None:  # noqa: F811
    """While a token is computed, of which nothing comes."""
    inside, leave = threading.Event(), threading.Event()

    def held(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 3:
            inside.set()
            assert leave.wait(30)
        return scores

    stream = Stream(model, tokenizer, [[5]], LENGTH, 3, [Told(held)])
    canceller = threading.Thread(target=lambda: (inside.wait(30), stream.cancel()))
    canceller.start()
    assert len(list(stream)) == 2
    leave.set()
    canceller.join()
    stream.close()
    assert not stream._thread.is_alive()
    assert len(stream.drawn[0]) == 2
    assert drawn(Stream(model, tokenizer, PROMPTS, LENGTH, 3)) == rolled(model, [], 3)


def test_an_error_is_raised_where_the_stream_is_read(model: Any, tokenizer: Any) -> None:  # noqa: F811
    def failing(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 3:
            raise ValueError("of a step")
        return scores

    stream = Stream(model, tokenizer, [[5]], LENGTH, 3, [Told(failing)])
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(ValueError, match="of a step"):
        next(stream)
    assert list(stream) == []
    stream.close()
    assert not stream._thread.is_alive()


def test_a_stream_that_is_dropped_ends_its_thread(model: Any, tokenizer: Any) -> None:  # noqa: F811
    stream = Stream(model, tokenizer, [[5]], LENGTH, 3)
    next(stream)
    thread = stream._thread
    assert thread.is_alive()
    del stream
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_the_mode_of_the_model_is_left(tokenizer: Any) -> None:  # noqa: F811
    model = tiny().train()
    with Stream(model, tokenizer, [[5]], LENGTH, 3) as stream:
        next(stream)
        assert not model.training
    assert model.training


def test_what_cannot_be_drawn(model: Any, tokenizer: Any) -> None:  # noqa: F811
    for prompts, length, said in (
        ([], 4, "prompts must hold a token, each of them, got an empty one"),
        ([[5], []], 4, "prompts must hold a token"),
        ([[5]], 0, "length must be at least 1, got 0"),
        (
            [[5] * 60],
            5,
            "length must be, with the prompt, at most 64 tokens, the model's positions, got a",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            Stream(model, tokenizer, prompts, length)
    with pytest.raises(ValueError, match="must be in the order"):
        Stream(model, tokenizer, [[5]], 4, steps=[Diversity(0.1), *warpers(0.5)])
    with pytest.raises(ValueError, match="hold no temperature with the likeliest token"):
        Stream(model, tokenizer, [[5]], 4, steps=[Diversity(0.1)], greedy=True)
