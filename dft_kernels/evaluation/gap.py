"""How far a model's writing lies from a target, before anything is trained: on human prefixes and on its own.

Two readings, since they disagree: cross-entropy has already matched most histograms on human text, and what is left
opens up where the model reads itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dtypes import sparse_matrix
from ..generation.sampling import continuations
from ..loss.functional import linear_distribution_statistics, shift_labels
from ..models.heads import head_of, hidden_states, output_layer, projection
from ..targets import corpus, distances
from ..targets.comparison import between
from ..targets.target import Target

CLOSED = 1.5  # a distance up to so many floors is noise: nothing to close
OWN, FORCED = "own text", "human prefixes"


@dataclass(frozen=True)
class Gap:
    """One statistic: reading OWN or FORCED; value: the model's distance; floor: what human writing of the same
    size lies off by."""

    reading: str
    statistic: str
    value: float
    floor: float

    @property
    def ratio(self) -> float:
        """value / floor, inf over a floor of 0."""
        return self.value / self.floor if self.floor else float("inf") if self.value else 0.0


def windows(texts: Sequence[str], tokenizer: Any, prompt: int, length: int, count: int, seed: int = 0) -> Tensor:
    """`count` human passages [count, prompt + length], each the beginning of a text, drawn without repetition.
    ValueError where the texts have not as many."""
    long, size = [], prompt + length
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    for number in order:
        ids = tokenizer(texts[number], add_special_tokens=False, verbose=False)["input_ids"]
        long += [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
        if len(long) >= count:
            return torch.tensor(long[:count])
    raise ValueError(
        f"windows: texts must hold {count} passages of {size} tokens, got {len(long)}. Name more text, or lower "
        "--count, --prompt or --length."
    )


def native(
    model: Any,
    tokenizer: Any,
    passages: Tensor,
    prompt: int,
    *,
    seed: int = 0,
    batch: int = 16,
    tick: Callable[[int], None] | None = None,
    name: str = "model",
    source: str = "",
    **sampling: Any,
) -> Target:
    """The statistics of the model's continuations of human prompts [N, prompt + length]: what a style vector leads
    from. sampling: `generate`'s keywords; plain sampling at temperature 1 by default. tick: told of prompts as they
    are gone on from."""
    length, written = passages.shape[1] - prompt, []
    for number, some in enumerate(passages[:, :prompt].split(batch)):
        written += continuations(model, tokenizer, some.tolist(), length, seed + number, **sampling)
        if tick is not None:
            tick(len(some))
    return _counted(written, tokenizer, name, source)


def own_text(found: Target, tokenizer: Any, target: Target, passages: Tensor, prompt: int) -> list[Gap]:
    """Distances between `target` and what `native` counted, statistic by statistic; the floor is the distance of the
    human continuations of the same prompts."""
    own = between(target, found)
    human = between(target, _counted(passages[:, prompt:].tolist(), tokenizer, "human", ""))
    return [Gap(OWN, name, value, human[name]) for name, value in own.items() if name in human]


def _counted(rows: list[list[int]], tokenizer: Any, name: str, source: str) -> Target:
    texts = [tokenizer.decode(ids) for ids in rows]
    return corpus.build([text for text in texts if text.strip()], tokenizer, name=name, source=source, whole=False)


@torch.no_grad()
def human_prefixes(
    model: Any, target: Target, passages: Tensor, *, batch: int = 8, tick: Callable[[int], None] | None = None
) -> list[Gap]:
    """What the model expects after human prefixes [N, T] against what stands there, on the same rows: no sampling on
    the model's side. With q_n its distribution after prefix n, y_n the token that follows, means over all rows:

        unigram        L2 and TV of mean q_n and the frequencies of y_n
        sentence end   abs(mean <q_n, e> - mean e(y_n)), e = sentence_end; the same of each punctuation class, summed
        calibration    abs(mean H(q_n) - mean -log q_n(y_n)), nats

    floor: half of the mean distance between random halves of the passages (of y, for calibration of the difference):
    what means over as many rows are off by. tick: told of passages as they are read.
    """
    head, layer, training = head_of(model, adapted=True), output_layer(model), model.training
    vocab, device = layer.weight.shape[0], layer.weight.device
    phi = _features(target, vocab).to(device)
    means, seen, differences = torch.zeros(vocab, dtype=torch.float64), [], []
    model.eval()
    try:
        for ids in passages.to(device).split(batch):
            hidden = hidden_states(model, ids)
            labels = shift_labels(ids)
            found = linear_distribution_statistics(
                hidden, target=labels, features=phi, **projection(layer, hidden),
                logit_scale=head.logit_scale, softcap=head.softcap,
            )  # fmt: skip
            rows = slice(0, ids.shape[1] - 1)
            means += len(ids) * found.mean_probability[0].double().cpu()
            assert found.features is not None
            assert found.log_prob is not None
            seen.append(found.features[:, rows].double().mean(1).cpu())
            differences.append((found.entropy + found.log_prob)[:, rows].double().mean(1).cpu())
            if tick is not None:
                tick(len(ids))
    finally:
        model.train(training)
    tokens = passages[:, 1:]
    table = phi.cpu().double().to_dense()
    own, of_text = torch.cat(seen), table[tokens].mean(1)  # [N, 1 + K]
    model_mean, difference = means / len(passages), torch.cat(differences)
    counts = torch.zeros(len(passages), vocab, dtype=torch.float32).scatter_add_(1, tokens, torch.ones(tokens.shape))
    share = counts.double().mean(0) / tokens.shape[1]

    per_row = counts.double() / tokens.shape[1]
    return [
        Gap(FORCED, "unigram, L2", distances.l2(model_mean, share), _floor(per_row, distances.l2)),
        Gap(FORCED, "unigram, TV", distances.total_variation(model_mean, share),
            _floor(per_row, distances.total_variation)),
        Gap(FORCED, "sentence end, rate", _l1(own[:, :1].mean(0), of_text[:, :1].mean(0)), _floor(of_text[:, :1], _l1)),
        Gap(FORCED, "punctuation, rates", _l1(own[:, 1:].mean(0), of_text[:, 1:].mean(0)), _floor(of_text[:, 1:], _l1)),
        Gap(FORCED, "entropy less cross-entropy", abs(float(difference.mean())), _floor(difference[:, None], _l1)),
    ]  # fmt: skip


def _l1(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum())


def _floor(values: Tensor, distance: Callable[[Tensor, Tensor], float], splits: int = 16) -> float:
    """Half of the mean distance between the means [.] of random halves of passages [N, .]."""
    generator, middle, total = torch.Generator().manual_seed(0), len(values) // 2, 0.0
    for _ in range(splits):
        order = torch.randperm(len(values), generator=generator)
        total += distance(values[order[:middle]].mean(0), values[order[middle : 2 * middle]].mean(0))
    return total / splits / 2


def _features(target: Target, vocab: int) -> Tensor:
    """[V, 1 + K] sparse: the share of a token's occurrences that end a sentence, and its punctuation classes."""
    end = target["sentence_end"]
    token, kind = target["punctuation_features"].long().T
    classes = target["punctuation_rate"].shape[0]
    index = torch.cat([torch.stack([torch.arange(len(end)), torch.zeros(len(end), dtype=torch.int64)]),
                       torch.stack([token, kind + 1])], 1)  # fmt: skip
    values = torch.cat([end, torch.ones(len(token))])
    return sparse_matrix(index, values, (vocab, 1 + classes)).coalesce()


def verdict(gaps: list[Gap]) -> list[str]:
    """What there is to close, and what not, in words."""
    lines = []
    for reading in (FORCED, OWN):
        some = [gap for gap in gaps if gap.reading == reading]
        wide = sorted((gap for gap in some if gap.ratio > CLOSED), key=lambda gap: -gap.ratio)
        if not wide:
            lines.append(f"{reading}: nothing to close: no statistic is {CLOSED:g} times its floor.")
            continue
        named = ", ".join(f"{gap.statistic} ({gap.ratio:.1f})" for gap in wide)
        lines.append(f"{reading}: {len(wide)} of {len(some)} above {CLOSED:g} times their floor: {named}.")
    return lines
