"""What `capture` stores of a served teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import fail
from ..store.fingerprint import tokenizer_fingerprint
from ..store.manifest import Contents
from ..teachers.served import ServedTeacher


def served_contents(
    teacher: ServedTeacher, tokenizer: Any, kind: str, temperature: float, masked: bool, name: str
) -> Contents:
    """The metadata of a store of its distributions: the server's model by name, program and version; the weights'
    fingerprint is not known. name: of the model, where the server has none. The tokenizers are compared."""
    if kind != "topk":
        _fail("kind", "be 'topk' of a served teacher, which gives no hidden states", repr(kind), "Pass 'topk'")
    if temperature != 1.0:
        _fail("temperature", "be 1.0, the servers' own", temperature, "Leave it")
    if teacher.tail != "bucket":
        _fail("tail", "be 'bucket' of what is stored", repr(teacher.tail), "Leave it")
    teacher.check(tokenizer)
    about = teacher.about
    assert teacher.vocab_size is not None
    return Contents(
        kind=kind,
        vocab_size=teacher.vocab_size,
        width=teacher.top_k,
        model=about.model or name or "unnamed",
        model_sha256=None,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        masked=masked,
        server=about.server,
    )


def served_rows(
    teacher: ServedTeacher, batches: Iterable[Sequence[Tensor]], contents: Contents
) -> Iterator[list[tuple[Tensor, ...]]]:
    """The stored rows of each sequence of each batch, the next batches asked for ahead. A sequence's last row, which no
    label has, is uniform."""
    for inputs in teacher.ahead(map(_padded, batches)):
        top = teacher(inputs)
        assert top.tail_log_prob is not None
        counts = inputs["attention_mask"].sum(1).tolist()
        columns = (top.indices.to(contents.dtype("indices")), top.log_probs.to(torch.bfloat16), top.tail_log_prob)
        yield [tuple(column[row, :count] for column in columns) for row, count in enumerate(counts)]


def _padded(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(one) for one in sequences])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def _fail(argument: str, relation: str, got: object, remedy: str) -> NoReturn:
    fail("capture", argument, relation, got, remedy)
