"""What a model expects while it reads what people wrote: whether there is anything for terms on human text to close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from effect_arms import TERMS

from dft_kernels.loss.functional import shift_labels
from dft_kernels.models.heads import head_of, hidden_states, output_layer, projection
from dft_kernels.targets import target_file
from dft_kernels.terms import noise_floor
from dft_kernels.terms.run import exact
from dft_kernels.training.target_terms import terms_of


@torch.no_grad()
def expected(model: Any, tokenizer: Any, target: Path, text: str, length: int, count: int) -> dict[str, float]:
    """J of the study's terms, by name, in floors: of what the model expects of the next tokens of `count` sequences of
    `text`, evenly over it, over the mean of what as much of the text itself comes to (`noise_floor`). Below 1, the
    text says no better what `target` is than the model does."""
    head, layer = head_of(model), output_layer(model)
    terms = terms_of(target_file.load(target), [f"{name}=1" for name in TERMS], len(layer.weight))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[: len(ids) // length * length].view(-1, length)
    some = ids[torch.linspace(0, len(ids) - 1, count).long()]
    hidden = torch.cat([hidden_states(model.eval(), each) for each in some.split(8)])
    given = {**projection(layer, hidden), "logit_scale": head.logit_scale, "softcap": head.softcap}
    found = exact(hidden, target=shift_labels(some), term=terms, input_ids=some, **given).terms
    floor = noise_floor(terms, ids, shift_labels(ids), count * (length - 1))
    return {name: float(value) / its for name, value in found.items() if (its := floor[name])}
