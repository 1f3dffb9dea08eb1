"""Inputs out of a real model: its hidden states over text, its head, and teachers that nearly agree with it.

Random inputs have a forward KL of about 1 nat, and hide what matters late in a distillation: where teacher and model
agree, q - p is a small difference, and logits rounded to bf16 spoil it. So a teacher here is the same model one step of
SGD later, on other text (its head and embeddings kept), at three distances: its hidden states are moved along the line
from the model's states through the trained ones until the KL is what is wanted. The KL that is said is that of the
rounded tensors, in float64.

All of it is kept in one file in the cache folder, for the processes that measure, and for machines that have no model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import Source
from ..loss.functional import linear_cross_entropy
from ..materials.models import lambada
from ..materials.sources import model_of
from ..models.heads import hidden_states, in_mode, output_layer
from . import problems
from .problems import DISTANCES, Case

RECIPE = "1"  # of the files: another number, other files
WINDOW = 512  # rows of a window of text; its first token has no row before it
STEP = 0.03  # of SGD: one step takes SmolLM2 about 0.1 nats away
SEARCHED = 512  # rows that the search for a distance looks at


class Real(NamedTuple):
    """What a file has: the KL of the teacher at each distance, in float64, and its rows."""

    file: Path
    kl: dict[float, float]
    rows: int


def rows_of(case: Case) -> int:
    """Rows of text in the inputs of a case; where that is fewer than N they repeat."""
    return min(case.shape.n, problems.TEXT_ROWS)


def prepared(case: Case, cache: Path, tell: Callable[[str], None]) -> Real:
    """The file with the inputs of a case, made if it is not in the cache folder."""
    rows = rows_of(case)
    file = cache / "bench" / f"{case.inputs}-{case.dtype}-{rows}.safetensors"
    if not file.exists() or _read(file) is None:
        tell(f"{case.inputs}: its hidden states over {rows} rows of text, teachers at KL {_listed(DISTANCES)}")
        model, tokenizer = model_of(case.inputs, cache, torch.float32)
        _write(file, *tensors(model.to(case.device), tokenizer, lambada(cache), rows, case.torch_dtype))
    found = _read(file)
    assert found is not None
    return found


def tensors(
    model: Any, tokenizer: Any, texts: list[str], rows: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[float, float]]:
    """hidden, weight, target and the teachers' hidden states, by name; the KL of each distance.

    texts: the first are the model's, the last are what the teacher has learnt from."""
    device = model.device
    window = min(WINDOW, rows)
    text = windows(texts, tokenizer, -(-rows // window), window + 1).to(device)
    other = windows(texts[::-1], tokenizer, 1, window + 1).to(device)
    head = output_layer(model).weight
    with in_mode(model, training=False):
        exact = _states(model, text, rows)
        model.requires_grad_(True)
        head.requires_grad_(False)
        linear_cross_entropy(hidden_states(model, other)[0, :-1], head, other[0, 1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=STEP)
                    parameter.grad = None
        moved = _states(model, text, rows) - exact
    hidden, weight = exact.to(dtype), head.detach().to(dtype)
    made = {"hidden": hidden, "weight": weight, "target": text[:, 1:].flatten()[:rows]}
    found = {}
    for distance in DISTANCES:
        teacher = at_distance(hidden, moved, weight, distance)
        made[f"teacher {distance:g}"] = teacher
        found[distance] = kl(hidden, teacher, weight, torch.float64)
    return {name: tensor.contiguous().cpu() for name, tensor in made.items()}, found


def windows(texts: list[str], tokenizer: Any, count: int, length: int) -> Tensor:
    """The first `count` windows [count, length] of the tokens of the texts, each with an end-of-text token behind it;
    from the start again where they are too few."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * length:
            break
    whole = torch.tensor(ids, dtype=torch.int64)
    return whole[torch.arange(count * length) % len(whole)].view(count, length)


def at_distance(hidden: Tensor, moved: Tensor, weight: Tensor, distance: float) -> Tensor:
    """hidden + a * moved in the dtype of `hidden`, with the `a` at which the KL is `distance`, to a hundredth."""
    some = slice(None, None, max(1, len(hidden) // SEARCHED))
    part, step, along = hidden[some], moved[some], 1.0
    for _ in range(20):
        found = kl(part, (part + along * step).to(hidden.dtype), weight, torch.float32)
        if abs(found / distance - 1) < 0.01:
            break
        along *= min(10.0, max(0.1, (distance / max(found, 1e-12)) ** 0.5))  # a KL is about a square
    return (hidden + along * moved).to(hidden.dtype)


@torch.no_grad()
def kl(hidden: Tensor, teacher: Tensor, weight: Tensor, dtype: torch.dtype) -> float:
    """KL(teacher || model), the mean over rows, computed in `dtype`."""
    head = weight.to(dtype).t()
    total = 0.0
    for states, others in zip(hidden.split(128), teacher.split(128), strict=True):
        log_q, log_p = ((x.to(dtype) @ head).log_softmax(-1) for x in (states, others))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(hidden)


@torch.no_grad()
def _states(model: Any, text: Tensor, rows: int) -> Tensor:
    return torch.cat([hidden_states(model, one[None])[0, :-1] for one in text])[:rows]


def _listed(distances: tuple[float, ...]) -> str:
    return ", ".join(f"{distance:g}" for distance in distances)


def _write(file: Path, made: dict[str, Tensor], found: dict[float, float]) -> None:
    import safetensors.torch

    about = {"recipe": RECIPE, **{f"kl {distance:g}": repr(value) for distance, value in found.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    safetensors.torch.save_file(made, partial, metadata=about)
    partial.replace(file)


def _read(file: Path) -> Real | None:
    """What a file has; None where another recipe made it."""
    source = Source("bench", file, "Delete it; it is made again")
    with source.tensors() as opened:
        about = opened.metadata() or {}
        if about.get("recipe") != RECIPE:
            return None
        try:
            found = {distance: float(about[f"kl {distance:g}"]) for distance in DISTANCES}
        except (KeyError, ValueError) as error:
            source.fail("its metadata", "have the KL of each teacher", str(error))
        return Real(file, found, opened.get_slice("hidden").get_shape()[0])
