"""The kinds of teacher that `DFTTrainer` takes, and how each becomes the `teacher` argument of a loss per batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..errors import fail
from ..models.heads import head_of, hidden_states, output_layer, parted, unwrapped
from ..store.reader import Store
from ..teachers.head import TeacherHead
from ..teachers.mixture import Labels, Mixture
from ..teachers.served import ServedTeacher
from ..teachers.top_k import TopK
from .collators import PROMPTED

# how a packed batch says where its sequences begin; a teacher that is not told would look across
_PACKED = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
STORED = ("sequence", "hidden", "indices", "log_probs", "tail")  # of a store's batch, and no model's


class Running:
    """A causal LM that is run without gradient on every batch: on input_ids, or on teacher_input_ids (whose last
    columns are the input_ids) where the batch has them."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.head = head_of(model)
        self.positions = "position_ids" in inspect.signature(unwrapped(model).base_model.forward).parameters

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> TeacherHead:
        """The teacher's distributions, a row for each of input_ids [B, T]."""
        head = self.head
        assert head.weight is not None
        if PROMPTED[0] in inputs:
            hidden = self._prompted(inputs)
        else:
            more = {name: inputs[name] for name in _PACKED if inputs.get(name) is not None}
            hidden = hidden_states(self.model, inputs["input_ids"], inputs.get("attention_mask"), **more)
        return TeacherHead(hidden, head.weight, head.bias, head.logit_scale, head.softcap)

    def _prompted(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Row P + t of P + T: padded on the right, as principles of P tokens stand before; on the left, as both end
        together."""
        asked, before = request_of(inputs)
        whole, mask = asked["input_ids"], asked["attention_mask"]
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and whole.shape[1] > most:
            got = f"{before} of principles + {whole.shape[1] - before} of the sequence = {whole.shape[1]} tokens"
            _fail(PROMPTED[0], f"fit into the teacher's {most} positions", got, "Shorten one of the two")
        # of learned positions: those of a sequence that nothing pads
        more = {"position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)} if self.positions else {}
        return hidden_states(self.model, whole, mask, **more)[:, before:]


def request_of(inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The inputs that a teacher is asked for, with principles where the batch has them, and how many columns stand
    before those of input_ids."""
    if PROMPTED[0] not in inputs:
        return inputs, 0
    ids, whole = inputs["input_ids"], inputs[PROMPTED[0]]
    before = whole.shape[1] - ids.shape[1]
    own = inputs.get("attention_mask", torch.ones_like(ids)) != 0
    if before < 0 or bool(((whole[:, before:] != ids) & own).any()):
        got = f"{list(whole.shape)} for {list(ids.shape)}, other tokens"
        _fail(PROMPTED[0], "end with the columns of input_ids", got, "Pad both on one side, as PrinciplesCollator")
    return {"input_ids": whole, "attention_mask": inputs.get(PROMPTED[1], torch.ones_like(whole))}, before


def parts_of(teacher: Any, by: str = "DFTTrainer") -> list[Any]:
    """The parts of a mixture, or the teacher alone, each checked to be of a supported kind. by: who takes it."""

    def refuse(relation: str, got: object, remedy: str, kind: type[Exception] = ValueError) -> None:
        fail(by, "teacher", relation, got, remedy, kind)

    mixed = isinstance(teacher, Mixture)
    parts = list(teacher.teachers) if mixed else [] if teacher is None else [teacher]
    for part in parts:
        if isinstance(part, Mixture):
            refuse("be a Mixture of teachers that are not", "a Mixture in it", "Multiply the weights out")
        if isinstance(part, torch.nn.Module) and not hasattr(part, "get_output_embeddings"):
            remedy = "Pass a function of the batch that calls it and returns logits [B, T, V]"
            refuse("be a causal LM of transformers where it is a module", type(part).__name__, remedy, TypeError)
        if not (isinstance(part, Store) or callable(part) or (mixed and isinstance(part, Labels))):
            remedy = "Wrap what does not depend on the batch as a function of it"
            which = "be a Store, a model, a function of the batch, or a Mixture of these and Labels()"
            refuse(which, type(part).__name__, remedy, TypeError)
        if mixed and isinstance(part, Store) and part.contents.kind == "topk":
            remedy = (
                "Keep hidden states, or put lambda batch: dataclasses.replace(store.teacher(batch), "
                'tail="renormalise") in its place, with train_dataset=store and data_collator=store.collate'
            )
            refuse("hold no store of a top k as such in a Mixture, which has no bucket", "one", remedy)
        if mixed and isinstance(part, ServedTeacher) and part.tail != "renormalise":
            relation = "hold served teachers without a bucket in a Mixture, which weighs single tokens"
            refuse(relation, f"tail={part.tail!r}", 'Give ServedTeacher tail="renormalise"')
    if sum(isinstance(part, Store) for part in parts) > 1:
        refuse("hold one Store at most, which gives the batches", "more", "Run the other teachers")
    return parts


def check_fits(teacher: Any, model: Any, by: str = "DFTTrainer") -> None:
    """Refuse a model, or a store of hidden states, of another vocabulary than the model that is trained, or that model
    itself."""
    ours = _vocabulary(model)
    for part in parts_of(teacher, by):
        if isinstance(part, torch.nn.Module) and unwrapped(part) is unwrapped(model):
            remedy = "Load it a second time, or leave the teacher out"
            fail(by, "teacher", "be another model than the one that is trained", "the same", remedy)
        if None not in (ours, theirs := _vocabulary(part)) and theirs != ours:
            remedy = "Take one of the same tokenizer; of a padded head, a store of dft-kernels capture --vocab-size, "
            remedy += "or a function of the batch that returns TeacherHead(..., vocab_size=)"
            fail(by, "teacher", f"have the model's vocabulary of {ours}", f"a vocabulary of {theirs}", remedy)


def _vocabulary(of: Any) -> int | None:
    """The tokens of a model's head, or of a store's; None where there is none to be told, or not all of it here."""
    if isinstance(of, Store):
        return None if of.contents.kind == "topk" else of.contents.vocab_size
    inner = unwrapped(of)
    layer = output_layer(inner) if hasattr(inner, "get_output_embeddings") else None
    return None if layer is None or parted(layer) is not None else len(layer.weight)


def stand_in(teacher: Any, device: torch.device) -> Any:
    """A teacher of one row over two tokens, to check the arguments of a loss before there is a batch."""
    if isinstance(teacher, Mixture):
        parts = [part if isinstance(part, Labels) else stand_in(part, device) for part in teacher.teachers]
        return Mixture(parts, teacher.weights, teacher.kind)
    served = isinstance(teacher, ServedTeacher)
    if served or (isinstance(teacher, Store) and teacher.contents.kind == "topk"):
        half = torch.tensor([0.5], device=device).log()
        index = torch.zeros(1, 1, dtype=torch.int64, device=device)
        temperature, tail = (1.0, teacher.tail) if served else (teacher.contents.temperature, "bucket")
        return TopK(index, half[None], half, temperature, tail)
    return None if teacher is None else torch.zeros(1, 2, device=device)


def asked(teacher: Any, device: torch.device, by: str = "DFTTrainer") -> Callable[[dict[str, Any]], Any] | None:
    """inputs -> `teacher` of `linear_distribution_loss`, [B, T, ...] as input_ids; None of None. by: who asks."""
    if teacher is None:
        return None
    if isinstance(teacher, Store):
        return _stored(teacher, by)
    if isinstance(teacher, torch.nn.Module):
        return Running(teacher, device)
    if isinstance(teacher, ServedTeacher):
        return _served(teacher)
    if not isinstance(teacher, Mixture):
        return teacher  # type: ignore[no-any-return]
    parts = [part if isinstance(part, Labels) else asked(part, device, by) for part in teacher.teachers]

    def mixed(inputs: dict[str, Any]) -> Mixture:
        return Mixture(
            [part if isinstance(part, Labels) else part(inputs) for part in parts],  # type: ignore[misc]
            teacher.weights,
            teacher.kind,
        )

    return mixed


def _served(teacher: ServedTeacher) -> Callable[[dict[str, Any]], TopK]:
    def rows(inputs: dict[str, Any]) -> TopK:
        asked, before = request_of(inputs)
        top = teacher(asked)
        assert top.tail_log_prob is not None
        own = (top.indices[:, before:], top.log_probs[:, before:], top.tail_log_prob[:, before:])
        return TopK(*own, top.temperature, top.tail)

    return rows


def _stored(store: Store, by: str) -> Callable[[dict[str, Any]], Any]:
    def rows(inputs: dict[str, Any]) -> Any:
        if not inputs.keys() >= set(store.contents.names):
            remedy = "Leave train_dataset and data_collator to the store, or collate its items with store.collate"
            which = f"have the store's rows ({', '.join(store.contents.names)})"
            fail(by, "batches", which, f"only {', '.join(inputs)}", remedy)
        return store.teacher(inputs)

    return rows


def check_prompted(teacher: Any) -> None:
    """Refuse teacher_input_ids that nobody, or a store, would be given."""
    parts = parts_of(teacher)
    stored = any(isinstance(part, Store) for part in parts)
    if stored or not any(callable(part) for part in parts):
        got = "a Store, whose rows are there already" if stored else "none that could be run"
        _fail(
            "teacher", "be a model, or a function of the batch, with principles before its sequences", got, "Pass one"
        )


def _fail(argument: str, relation: str, got: object, remedy: str, kind: type[Exception] = ValueError) -> None:
    fail("DFTTrainer", argument, relation, got, remedy, kind)
