"""Means over held-out text against full logits, and distinct-n by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import far as tiny

from dft_kernels.evaluation.held_out import distinct, held_out


@pytest.mark.filterwarnings("ignore")
def test_held_out_is_the_models_own() -> None:
    """Means over the tokens of two batches of unlike lengths, against full logits."""
    model, other = tiny(), tiny("Gemma2", final_logit_softcapping=5.0)
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == 7, -100)}
        for ids in (torch.arange(4, 24).view(2, 10), torch.arange(30, 35)[None])
    ]
    given = iter(batches)

    def logits_of(_: Any) -> torch.Tensor:
        batch = next(given)
        return other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    found = held_out(model, batches, logits_of)
    rows = []
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"][:, 1:].reshape(-1)
            log_q, log_p = (m(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1) for m in (model, other))
            log_q, log_p = log_q.reshape(-1, 100)[labels != -100], log_p.reshape(-1, 100)[labels != -100]
            labels = labels[labels != -100]
            ce = -log_q.gather(1, labels[:, None])[:, 0]
            entropy, kl = -(log_q.exp() * log_q).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
            rows.append(torch.stack([ce, entropy, (log_q.argmax(-1) == labels).float(), kl], dim=1))
    expected = torch.cat(rows).mean(0).tolist()
    assert [found.cross_entropy, found.entropy, found.accuracy, found.kl] == pytest.approx(expected, rel=1e-4)
    assert found.tokens == sum(map(len, rows))
    with pytest.raises(ValueError, match="must hold at least one label, got none"):
        held_out(model, [])


def test_distinct() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct([[1]], 2) == 0.0
