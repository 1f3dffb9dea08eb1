"""Human texts are cut at tokens as they stand, one passage of a text before a second, and dealt at random."""

from __future__ import annotations

from typing import Any

import pytest
from target_texts import documents

from dft_kernels.evaluation.people import cut, people


def test_passages_stand_in_their_texts(tokenizer: Any) -> None:
    texts = documents(30)
    made = people(texts, tokenizer, 5, 20, 10)
    assert len(made.reference) == len(made.control) == 10
    homes = []
    for passage in made.all:
        (home,) = (at for at, text in enumerate(texts) if passage.prompt + passage.text in text)
        homes.append(home)
        assert len(tokenizer(passage.prompt)["input_ids"]) == 5
        assert len(tokenizer(passage.text)["input_ids"]) == 20
    assert len(set(homes)) == 20  # texts enough: one of each


def test_a_second_passage_of_a_text_comes_after_the_first_of_all(tokenizer: Any) -> None:
    texts = documents(6)
    made = people(texts, tokenizer, 2, 8, 8)
    homes = [next(at for at, text in enumerate(texts) if one.prompt + one.text in text) for one in made.all]
    assert sorted(map(homes.count, range(6))) in ([2, 2, 3, 3, 3, 3], [2, 3, 3, 3, 3, 2])


def test_the_seed_says_which(tokenizer: Any) -> None:
    texts = documents(40)
    one, same, other = (people(texts, tokenizer, 5, 20, 10, seed) for seed in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256


def test_too_little_text_is_said_with_what_there_is(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"human must hold 200 passages of 25 tokens, .* got \d+\. Name more text"):
        people(documents(5), tokenizer, 5, 20, 100)
    with pytest.raises(ValueError, match="got 0"):
        people([""], tokenizer, 5, 20, 100)


def test_a_text_is_cut_where_a_token_ends(tokenizer: Any) -> None:
    assert cut("The cat sat.  The dog", tokenizer, 4) == "The cat sat."
    assert cut("The cat", tokenizer, 4) == "The cat"
    assert cut("", tokenizer, 4) == ""
