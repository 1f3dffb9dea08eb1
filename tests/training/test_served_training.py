"""A served teacher in the trainers: the steps of a local one with the same tokens, also where the server is killed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stand_in_server import StandIn, TinyModel
from tiny_models import WORDS, far, tiny, word_tokenizer
from training_runs import batch_of, config, curve, locally, random_rows, teacher

from dft_kernels import Labels, Mixture, ServedTeacher, TopK
from dft_kernels.teachers import served_client
from dft_kernels.teachers.served_client import KEY
from dft_kernels.training.collators import PrinciplesCollator
from dft_kernels.training.trainer import DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
ROWS = random_rows(9, 4, 12, 7, 5, 12, 3)
ITEMS = [{"input_ids": row} for row in ROWS]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_client, "BACKOFF", (0.005, 0.02))
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn(TinyModel(teacher())) as one:
        yield one


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return batch_of([item["input_ids"] for item in items], "right")


def trained(tmp_path: Path, given: Any, collator: Any = collate, **options: Any) -> DFTTrainer:
    trainer = DFTTrainer(
        tiny(), config(tmp_path, **options), given, train_dataset=ITEMS, data_collator=collator  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    return trainer


def test_steps_are_those_of_the_local_teacher(server: StandIn, tmp_path: Path) -> None:
    """Accumulated batches, the last of an epoch alone, two epochs; each sequence is asked for once an epoch."""
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "hard_weight": 0.2}
    with ServedTeacher(server.url, 5, prefetch=2) as given:
        served = trained(tmp_path, given, **options)
        assert len(server.scored) == 1 + 2 * len(ROWS)  # the check's
        assert not given._pending
        assert given.rows == 2 * sum(len(row) - 1 for row in ROWS)
    local = trained(tmp_path, locally(teacher()), **options)
    for name in ("loss", "grad_norm", "soft_loss", "hard_loss", "teacher_agreement"):
        assert curve(served, name) == pytest.approx(curve(local, name), rel=2e-4)
    assert served.state.global_step == 4


def test_requests_are_ahead_of_the_steps(server: StandIn, tmp_path: Path) -> None:
    begun: list[int] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            until = time.monotonic() + 20
            wanted = 1 + min(2 * (len(begun) + 3), len(ROWS))
            while len(server.scored) < wanted:
                assert time.monotonic() < until
                time.sleep(0.002)
            begun.append(len(server.scored))

    with ServedTeacher(server.url, 5, prefetch=2) as given:
        options = config(tmp_path, max_steps=-1, num_train_epochs=1)
        DFTTrainer(tiny(), options, given, train_dataset=ITEMS, data_collator=collate, callbacks=[Watch()]).train()
    assert begun == [7, 8, 8, 8]  # the check, then three batches of two


def test_steps_that_do_not_match_ask_for_nothing(server: StandIn, tmp_path: Path) -> None:
    with ServedTeacher(server.url, 5) as given:
        trained(tmp_path, given, max_steps=4, matching_every=2)
        assert len(server.scored) == 1 + 2 + 1  # of the last step, the epoch's odd sequence


@pytest.mark.parametrize("side", ["right", "left"])
def test_principles_stand_before_what_is_asked(side: str, server: StandIn, tmp_path: Path) -> None:
    collator = PrinciplesCollator([7, 40, 11], padding_side=side)
    whole = []

    def wanted(inputs: dict[str, Any]) -> TopK:
        both = {"input_ids": inputs["teacher_input_ids"], "attention_mask": inputs["teacher_attention_mask"]}
        top = locally(teacher())(both)
        before = both["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        assert top.tail_log_prob is not None
        return TopK(*(one[:, before:] for one in (top.indices, top.log_probs, top.tail_log_prob)))

    with ServedTeacher(server.url, 5) as given:
        for one in (given, wanted):
            whole.append(curve(trained(tmp_path, one, collator, max_steps=3)))
        assert all(body["prompt"][:3] == [7, 40, 11] for body in server.scored[1:])
    assert whole[0] == pytest.approx(whole[1], rel=2e-4)


def test_a_mixture_takes_what_has_no_bucket(server: StandIn, tmp_path: Path) -> None:
    with ServedTeacher(server.url, 5, tail="renormalise") as given:
        mixed = Mixture([given, teacher(), Labels()], [0.5, 0.4, 0.1])
        assert all(value > 0 for value in curve(trained(tmp_path, mixed, max_steps=2)))
        assert len(server.scored) == 1 + len(ROWS)
        trained(tmp_path, given, max_steps=1, teacher_temperature=2.0)
        with ServedTeacher(server.url, 7, tail="renormalise", prefetch=1) as another:
            server.requests.clear()
            trained(tmp_path, Mixture([given, another], [0.5, 0.5]), max_steps=4, per_device_train_batch_size=1)
            assert len(server.scored) <= 1 + 2 * len(ROWS)  # none twice
    with ServedTeacher(server.url, 5) as bucket:
        with pytest.raises(ValueError, match="teacher must hold served teachers without a bucket in a Mixture"):
            trained(tmp_path, Mixture([bucket, Labels()], [0.5, 0.5]))
        with pytest.raises(ValueError, match=r"teacher_temperature must be 1\.0, at which this TopK was captured"):
            trained(tmp_path, bucket, temperature=2.0)


def test_another_tokenizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    theirs, ours = word_tokenizer(words), word_tokenizer([*words[:20], *words[:19:-1]])
    with StandIn(TinyModel(far(), theirs)) as server, ServedTeacher(server.url, 5) as given:
        for tokenizer in (ours, theirs):
            trainer = DFTTrainer(
                far(), config(tmp_path, max_steps=1), given, train_dataset=ITEMS, data_collator=collate,
                processing_class=tokenizer,
            )  # fmt: skip
            if tokenizer is ours:
                with pytest.raises(ValueError, match=r"the tokenizer of http://\S+ must be the student's, got id"):
                    trainer.train()
                assert (trainer.state.global_step, server.scored) == (0, [])
        trainer.train()
        assert given.vocab_size == 100  # of the head, not of the tokenizer


# ---- killed


class Kept(transformers.TrainerCallback):
    """The parameters after each step."""

    def __init__(self) -> None:
        self.after: dict[int, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after[state.global_step] = flat(model)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([one.detach().flatten().clone() for one in model.parameters()])


def disturbed(
    tmp_path: Path, moments: list[int], absence: float | None, deadline: float
) -> tuple[DFTTrainer, Kept, Any]:
    """A run whose server is killed at these requests; absence: seconds until it is back, None: never."""
    model, kept, count, lock = TinyModel(teacher()), Kept(), 0, threading.Lock()

    def answer(path: str, body: Any) -> tuple[int, Any]:
        nonlocal count
        with lock:
            count += body is not None
            dies = body is not None and count in moments
        if dies:
            server.kill()
            if absence is not None:
                threading.Timer(absence, server.start).start()
        return model(path, body)

    error = None
    with StandIn(answer) as server, ServedTeacher(server.url, 5, deadline=deadline, prefetch=2) as given:
        trainer = DFTTrainer(
            tiny(), config(tmp_path, max_steps=12, logging_steps=50), given, train_dataset=ITEMS, data_collator=collate,
            callbacks=[kept],
        )  # fmt: skip
        try:
            trainer.train()
        except ConnectionError as found:
            error = found
    return trainer, kept, error


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Of the run that nobody disturbs."""
    _, kept, error = disturbed(tmp_path_factory.mktemp("whole"), [], None, 60.0)
    assert error is None
    assert len(kept.after) == 12
    return kept


def test_killed_ten_times_it_goes_on_when_the_server_is_back(whole: Kept, tmp_path: Path) -> None:
    moments = random.Random(0).sample(range(2, 22), 10)
    trainer, kept, error = disturbed(tmp_path, moments, 0.03, 60.0)
    assert error is None
    assert trainer.state.global_step == 12
    assert all(torch.equal(kept.after[step], whole.after[step]) for step in whole.after)


@pytest.mark.parametrize("seed", range(10))
def test_killed_for_good_it_ends_with_an_error_after_a_whole_step(seed: int, whole: Kept, tmp_path: Path) -> None:
    moment = random.Random(seed).randrange(1, 24)
    trainer, kept, error = disturbed(tmp_path, [moment], None, 0.3)
    assert "must be answered within 0.3 s" in str(error)
    done = trainer.state.global_step
    assert list(kept.after) == list(range(1, done + 1))
    assert all(torch.equal(kept.after[step], whole.after[step]) for step in kept.after)
    assert torch.equal(flat(trainer.model), whole.after[done] if done else flat(tiny()))


# ---- TRL


def test_sft_trainer_takes_it_as_dft_trainer_does(tmp_path: Path) -> None:
    trl_runs = pytest.importorskip("trl_runs")
    from dft_kernels.training.trl import fuse

    loss = {"divergence": "reverse_kl", "soft_weight": 0.7, "hard_weight": 0.3}
    model, tokenizer = far(hidden_size=24), word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS])
    for data in ("SFT completions", "SFT packed"):
        runs = []
        with StandIn(TinyModel(model, tokenizer)) as server, ServedTeacher(server.url, 9) as given:
            for each in (given, locally(model, 9)):
                sft = fuse(trl_runs.make(data, tmp_path / data), each, **loss)
                runs.append(trl_runs.run(sft))
                asked = len(server.scored)
        trl_runs.assert_equal(*runs, 2e-4)
        assert asked > 8
        assert all(line["soft_loss"] > 0 for line in runs[0].logs[:2])
