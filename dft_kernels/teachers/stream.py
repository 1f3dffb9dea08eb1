"""Teachers that call back into Python while the loss runs: chunks of logits from anywhere, read ahead on a thread
and copied on a side stream."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .contract import DenseTarget, Head, Request, Source

_Item = tuple[Tensor, "torch.cuda.Event | None"] | BaseException | None  # None: the source ended where it should
_JOIN_SECONDS = 10.0  # how long a closing reader waits for a source that does not return


class LogitStream(Source):
    """Chunks of teacher logits from anywhere: disk, pinned host memory, a server. O(chunk) memory.

    source: an iterator (or iterable) of tensors [r, V] that covers all N rows of the flattened problem in
        order, chunk sizes free; or a callable `rows -> logits`, given the original row indices of a chunk
        (int64 on the CPU, ascending, ignored rows left out) and returning [len(rows), V].
    prefetch: chunks read ahead on a background thread through a bounded queue (at least 1).

    Tensors may be of any floating dtype, on the CPU (pinned and copied on a side stream for CUDA problems) or
    already on the problem's device. Values of CPU chunks are checked before the copy: a row with NaN, with
    +inf or with nothing but -inf is refused by its number; of CUDA chunks only shape and dtype. The source
    runs under `torch.no_grad()` on its own thread. An iterator serves one call, and none that has to
    recompute logits in backward (`reduction="none"`, statistics); a callable serves any.
    """

    def __init__(self, source: Iterable[Tensor] | Callable[[Tensor], Tensor], prefetch: int = 2) -> None:
        super().__init__()
        self.source = source
        self.prefetch = prefetch
        self.spent = False  # whether a one-shot source was already read

    @property
    def replayable(self) -> bool:
        """Whether the targets of the same rows can be read twice."""
        return callable(self.source)

    @contextmanager
    def open(self, request: Request) -> Generator[Iterator[DenseTarget]]:
        """Chunks read ahead on a thread that ends with the context, on an error too."""
        self.spent = True
        reader = _Reader(self, request)
        try:
            yield reader.targets()
        finally:
            reader.close()


class _Reader:
    """The thread behind a `LogitStream`: pulls, checks, uploads, and hands over through a bounded queue."""

    def __init__(self, stream: LogitStream, request: Request) -> None:
        self.source, self.rows, self.vocab = stream.source, request.rows, request.vocab
        self.whole, self.own = request.total, slice(request.start, request.start + request.vocab)
        self.device = device = request.device
        self.blocks = [  # original rows of each block, on the host
            torch.arange(b.start, b.stop) if b.index is None else b.index.cpu() for b in request.blocks
        ]
        self.queue: queue.Queue[_Item] = queue.Queue(stream.prefetch)
        self.stopped = threading.Event()
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.begun = torch.cuda.current_stream(device).record_event() if self.side else None
        self.thread = threading.Thread(target=self._run, name="dft_kernels.LogitStream", daemon=True)
        self.thread.start()

    def targets(self) -> Iterator[DenseTarget]:
        for _ in self.blocks:
            item = self.queue.get()
            assert item is not None
            if isinstance(item, BaseException):
                raise item
            logits, ready = item
            if ready is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(ready)
                logits.record_stream(current)
            yield DenseTarget(logits, Head())
        end = self.queue.get()  # the source is checked for rows beyond the last block
        if isinstance(end, BaseException):
            raise end

    def close(self) -> None:
        self.stopped.set()
        self.thread.join(_JOIN_SECONDS)
        if self.thread.is_alive():
            warnings.warn(
                f"LogitStream: the source did not return within {_JOIN_SECONDS:.0f} s of the loss being abandoned; "
                "its daemon thread is left to it.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _run(self) -> None:
        chunks = self._replay(self.source) if callable(self.source) else self._gather(self.source)
        try:
            with torch.no_grad(), torch.cuda.stream(self.side):  # type: ignore[arg-type]  # None: no-op
                if self.side is not None and self.begun is not None:
                    self.side.wait_event(self.begun)
                for logits in chunks:
                    if self.device.type == "cuda" and logits.device.type == "cpu":
                        logits = logits.pin_memory()
                    copy = logits.to(self.device, non_blocking=True)
                    if not self._hand_over((copy, self.side.record_event() if self.side else None)):
                        return
            self._hand_over(None)
        except BaseException as error:  # handed to the training thread, which raises it
            self._hand_over(error)
        finally:
            chunks.close()

    def _hand_over(self, item: _Item) -> bool:
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _replay(self, source: Callable[[Tensor], Tensor]) -> Generator[Tensor]:
        """A callable source: one call a block."""
        for block in self.blocks:
            first, last = int(block[0]), int(block[-1])
            with _naming_rows(first, last):
                logits = source(block)
            yield self._checked(logits, first, last, block)

    def _gather(self, source: Iterable[Tensor]) -> Generator[Tensor]:
        """An iterator source: its chunks, cut and joined to the blocks; ignored rows are dropped here."""
        iterator = iter(source)
        first, chunk = 0, torch.empty(0, self.vocab)  # the chunk at hand and its first row
        try:
            for block in self.blocks:
                pieces, last = [], int(block[-1])
                while True:
                    inside = block[(block >= first) & (block < first + chunk.shape[0])] - first
                    if inside.numel():
                        whole = inside.numel() == chunk.shape[0]
                        pieces.append(chunk if whole else chunk.index_select(0, inside.to(chunk.device)))
                    if first + chunk.shape[0] > last:
                        break
                    first, chunk = self._next(iterator, first + chunk.shape[0])
                yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            while first + chunk.shape[0] < self.rows:  # trailing ignored rows
                first, chunk = self._next(iterator, first + chunk.shape[0])
            with _naming_rows(self.rows, self.rows):
                beyond = next(iterator, None)
            if beyond is not None:
                raise ValueError(
                    f"LogitStream: source must end after {self.rows} rows, got another chunk of shape "
                    f"{_shape(beyond)} at row {self.rows}. Give the loss exactly the rows of this batch."
                )
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    def _next(self, iterator: Iterator[Tensor], first: int) -> tuple[int, Tensor]:
        with _naming_rows(first, self.rows - 1):
            chunk = next(iterator, None)
        if chunk is None:
            raise ValueError(
                f"LogitStream: source must cover all {self.rows} rows, got {first} and then its end. Yield logits "
                "for every row of hidden in order, ignored rows included."
            )
        return first, self._checked(chunk, first, self.rows - 1, None)

    def _checked(self, chunk: object, first: int, last: int, index: Tensor | None) -> Tensor:
        """A chunk's own columns; a wrong one is refused by row number, before it is copied anywhere. index: the rows
        asked for, if any."""
        count = None if index is None else index.numel()
        where = f"LogitStream: the chunk that starts at row {first}"
        if not isinstance(chunk, Tensor):
            raise TypeError(f"{where} must be a tensor of logits, got {type(chunk).__name__}. Return torch tensors.")
        whole = chunk.ndim == 2 and chunk.shape[1] == self.whole
        if (
            chunk.ndim != 2
            or (chunk.shape[1] != self.vocab and not whole)
            or (count is not None and chunk.shape[0] != count)
        ):
            want = f"[{'r' if count is None else count}, {self.vocab}]"
            raise ValueError(
                f"{where} must have shape {want}, got {_shape(chunk)}. Slice a padded vocabulary explicitly; "
                "return one row of logits for each row asked for."
            )
        if count is None and not 0 < chunk.shape[0] <= last + 1 - first:
            raise ValueError(
                f"{where} must hold 1 to {last + 1 - first} rows (up to row {last}), got {chunk.shape[0]}. Give the "
                "loss exactly the rows of this batch."
            )
        if not chunk.is_floating_point():
            raise TypeError(f"{where} must have a floating dtype, got {chunk.dtype}. Pass logits, not ids.")
        if chunk.device.type == "cpu":
            top = chunk.amax(dim=-1) if chunk.shape[1] else chunk.new_zeros(len(chunk))
            bad = ~torch.isfinite(top)  # NaN anywhere, +inf anywhere, or -inf everywhere
            if self.whole is not None and not whole:  # of a part of the vocabulary, which may be masked
                bad &= top != -torch.inf
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"LogitStream: row {int(index[row]) if index is not None else first + row} must have logits "
                    f"without NaN or +inf and not all -inf, got a maximum of {float(chunk[row].amax())}. Check what "
                    "wrote this row."
                )
        elif chunk.device.type != self.device.type:
            raise ValueError(
                f"{where} must be on the CPU or on {self.device}, got {chunk.device}. Move it before it is yielded."
            )
        return chunk[:, self.own] if whole else chunk


@contextmanager
def _naming_rows(first: int, last: int) -> Generator[None]:
    """Raise a source's exception as the cause of one that names the rows."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"LogitStream: the source failed for rows {first}..{last}: {type(error).__name__}: {error}"
        ) from error


def _shape(chunk: object) -> str:
    return str(list(chunk.shape)) if isinstance(chunk, Tensor) else type(chunk).__name__
