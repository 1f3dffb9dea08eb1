"""A teacher behind HTTP: vLLM, SGLang or TRL's server, asked for the log-probabilities of each batch's tokens."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from ..errors import fail
from ..files import shown
from .served_client import Client, Workers
from .served_protocols import ENTRY_BYTES, PROTOCOLS, About, Protocol, Row, WrongReplyError, protocol_of
from .served_rows import Distributions, distributions
from .top_k import TAILS, TopK

Batch = TypeVar("Batch", bound=dict[str, Any])
PROBE = (
    "The quick brown fox jumps over 13 lazy dogs.  Two  spaces,\ttabs\n\nand 1,234,567.89 = 1e-3 + 0x1F; "
    "don't, DON'T; Größe, naïve, Ελλάδα, Привет, 日本語, 한국어, العربية, हिन्दी, 👩‍🚀🎉 "
    "def f(x_1, *y):\n    return {x_1: [y]} != None  # <b>&amp;</b> \\n"
)
_SAMPLED = 64  # tokens of the vocabulary that the probe text has beside it


class _Piece(NamedTuple):
    """A sequence of a batch: its row, the columns of its tokens, and these."""

    row: int
    columns: Tensor
    tokens: tuple[int, ...]


class ServedTeacher:
    """A teacher that a server runs: a function of the batch, as `DFTTrainer` takes it, that returns a `TopK`.

        with ServedTeacher("http://localhost:8000", top_k=64) as teacher:
            DFTTrainer(model, args, teacher, train_dataset=dataset, processing_class=tokenizer).train()

    url: of vLLM (/v1/completions with prompt_logprobs, or its token-in interface), SGLang (/generate) or `trl
        vllm-serve` before TRL 1.14 (/get_sequence_logprobs/); from then on that is vLLM itself.
    top_k: tokens a row, at most what the server gives (vLLM: --max-logprobs). The row's own token, the next one of the
        text, is always among them: where it is not likely enough, in place of the last.
    model: which of the server's; None: its only one.
    api_key: sent to this host alone; None: that of the environment variable DFT_KERNELS_API_KEY, if it is set. It is in
        no error, log, file or repr.
    vocab_size: ids lie below it; None: what `check` is told, else any. protocol: vllm, vllm-tokens (needs vllm serve
        --enable-scale-out), sglang, trl; None: asked of the server.
    tail: of the `TopK`s; "renormalise" for a `Mixture`, or at another temperature than 1.
    prefetch: batches that are asked for ahead of the one in training. connections: requests at a time, one a sequence.
    deadline: seconds that a sequence's answer may take, with all tries: how long a server may be away.

    Called with input_ids [B, T] and optionally attention_mask [B, T] (tokens of 0 are left out) and position_ids [B, T]
    (0 begins another sequence: a pack). Returns a `TopK` of indices, log_probs [B, T, top_k], tail_log_prob [B, T] on
    the ids' device. Row t is the distribution over the sequence's token t + 1; the last row of a sequence and those of
    padding are uniform, and refused where labels or shift_labels of the batch count them. served_rows.py has the rule
    of the tail; `rows` and `flagged` count the rows so far, and those whose tail is known to worse than 10 %.

    Temperature: these servers give prompt log-probabilities at temperature 1 only, so with a bucket the loss's
    teacher_temperature is 1. Precision: the server's dtype. Of vLLM in fp32 SmolLM2's log-probabilities were off by
    1e-5 in the mean, in bf16 by 0.045, a KL of 9e-4 nats.

    Cost: about 4.5 KB of JSON a token at top_k 64, read on threads beside training: about 0.1 ms of one core a token.

    Raises ValueError, naming the request and the row, for a reply that is not one to these tokens, not finite, of ids
    outside of the vocabulary, too long, or no distribution; ConnectionError where none comes within the deadline.
    Either way nothing was returned, so no step has a wrong target.
    """

    def __init__(
        self,
        url: str,
        top_k: int = 64,
        *,
        model: str | None = None,
        api_key: str | None = None,
        vocab_size: int | None = None,
        protocol: str | None = None,
        tail: str = "bucket",
        prefetch: int = 2,
        connections: int = 8,
        deadline: float = 300.0,
    ) -> None:
        for name, value, least in (("top_k", top_k, 1), ("prefetch", prefetch, 0), ("connections", connections, 1)):
            if type(value) is not int or value < least:
                _fail(name, f"be an int of at least {least}", repr(value), "Change it")
        if not 0 < deadline < float("inf"):
            _fail("deadline", "be a number of seconds above 0", repr(deadline), "Change it")
        for name, chosen, known in (("protocol", protocol, (None, *PROTOCOLS)), ("tail", tail, TAILS)):
            if chosen not in known:
                _fail(name, f"be one of {', '.join(map(str, known))}", repr(chosen), "Pick one of these")
        self.top_k, self.vocab_size, self.tail, self.prefetch = top_k, vocab_size, tail, prefetch
        self.rows = self.flagged = 0
        self._model = model
        self._client = Client(url, api_key, deadline, connections)
        self._workers = Workers(connections)
        self._protocol = None if protocol is None else PROTOCOLS[protocol]
        self._about: About | None = None
        self._pending: dict[tuple[int, ...], tuple[Future[Distributions], int]] = {}  # and how many batches ahead
        self._checked: Any = None  # the tokenizer that was

    def __repr__(self) -> str:
        return f"ServedTeacher({self._client.url!r}, top_k={self.top_k})"

    def __enter__(self) -> ServedTeacher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests."""
        self._workers.close()
        self._client.close()

    # ---- the server

    @property
    def url(self) -> str:
        """The server's address."""
        return self._client.url

    @property
    def about(self) -> About:
        """What the server says of itself: `model`, `server`. Asked once."""
        if self._about is None:
            self._about = self._spoken().about(self._client, self._model)
        return self._about

    def _spoken(self) -> Protocol:
        if self._protocol is None:
            self._protocol = protocol_of(self._client)
        return self._protocol

    def check(self, tokenizer: Any = None, vocab_size: int | None = None) -> None:
        """Compare the server with the student, before the first step: its tokenizer, by the ids of a text of words,
        numbers, spaces, scripts, code, special tokens and a sample of the vocabulary; and one request for
        log-probabilities. ValueError where they differ or the server refuses. A server that has no tokenizer to ask,
        or a student that comes without one, is warned of.

        vocab_size: of the student's head, unless one was given before; else the tokenizer's."""
        if self._checked is not None and (tokenizer is None or tokenizer is self._checked):
            return
        trial: Sequence[int] = (1, 2, 3)
        if tokenizer is None:
            _warn(f"no tokenizer is there to compare with {self.url}'s. Give the trainer its processing_class.")
        else:
            trial = self._compare(tokenizer)[:16]
            vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self.vocab_size = vocab_size if self.vocab_size is None else self.vocab_size
        self._score(tuple(trial))
        self._checked = True if tokenizer is None else tokenizer

    def _compare(self, tokenizer: Any) -> list[int]:
        """The probe's ids, which are the server's too where it says."""
        text = probe(tokenizer)
        ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        theirs = self._spoken().tokenized(self._client, text, self.about.model)
        if theirs is None:
            _warn(f"{self.url} ({self.about.server}) has no tokenizer to ask. Check that it is the student's.")
        elif theirs != ours:
            at = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            got = f"{len(theirs)} ids for {len(ours)}"
            if at is not None:
                text = tokenizer.decode([ours[at]])
                got = f"id {shown(theirs[at])} for {ours[at]}, {text!r}, at {at} of the probe text"
            remedy = "Serve a teacher of the student's tokenizer"
            _fail(f"the tokenizer of {self.url}", "be the student's", got, remedy)
        return ours

    # ---- batches

    def __call__(self, inputs: dict[str, Any]) -> TopK:
        """The batch's distributions: those asked for ahead, the others now."""
        ids = inputs["input_ids"]
        pieces = _pieces(inputs)
        _check_labels(inputs, pieces)
        own: list[Future[Distributions]] = []
        futures = []
        for piece in pieces:
            found = self._pending.get(piece.tokens)
            if found is None:
                own.append(self._submit(piece.tokens))
            futures.append(own[-1] if found is None else found[0])
        k = self.top_k
        indices = torch.arange(k).repeat(*ids.shape, 1)
        log_probs = torch.full(indices.shape, -1.0).fill_(-torch.tensor(k + 1.0).log())
        tail = log_probs[..., 0].clone()
        for piece, future in zip(pieces, futures, strict=True):
            try:
                found_rows = future.result()
            except BaseException:
                self._pending.pop(piece.tokens, None)  # another call asks again
                for one in own:
                    one.cancel()
                raise
            at = piece.columns[:-1]
            indices[piece.row, at], log_probs[piece.row, at], tail[piece.row, at] = found_rows[:3]
            self.rows += len(at)
            self.flagged += found_rows.flagged
        indices, log_probs, tail = (one.to(ids.device, non_blocking=True) for one in (indices, log_probs, tail))
        return TopK(indices, log_probs, tail, 1.0, self.tail)

    def ahead(
        self,
        batches: Iterable[Batch],
        asked: Callable[[int, Batch], dict[str, Any] | None] | None = None,
        together: int = 1,
    ) -> Iterator[Batch]:
        """The same batches; the next `prefetch` ones are asked for before each is handed out, and are found by their
        tokens when the teacher is called with them. asked: of a batch's number and the batch, the inputs that the
        teacher will be called with, or None where it will not be; without it, those of every batch. together: so many
        are taken before the first of them is used, as the batches of an accumulated step are."""
        coming, wanted = enumerate(batches), asked or (lambda number, batch: batch)
        held: deque[Batch] = deque()
        begun: deque[list[tuple[int, ...]]] = deque()  # what each batch of `held` asked for, and the `together` before
        try:
            while True:
                while len(held) <= self.prefetch and (item := next(coming, None)) is not None:
                    held.append(item[1])
                    inputs = wanted(*item)
                    begun.append([] if inputs is None else self._begin(inputs))
                if not held:
                    return
                yield held.popleft()
                if len(begun) - len(held) >= together:
                    self._end(begun.popleft())
        finally:
            for sequences in begun:
                self._end(sequences)

    def _begin(self, inputs: dict[str, Any]) -> list[tuple[int, ...]]:
        found = [piece.tokens for piece in _pieces(inputs)]
        for tokens in found:
            future, count = self._pending.get(tokens) or (self._submit(tokens), 0)
            self._pending[tokens] = (future, count + 1)
        return found

    def _end(self, sequences: list[tuple[int, ...]]) -> None:
        for tokens in sequences:
            future, count = self._pending.pop(tokens, (None, 0))
            if future is not None and count > 1:
                self._pending[tokens] = (future, count - 1)
            elif future is not None:
                future.cancel()

    def _submit(self, tokens: tuple[int, ...]) -> Future[Distributions]:
        self._client.check_open()
        self.about  # noqa: B018 - asked on this thread, before there are others that would
        return self._workers.submit(lambda: self._score(tokens))

    def _score(self, tokens: tuple[int, ...]) -> Distributions:
        """One request: the distributions of a sequence's tokens after the first."""
        about, protocol = self.about, self._spoken()
        what = f"{len(tokens)} tokens ({', '.join(map(str, tokens[:4]))}, ...)"
        reply = self._client.ask(
            protocol.path, protocol.request(tokens, self.top_k, about.model), what=what,
            limit=(1 << 20) + len(tokens) * (self.top_k + 1) * ENTRY_BYTES,
        )  # fmt: skip
        try:
            return distributions(self._rows(reply, tokens), tokens, self.top_k, self.vocab_size)
        except WrongReplyError as error:
            name = f"{error.where} of the reply to POST {self.url}{protocol.path} for {what}"
            remedy = f"Look at what {about.server} serves there"
            raise ValueError(f"ServedTeacher: {name} must {error.relation}, got {error.got}. {remedy}.") from None

    def _rows(self, reply: Any, tokens: tuple[int, ...]) -> list[Row]:
        protocol = self._spoken()
        try:
            return list(protocol.rows(reply, tokens, self.about.model))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            got = f"{type(error).__name__}: {str(error)[:80]}"
            raise WrongReplyError("all", f"be what {protocol.name} answers", got) from None


def probe(tokenizer: Any) -> str:
    """A text on which tokenizers differ: `PROBE`, the special tokens, and tokens from all over the vocabulary."""
    count = len(tokenizer)
    sampled = (tokenizer.decode([n * (count - 1) // (_SAMPLED - 1)]) for n in range(_SAMPLED))
    readable = (text for text in sampled if text.strip() and "\ufffd" not in text)
    return "\n".join([PROBE, *tokenizer.all_special_tokens, *readable])


def _pieces(inputs: dict[str, Any]) -> list[_Piece]:
    """The sequences of a batch, of two tokens at least."""
    ids: Tensor = inputs["input_ids"].detach().cpu()
    if ids.ndim != 2:
        _fail("input_ids", "have shape [B, T]", list(ids.shape), "Pass a batch of sequences")
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    for name, one in (("attention_mask", mask), ("position_ids", positions)):
        if one is not None and one.shape not in (ids.shape, (1, ids.shape[1])):
            _fail(name, f"have the shape of input_ids, {list(ids.shape)}", list(one.shape), "Pass one value a token")
    kept = torch.ones_like(ids) if mask is None else mask.detach().cpu().expand_as(ids)
    begins = torch.zeros_like(ids) if positions is None else (positions.detach().cpu() == 0).expand_as(ids).long()
    found = []
    for row in range(len(ids)):
        columns = kept[row].nonzero()[:, 0]
        starts = [at for at in begins[row, columns].nonzero()[:, 0].tolist() if at > 0]
        for part in columns.tensor_split(starts):
            if len(part) > 1:
                found.append(_Piece(row, part, tuple(ids[row, part].tolist())))
    return found


def _check_labels(inputs: dict[str, Any], pieces: list[_Piece]) -> None:
    """Refuse a label whose row no server has: a sequence's first token, after padding or another sequence."""
    target = inputs.get("shift_labels")
    if target is None:
        if inputs.get("labels") is None:
            return
        target = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    left = target.detach().cpu() != -100
    for piece in pieces:
        left[piece.row, piece.columns[:-1]] = False
    if bool(left.any()):
        row, column = left.nonzero()[0].tolist()
        relation = "be -100 for the first token of each sequence, which no distribution of its own stands before"
        remedy = "Pad on the right (tokenizer.padding_side), or mask it"
        _fail("labels", relation, f"{int(target[row, column])} at [{row}, {column + 1}]", remedy)


def _warn(said: str) -> None:
    warnings.warn(f"ServedTeacher: {said}", RuntimeWarning, stacklevel=4)


def _fail(argument: str, relation: str, got: object, remedy: str) -> NoReturn:
    fail("ServedTeacher", argument, relation, got, remedy)
