"""Text of a model's own: the draws of a seed, and nothing of padding or of torch's random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import far as tiny
from tiny_models import tokenizer  # noqa: F401 - a fixture

from dft_kernels.generation.sampling import DRAWN, Sampling, continuations, own_settings, text_after


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


OWN = {  # of a generation_config: a value, and which of transformers' processors it makes
    "min_p": (0.2, "MinPLogitsWarper"), "top_p": (0.5, "TopPLogitsWarper"), "top_k": (5, "TopKLogitsWarper"),
    "temperature": (0.5, "TemperatureLogitsWarper"), "typical_p": (0.9, "TypicalLogitsWarper"),
    "epsilon_cutoff": (0.01, "EpsilonLogitsWarper"), "eta_cutoff": (0.01, "EtaLogitsWarper"),
    "top_h": (0.5, "TopHLogitsWarper"), "repetition_penalty": (1.5, "RepetitionPenaltyLogitsProcessor"),
    "no_repeat_ngram_size": (3, "NoRepeatNGramLogitsProcessor"), "suppress_tokens": ([9], "SuppressTokensLogits"),
    "min_length": (4, "MinLengthLogitsProcessor"), "min_new_tokens": (4, "MinNewTokensLengthLogitsProcessor"),
    "remove_invalid_values": (True, "InfNanRemoveLogitsProcessor"), "guidance_scale": (2.0, "UnbatchedClassifierFree"),
    "forced_eos_token_id": (2, "ForcedEOSTokenLogitsProcessor"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("name", OWN)
def test_a_models_own_setting_is_said_where_it_is_applied(
    name: str,
    temperature: float,
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, made = tiny(), []
    value, processor = OWN[name]
    setattr(model.generation_config, name, value)
    build = model._get_logits_processor
    monkeypatch.setattr(model, "_get_logits_processor", lambda *a, **b: made.append(build(*a, **b)) or made[-1])
    continuations(model, tokenizer, [[5, 6, 7]], 2, **Sampling(temperature=temperature).keywords())
    applied = any(type(one).__name__.startswith(processor) for one in made[0])
    assert (name in own_settings(model, greedy=temperature == 0)) == applied
    assert applied or name in {"min_p", "top_p", "top_k", "temperature", *DRAWN}


@pytest.mark.filterwarnings("ignore")
def test_settings_of_no_effect_are_not_said(tokenizer: Any) -> None:  # noqa: F811
    """What a call sets in their place, what beams alone read, and what leaves nothing out."""
    model = tiny()
    plain, before = continuations(model, tokenizer, [[5, 6, 7], [8]], 6, seed=3), own_settings(model)
    for name, value in {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2, "typical_p": 1.0,
                        "return_dict_in_generate": True, "max_new_tokens": 1}.items():  # fmt: skip
        setattr(model.generation_config, name, value)
    assert continuations(model, tokenizer, [[5, 6, 7], [8]], 6, seed=3) == plain
    assert own_settings(model) == before


def test_a_text_keeps_the_space_before_it() -> None:
    """A tokenizer of pieces drops a leading space where it decodes them alone."""

    class Pieces:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f" {'abcdefgh'[one]}" for one in ids).lstrip()

    assert text_after(Pieces(), [0, 1], [2, 3]) == " c d"
    assert text_after(Pieces(), [], [2, 3]) == "c d"
