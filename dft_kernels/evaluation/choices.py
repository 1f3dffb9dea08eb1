"""How likely a model finds what may follow a context, without logits [B, T, V].

    log p(choice | context) = sum_t log q(c_t | context, c_1 .. c_(t-1))

over the choice's tokens c, which are told apart as lm-evaluation-harness does it: context and choice are encoded as one
text, and what is beyond the length of the context's own encoding is the choice's; whitespace at the end of a context is
the choice's, as is the space between them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ..errors import fail
from ..loss.functional import linear_distribution_loss
from ..models.heads import head_of, hidden_states, in_mode, output_layer, projection, unwrapped

IGNORED = -100
_PROBE = 12  # tokens


class Answer(NamedTuple):
    """Of question `number`: each choice's log-likelihood, and whether all of its tokens are the likeliest."""

    number: int
    log_likelihoods: list[float]
    greedy: list[bool]


class _Asked(NamedTuple):
    """Choices of a question, by their numbers, after one context: token ids."""

    number: int
    context: list[int]
    choices: dict[int, list[int]]


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: Any, questions: Sequence[tuple[str, Sequence[str]]], batch_tokens: int = 8192
) -> Iterator[list[Answer]]:
    """Answers to (context, choices), batch by batch, in the order in which they come out.

    model, tokenizer: of transformers; texts are encoded as the tokenizer does by default, with its BOS. The model is in
    eval mode while it computes.
    batch_tokens: tokens of a batch at most, contexts repeated and padding included.

    Contexts of one batch are of one length, so that nothing is masked. The choices of a question share its context's
    keys and values, where the model's forward takes a cache and gives what it gives without one. What is too long for
    the model loses its beginning, as in the harness; ValueError for a choice that is too long alone, that is of no
    token, or whose log-likelihood is NaN.

    Cost: one forward pass over the contexts, and one over the choices, and the head's product for the choices' tokens
    alone: of ARC's tokens a third, of HellaSwag's half of what the choices one by one would take. Log-likelihoods are
    those of full logits but for rounding: of lm-eval 0.4.13's, within 1e-5 of their size on SmolLM2 in fp32.
    """
    with in_mode(model, False):
        head, layer = head_of(model, adapted=True), output_layer(model)
        cache = _cache_argument(model, layer)
    asked = [
        part
        for n, (context, choices) in enumerate(questions)
        for part in _encoded(model, tokenizer, n, context, choices)
    ]
    open_: dict[int, dict[int, tuple[float, bool]]] = {}
    for batch in _batches(asked, batch_tokens):
        with in_mode(model, False):
            scored = _scored(model, head, layer, cache, batch)
        done = []
        for part, found in zip(batch, scored, strict=True):
            answers = open_.setdefault(part.number, {})
            answers |= dict(zip(part.choices, found, strict=True))
            if len(answers) == len(questions[part.number][1]):
                both = [answers[choice] for choice in range(len(answers))]
                done.append(Answer(part.number, [one for one, _ in both], [right for _, right in both]))
                del open_[part.number]
        if done:
            yield done


def _encoded(model: Any, tokenizer: Any, number: int, context: str, choices: Sequence[str]) -> list[_Asked]:
    """The parts of a question: one, or, where choices leave less room for the context, one for each of its lengths."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    kept = context.rstrip()
    between = f"{context[len(kept) :]} "
    before = tokenizer(kept, verbose=False)["input_ids"]
    if not before:
        fail("retention", f"context {number}", "hold a token", repr(context), "Leave the question out")
    parts: dict[int, _Asked] = {}
    for choice, text in enumerate(choices):
        ids = tokenizer(f"{kept}{between}{text}", verbose=False)["input_ids"][len(before) :]
        if not 0 < len(ids) <= most:
            relation = f"be of 1 to {most} tokens" if most < math.inf else "be of tokens"
            fail("retention", f"choice {choice} of question {number}", relation, len(ids), "Leave the question out")
        length = int(min(len(before), most + 1 - len(ids)))  # the last token of all is not read
        part = parts.setdefault(length, _Asked(number, before[len(before) - length :], {}))
        part.choices[choice] = ids
    return list(parts.values())


def _batches(asked: Sequence[_Asked], tokens: int) -> Iterator[list[_Asked]]:
    """Batches of contexts of one length, the longest first, with choices of like lengths."""

    def longest(part: _Asked) -> int:
        return max(map(len, part.choices.values()))

    batch: list[_Asked] = []
    rows = width = 0
    for part in sorted(asked, key=lambda one: (-len(one.context), -longest(one), one.number)):
        more = rows + len(part.choices)
        if batch and (len(part.context) != len(batch[0].context) or more * width > tokens):
            yield batch
            batch, more = [], len(part.choices)
        if not batch:
            width = len(part.context) + longest(part)
        batch.append(part)
        rows = more
    if batch:
        yield batch


def _scored(
    model: Any, head: Any, layer: Any, cache: str | None, batch: Sequence[_Asked]
) -> list[list[tuple[float, bool]]]:
    """log-likelihood and greedy of each choice of each part, whose contexts are of one length P."""
    device = layer.weight.device
    context = torch.tensor([part.context for part in batch], device=device)  # [B, P]
    rows = [(at, ids) for at, part in enumerate(batch) for ids in part.choices.values()]
    owner = torch.tensor([at for at, _ in rows], device=device)  # [R]
    width = max(len(ids) for _, ids in rows)
    labels = torch.tensor([[*ids, *[IGNORED] * (width - len(ids))] for _, ids in rows], device=device)  # [R, S]
    # the token before predicts; the padding behind a choice is read by none of its tokens
    suffix = torch.cat([context[owner, -1:], labels[:, :-1].clamp_min(0)], 1)
    hidden = _hidden(model, context[:, :-1], suffix, owner, cache)
    _, found = linear_distribution_loss(
        hidden,
        target=labels,
        **projection(layer, hidden),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        ignore_index=IGNORED,
        reduction="none",
        return_metrics=("log_prob", "correct"),
    )
    sums = found.log_prob.double().sum(1)  # 0 where ignored
    if bool(sums.isnan().any()):
        question = batch[rows[int(sums.isnan().int().argmax())][0]].number
        fail("retention", "model", "give log-likelihoods", f"NaN at question {question}", "Look at its weights")
    right = (found.correct | (labels == IGNORED)).all(1)
    lowest = -1e300  # for -inf, which JSON has not
    each = iter(zip(sums.clamp_min(lowest).tolist(), right.tolist(), strict=True))
    return [[next(each) for _ in part.choices] for part in batch]


def _hidden(model: Any, context: Tensor, suffix: Tensor, owner: Tensor, cache: str | None) -> Tensor:
    """Hidden states [R, S, H] of suffixes [R, S], each after its context [owner] of [B, P]."""
    whole = suffix.new_ones(suffix.shape[0], context.shape[1] + suffix.shape[1])  # the mask: of all
    if cache is None or context.shape[1] == 0 or len(context) == len(suffix):
        return hidden_states(model, torch.cat([context[owner], suffix], 1), whole)[:, context.shape[1] :]
    kept = transformers.DynamicCache(config=unwrapped(model).config)
    hidden_states(model, context, torch.ones_like(context), **{cache: kept})
    kept.batch_select_indices(owner)
    return hidden_states(model, suffix, whole, **{cache: kept})


def _cache_argument(model: Any, layer: Any) -> str | None:
    """The name by which the model's forward takes a cache; None where it takes none, or where the cache of a context
    cannot be shared, or changes what comes behind it. Tried, since models have caches of many kinds."""
    takes = inspect.signature(unwrapped(model).forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in takes), None)
    if name is None:
        return None
    ids = (torch.arange(2 * _PROBE, device=layer.weight.device) % layer.weight.shape[0]).view(2, _PROBE)
    context, suffix = ids[:1, : _PROBE // 2], ids[:, _PROBE // 2 :]
    owner = torch.zeros(2, dtype=torch.int64, device=ids.device)
    expected = _hidden(model, context, suffix, owner, None)
    try:
        found = _hidden(model, context, suffix, owner, name)
    except Exception:
        return None
    if found.shape != expected.shape:
        return None
    error = (found - expected).double().norm() / expected.double().norm().clamp_min(1e-30)
    return name if bool(error < 8 * torch.finfo(expected.dtype).eps ** 0.75) else None
