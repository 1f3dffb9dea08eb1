"""Text of a model's own: the draws of a seed, and nothing of padding or of torch's random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import far as tiny
from tiny_models import tokenizer  # noqa: F401 - a fixture

from dft_kernels.generation.sampling import continuations, text_after


@pytest.mark.filterwarnings("ignore")
def test_continuations_are_the_seeds(tokenizer: Any) -> None:  # noqa: F811
    model, state = tiny(), torch.get_rng_state()
    prompts = [[5, 6, 7], [8]]
    first = continuations(model, tokenizer, prompts, 6, seed=3)
    assert first == continuations(model, tokenizer, prompts, 6, seed=3)
    assert first != continuations(model, tokenizer, prompts, 6, seed=4)
    assert all(len(ids) <= 6 and 2 not in ids for ids in first)
    assert torch.equal(state, torch.get_rng_state())
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    (alone,) = continuations(model, tokenizer, [[8]], 6, **greedy)
    assert continuations(model, tokenizer, prompts, 6, **greedy)[1] == alone  # padding is no context


@pytest.mark.filterwarnings("ignore")
def test_a_text_ends_at_any_end_of_the_model(tokenizer: Any) -> None:  # noqa: F811
    model = tiny()
    whole = continuations(model, tokenizer, [[5, 6, 7]] * 8, 12, seed=3)
    token = whole[0][4]
    model.generation_config.eos_token_id = [2, token]
    for long, short in zip(whole, continuations(model, tokenizer, [[5, 6, 7]] * 8, 12, seed=3), strict=True):
        assert token not in short
        assert short == long[: len(short)]


def test_a_text_keeps_the_space_before_it() -> None:
    """A tokenizer of pieces drops a leading space where it decodes them alone."""

    class Pieces:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f" {'abcdefgh'[one]}" for one in ids).lstrip()

    assert text_after(Pieces(), [0, 1], [2, 3]) == " c d"
    assert text_after(Pieces(), [], [2, 3]) == "c d"
