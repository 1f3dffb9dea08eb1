"""A served teacher in a trainer: compared with the student before the first step, and asked ahead of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from ..teachers.served import ServedTeacher
from .teaching import parts_of, request_of


def serve(trainer: Any, teacher: Any, by: str, matches: Callable[[int], bool] = lambda step: True) -> None:
    """Have a Trainer's batches asked for ahead of its steps, by every served teacher among the parts of `teacher`.
    matches: whether the teacher is asked in an optimiser step."""
    served = [part for part in parts_of(teacher, by) if isinstance(part, ServedTeacher)]
    if served:
        ahead = _Ahead(trainer, served, matches)
        trainer.get_batch_samples = ahead.get_batch_samples
        trainer.add_callback(ahead)


class _Ahead(transformers.TrainerCallback):
    """Stands between a Trainer and the iterator of its batches."""

    def __init__(self, trainer: Any, served: list[ServedTeacher], matches: Callable[[int], bool]) -> None:
        self.trainer, self.served, self.matches = trainer, served, matches
        self.get = trainer.get_batch_samples
        self.batches: Iterator[Any] | None = None
        self.ahead: list[Iterator[Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare the student with the servers."""
        vocab = self.trainer.accelerator.unwrap_model(self.trainer.model).config.get_text_config().vocab_size
        for teacher in self.served:
            teacher.check(self.trainer.processing_class, vocab)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let go of what was asked for and is not needed."""
        self._close()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Trainer's, of batches that are asked for ahead."""
        if self.batches is not epoch_iterator:
            self._close()
            self.batches = epoch_iterator
            first, each = self.trainer.state.global_step, self.trainer.args.gradient_accumulation_steps

            def asked(number: int, batch: dict[str, Any]) -> dict[str, Any] | None:
                return request_of(batch)[0] if self.matches(first + number // each) else None

            together = each + sum(one.prefetch + 1 for one in self.served[1:])  # each reads from the one before
            for teacher in self.served:
                self.ahead.append(teacher.ahead(self.ahead[-1] if self.ahead else epoch_iterator, asked, together))
        return self.get(self.ahead[-1], num_batches, device)

    def _close(self) -> None:
        for batches in reversed(self.ahead):
            batches.close()  # type: ignore[attr-defined]  # a generator
        self.ahead, self.batches = [], None


@contextmanager
def naming(function: str, argument: str) -> Iterator[None]:
    """A served teacher's errors as those of the argument that named it."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = str(error).removeprefix("ServedTeacher: ")
        raise type(error)(f"{function}: {argument}: {said}") from error
