"""What a model expects, beside its full logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import WORDS, far, tokenizer  # noqa: F401 - a fixture

from dft_kernels.evaluation.reading import read


def test_sums_are_those_of_the_full_logits(tokenizer: Any) -> None:  # noqa: F811
    model = far().train()
    prompts = ["word1 word2", "word3", "word4 word5 word6", "word1"]
    texts = [" word7 word8 word9", " word10", "", " word80 word81 word1 word2 word3"]
    told: list[int] = []
    found = read(model, tokenizer, prompts, texts, batch=2, tick=told.append)
    assert model.training
    assert sum(told) == 4
    model.eval()
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
        first = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            log_q = model(ids).logits[0, :-1].double().log_softmax(-1)
        expected = log_q[first - 1 :]
        assert found.tokens[row] == ids.shape[1] - first
        surprise = -expected.gather(1, ids[0, first:, None]).sum()
        assert found.cross_entropy[row] == pytest.approx(float(surprise), abs=1e-4)
        assert found.entropy[row] == pytest.approx(float(-(expected.exp() * expected).sum()), abs=1e-4)
    some = np.array([0, 3])
    assert found.mean("entropy", some) == pytest.approx(found.entropy[some].sum() / 8)
    assert np.isnan(found.mean("entropy", np.array([2])))
