"""`DFTTrainer`: Trainer's loop with a teacher, and the metrics of the loss's own pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dft_kernels
from dft_kernels import Labels, Mixture, TopK
from dft_kernels.models.heads import head_of, hidden_states
from dft_kernels.store.manifest import Contents
from dft_kernels.store.reader import Store
from dft_kernels.store.writer import StoreWriter
from dft_kernels.testing import dense_loss
from dft_kernels.training.collators import PrinciplesCollator

transformers = pytest.importorskip("transformers")
from test_attach import tiny

from dft_kernels.training.capture import top_k
from dft_kernels.training.trainer import DFTConfig, DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
LENGTHS = (9, 4, 12, 7, 5, 12, 3, 8)


def teacher() -> Any:
    model = tiny(hidden_size=24).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    return model.to(torch.bfloat16).float()  # weights that bf16 holds


def written(folder: Path) -> Store:
    """A store of hidden states, written by hand in bf16."""
    model, head = teacher(), head_of(teacher())
    assert head.weight is not None
    contents = Contents("hidden", 64, 24, "tiny", "a", "b")
    with StoreWriter(folder / "store", contents, (head.weight, None)) as writer:
        ids = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
        with torch.no_grad():
            writer.append(ids, hidden=[hidden_states(model, one[None])[0] for one in ids])
    return Store(folder / "store")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return written(tmp_path)


def top_k_store(folder: Path) -> Store:
    """The four likeliest tokens of the same rows."""
    model = teacher()
    with StoreWriter(folder, Contents("topk", 64, 4, "tiny", "a", "b"), None) as writer:
        ids = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
        with torch.no_grad():
            rows = [top_k(model(input_ids=one[None]).logits[0], 4) for one in ids]
        kept = [(indices.to(torch.uint16), p.to(torch.bfloat16), tail) for indices, p, tail in rows]
        columns = dict(zip(("indices", "log_probs", "tail"), map(list, zip(*kept, strict=True)), strict=True))
        writer.append(ids, **columns)
    return Store(folder)


def config(tmp_path: Path, **changes: Any) -> DFTConfig:
    plain: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return DFTConfig(**{**plain, **changes})


def curve(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_store_a_running_teacher_and_a_function_are_one(store: Store, tmp_path: Path) -> None:
    model = teacher()

    def function(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    curves = []
    for given in (store, teacher(), function):
        more = {} if given is store else {"train_dataset": store, "data_collator": store.collate}
        trainer = DFTTrainer(tiny(), config(tmp_path, max_steps=12), given, **more)
        trainer.train()
        curves.append(curve(trainer))
        soft = curve(trainer, "soft_loss")
        assert sum(soft[8:]) < sum(soft[:4])
    assert curves[1] == pytest.approx(curves[2], rel=1e-5)
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)  # hidden states in bf16


def test_the_first_step_is_the_formula(store: Store, tmp_path: Path) -> None:
    options = config(
        tmp_path, max_steps=1, per_device_train_batch_size=8, divergence="jensen_shannon", soft_weight=0.7,
        hard_weight=0.3, temperature=2.0, temperature_scaling="squared",
    )  # fmt: skip
    trainer = DFTTrainer(tiny(), options, store)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    model, batch = tiny(), store.batch(range(8))
    labels = dft_kernels.shift_labels(batch["labels"])
    with torch.no_grad():
        hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
        given = store.teacher(batch)
        exact = dense_loss(
            hidden, model.get_output_embeddings().weight, labels, given, divergence="jensen_shannon", soft_weight=0.7,
            hard_weight=0.3, temperature=2.0, temperature_scaling="squared",
        )  # fmt: skip
        z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    valid = labels != -100
    log_q = z.log_softmax(-1)[valid]
    assert logged["loss"] == pytest.approx(float(exact), rel=1e-3)
    assert logged["hard_loss"] == pytest.approx(float(torch.nn.functional.nll_loss(log_q, labels[valid])), rel=1e-4)
    assert logged["entropy"] == pytest.approx(float(-(log_q.exp() * log_q).sum(-1).mean()), rel=1e-4)
    assert logged["accuracy"] == pytest.approx(float((log_q.argmax(-1) == labels[valid]).float().mean()))
    assert 0 <= logged["teacher_agreement"] <= 1
    assert logged["loss"] == pytest.approx(0.7 * logged["soft_loss"] + 0.3 * logged["hard_loss"], rel=1e-3)


def test_accumulation_is_the_batch(store: Store, tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        options = config(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        model = tiny()
        DFTTrainer(model, options, store).train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    begun = dict(tiny().named_parameters())
    for name, one in weights[0].items():
        assert not torch.equal(one, begun[name])
        torch.testing.assert_close(weights[1][name] - begun[name], one - begun[name], rtol=2e-3, atol=1e-6)


def test_resumed_it_is_the_same_curve(store: Store, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = DFTTrainer(tiny(), config(tmp_path, **options), store)
    whole.train()
    resumed = DFTTrainer(tiny(), config(tmp_path, **options), store)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert curve(resumed)[2:] == pytest.approx(curve(whole)[2:], rel=1e-6)
    assert curve(resumed, "soft_loss")[2:] == pytest.approx(curve(whole, "soft_loss")[2:], rel=1e-6)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    assert "forward" not in loaded.__dict__


def test_steps_of_matching_alternate(store: Store, tmp_path: Path) -> None:
    asked: list[int] = []

    def function(inputs: dict[str, Any]) -> Any:
        asked.append(trainer.state.global_step)
        return torch.zeros(*inputs["input_ids"].shape, 64)

    options = config(tmp_path, max_steps=8, matching_every=3, matching_from=1, gradient_accumulation_steps=2)
    trainer = DFTTrainer(tiny(), options, function, train_dataset=store, data_collator=store.collate)
    trainer.train()
    assert asked == [3, 3, 6, 6]
    logged = [entry["step"] - 1 for entry in trainer.state.log_history if "soft_loss" in entry]
    assert logged == [3, 6]


@pytest.mark.parametrize("every", [1, 2])
def test_matching_comes_in_by_a_ramp(store: Store, tmp_path: Path, every: int) -> None:
    """Weights step by step; the loss of each is that of its metrics under them, and plain cross-entropy before."""
    options = config(
        tmp_path, max_steps=8, matching_from=2, matching_ramp=4, matching_every=every, soft_weight=0.7, hard_weight=0.2
    )
    trainer = DFTTrainer(tiny(), options, store)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 8
    for step, entry in enumerate(logged):
        r = min(1.0, (step - 2 + 1) / 4)
        if step < 2 or (step - 2 + 1) % every:
            assert "soft_loss" not in entry
            assert entry["loss"] == pytest.approx(entry["hard_loss"], rel=1e-5)
        else:
            expected = 0.7 * r * entry["soft_loss"] + (0.2 * r + 1 - r) * entry["hard_loss"]
            assert entry["loss"] == pytest.approx(expected, rel=1e-5), step


def test_a_step_within_a_ramp_is_the_formula(store: Store, tmp_path: Path) -> None:
    options = config(tmp_path, max_steps=1, per_device_train_batch_size=8, matching_ramp=4, hard_weight=0.2)
    trainer = DFTTrainer(tiny(), options, store)
    trainer.train()
    model, batch = tiny(), store.batch(range(8))
    with torch.no_grad():
        hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
        exact = dense_loss(
            hidden, model.get_output_embeddings().weight, dft_kernels.shift_labels(batch["labels"]),
            store.teacher(batch), soft_weight=0.25, hard_weight=0.2 * 0.25 + 0.75,
        )  # fmt: skip
    assert curve(trainer) == pytest.approx([float(exact)], rel=1e-3)


def test_resumed_within_a_ramp_it_is_the_same_curve(store: Store, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "matching_from": 1, "matching_ramp": 4}
    whole = DFTTrainer(tiny(), config(tmp_path, **options), store)
    whole.train()
    resumed = DFTTrainer(tiny(), config(tmp_path, **options), store)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert curve(resumed)[3:] == pytest.approx(curve(whole)[3:], rel=1e-6)
    assert len(curve(resumed)) == 6


@pytest.mark.parametrize("kind", ["linear", "log_linear"])
def test_a_mixture_is_the_formula(store: Store, tmp_path: Path, kind: str) -> None:
    """A store, a running model, a function and, where it can be, the label; the store gives the batches."""
    live, asked = tiny(num_hidden_layers=1), []

    def function(inputs: dict[str, Any]) -> Any:
        asked.append(inputs["sequence"])
        return inputs["input_ids"][..., None] * torch.linspace(-0.1, 0.1, 64)

    parts = [store, live, function, *([Labels()] if kind == "linear" else [])]
    weights = [0.4, 0.3, 0.2, 0.1] if kind == "linear" else [0.8, 0.5, -0.3]
    options = config(
        tmp_path, max_steps=1, per_device_train_batch_size=8, divergence="jensen_shannon", hard_weight=0.3,
        temperature=2.0, teacher_temperature=1.5,
    )  # fmt: skip
    trainer = DFTTrainer(tiny(), options, Mixture(parts, weights, kind))
    trainer.train()
    assert len(asked) == 1
    assert not any(p.requires_grad for p in live.parameters())
    model, batch = tiny(), store.batch(asked[0].tolist())
    labels, valid = dft_kernels.shift_labels(batch["labels"]), batch["labels"][:, 1:] != -100
    with torch.no_grad():
        given = store.teacher(batch, dtype=torch.float32)
        mask = batch["attention_mask"]
        z = [
            torch.nn.functional.linear(given.hidden, given.weight),
            tiny(num_hidden_layers=1).eval()(input_ids=batch["input_ids"], attention_mask=mask).logits,
            function(batch),
        ]
        p = [(one[:, :-1] / 1.5).softmax(-1).double() for one in z]
        if kind == "linear":
            p.append(torch.nn.functional.one_hot(batch["input_ids"][:, 1:], 64).double())
            p = sum(w * one for w, one in zip(weights, p, strict=True))
        else:
            p = sum(w * one.log() for w, one in zip(weights, p, strict=True)).softmax(-1)
        logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits[:, :-1].double()
        q = (logits / 2.0).softmax(-1)
        m = (p + q) / 2
        soft = 0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1)[valid].mean()
        hard = torch.nn.functional.cross_entropy(logits[valid], labels[:, :-1][valid])
    (logged,) = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    assert logged["soft_loss"] == pytest.approx(float(soft), rel=1e-2)  # the store's product is bf16's
    assert logged["loss"] == pytest.approx(float(soft + 0.3 * hard), rel=1e-3)


def test_a_top_k_store_is_mixed_as_its_error_says(tmp_path: Path) -> None:
    sparse = top_k_store(tmp_path / "sparse")

    def function(batch: dict[str, Any]) -> TopK:
        return dataclasses.replace(sparse.teacher(batch), tail="renormalise")

    mixture = Mixture([function, teacher()], [0.5, 0.5])
    trainer = DFTTrainer(tiny(), config(tmp_path), mixture, train_dataset=sparse, data_collator=sparse.collate)
    trainer.train()
    assert len(curve(trainer, "soft_loss")) == 4


def test_the_bar_shows_the_metrics(store: Store, tmp_path: Path, capsys: Any) -> None:
    seen: list[str] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            bars = [one for one in trainer.callback_handler.callbacks if isinstance(one, transformers.ProgressCallback)]
            assert len(bars) == 1
            seen.append(bars[0].training_bar.postfix or "")

    trainer = DFTTrainer(
        tiny(), config(tmp_path, max_steps=3, matching_from=1, disable_tqdm=False), store, callbacks=[Watch()]
    )
    trainer.train()
    first, second = (e for e in trainer.state.log_history[:2])
    assert seen == [
        "",
        f"loss={first['loss']:.4g}, hard_loss={first['hard_loss']:.4g}",
        ", ".join(f"{n}={second[n]:.4g}" for n in ("loss", "soft_loss", "hard_loss", "teacher_agreement")),
    ]
    assert capsys.readouterr().out.count("'soft_loss'") == 2  # Trainer's lines, once each


def test_without_a_bar_or_on_another_process_there_is_none(store: Store, tmp_path: Path) -> None:
    quiet = DFTTrainer(tiny(), config(tmp_path), store)
    assert not any(isinstance(one, transformers.ProgressCallback) for one in quiet.callback_handler.callbacks)
    other = DFTTrainer(tiny(), config(tmp_path, max_steps=1, disable_tqdm=False), store)
    other.state.is_world_process_zero = False
    other.is_world_process_zero = lambda: False
    other.train()
    (bar,) = [one for one in other.callback_handler.callbacks if isinstance(one, transformers.ProgressCallback)]
    assert bar.training_bar is None
    other.log({"loss": 1.0})  # after the last step there is no bar


def batch_of(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    whole = [torch.tensor(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(whole, batch_first=True, padding_side=side)
    mask = pad([torch.ones_like(one) for one in whole], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def random_rows(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 64, (n,), generator=random).tolist() for n in lengths]


def packed(*lengths: int, labelled: bool = False) -> dict[str, torch.Tensor]:
    """Sequences in one row, as a padding-free collator gives them; the first label of each is no one's."""
    ids = torch.tensor([[token for row in random_rows(*lengths) for token in row]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    shifted = dft_kernels.shift_labels(labels)
    batch = {"input_ids": ids, "position_ids": positions, "shift_labels": shifted}
    return {**batch, "labels": labels} if labelled else batch


def unlabelled(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    batch = batch_of(rows, side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def masked_out(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    batch = batch_of(rows, "right")
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


BATCHES = {
    "right": lambda: [batch_of(random_rows(3, 9), "right"), batch_of(random_rows(12, 2), "right")],
    "left": lambda: [batch_of(random_rows(3, 9), "left"), batch_of(random_rows(12, 2), "left")],
    "packed": lambda: [packed(3, 9, 2), packed(7)],
    "packed and labels": lambda: [packed(3, 9, 2, labelled=True), packed(7, labelled=True)],
    "no labels": lambda: [unlabelled(random_rows(3, 9), "right"), unlabelled(random_rows(12, 2), "left")],
    "masked out": lambda: [
        batch_of(random_rows(3, 9), "right"),
        masked_out(random_rows(4, 5)),
        batch_of(random_rows(12, 2), "right"),
    ],
}


@pytest.mark.parametrize("live", [False, True], ids=["function", "model"])
@pytest.mark.parametrize("name", BATCHES)
def test_an_accumulated_step_is_the_formula(name: str, live: bool, tmp_path: Path) -> None:
    """The update of one step of several batches: -lr times the gradient of the sum over all rows, over their number."""
    batches = BATCHES[name]()
    hard, lr = (0.0 if name == "no labels" else 0.3), 0.1
    model, theirs = tiny(), teacher()

    def logits(one: Any, inputs: dict[str, Any]) -> Any:
        more = {n: inputs[n] for n in ("attention_mask", "position_ids") if n in inputs}
        return one(input_ids=inputs["input_ids"], use_cache=False, **more).logits  # with a cache a pack is one text

    def function(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return logits(theirs, inputs)

    plain, total, items, sums = tiny(), 0.0, 0, torch.zeros(2)
    for batch in batches:
        shifted = batch.get("shift_labels")
        if shifted is None:
            labels = batch.get("labels", batch["input_ids"].masked_fill(batch.get("attention_mask") == 0, -100))
            shifted = dft_kernels.shift_labels(labels)
        valid = shifted != -100
        log_q, log_p = logits(plain, batch)[valid].log_softmax(-1), function(batch)[valid].log_softmax(-1)
        soft = (log_p.exp() * (log_p - log_q)).sum()
        ce = torch.nn.functional.nll_loss(log_q, shifted[valid], reduction="sum")
        total, items = total + 0.7 * soft + hard * ce, items + int(valid.sum())
        sums += torch.stack([soft, ce]).detach()
    (total / items).backward()
    options = config(
        tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=len(batches), optim="sgd",
        max_grad_norm=0.0, learning_rate=lr, soft_weight=0.7, hard_weight=hard,
    )  # fmt: skip
    collate: Callable[[Any], Any] = lambda items: items[0]  # noqa: E731
    trainer = DFTTrainer(model, options, teacher() if live else function, train_dataset=batches, data_collator=collate)
    trainer.train()
    assert curve(trainer) == pytest.approx([float(total.detach()) / items], rel=1e-4)
    assert curve(trainer, "soft_loss") == pytest.approx([float(sums[0]) / items], rel=1e-4)
    assert curve(trainer, "hard_loss") == pytest.approx([float(sums[1]) / items], rel=1e-4)
    begun = dict(tiny().named_parameters())
    for key, p in model.named_parameters():
        want = -lr * dict(plain.named_parameters())[key].grad
        assert float(want.norm()) > 0
        torch.testing.assert_close(p.detach() - begun[key].detach(), want, rtol=1e-3, atol=1e-6)


def test_a_step_of_nothing_but_masked_batches_changes_nothing(tmp_path: Path) -> None:
    batches = [masked_out(random_rows(3, 9)), masked_out(random_rows(4, 5))]
    model = tiny()
    options = config(tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="sgd")
    trainer = DFTTrainer(model, options, teacher(), train_dataset=batches, data_collator=lambda items: items[0])
    trainer.train()
    assert curve(trainer) == [0.0]
    assert curve(trainer, "soft_loss") == []
    for one, other in zip(model.parameters(), tiny().parameters(), strict=True):
        assert torch.equal(one, other)


def test_steps_of_cross_entropy_need_labels(tmp_path: Path) -> None:
    batches = [unlabelled(random_rows(3, 9), "right")]
    options = config(tmp_path, max_steps=1, per_device_train_batch_size=1, matching_from=1)
    trainer = DFTTrainer(tiny(), options, teacher(), train_dataset=batches, data_collator=lambda items: items[0])
    with pytest.raises(ValueError, match="labels must be given in a step of cross-entropy, got None in step 1"):
        trainer.train()


def test_a_loss_that_is_not_finite_is_named(store: Store, tmp_path: Path) -> None:
    def function(inputs: dict[str, Any]) -> Any:
        return torch.full((*inputs["input_ids"].shape, 64), math.nan if trainer.state.global_step == 1 else 0.0)

    model = tiny()
    trainer = DFTTrainer(model, config(tmp_path), function, train_dataset=store, data_collator=store.collate)
    with pytest.raises(ValueError, match=r"loss must be finite, got nan in step 2, sequences \[\d, \d\]"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_evaluation_is_trainers(store: Store, tmp_path: Path) -> None:
    plain, model = tiny(), tiny()
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False
    )

    def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = store.collate(items)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    expected = transformers.Trainer(plain, options, data_collator=collate, eval_dataset=store).evaluate()
    found = DFTTrainer(model, config(tmp_path), store, eval_dataset=store).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_mistakes(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DFTConfig: matching_every must be an int of at least 1, got 0"):
        config(tmp_path, matching_every=0)
    with pytest.raises(ValueError, match="DFTConfig: matching_ramp must be an int of at least 0, got -1"):
        config(tmp_path, matching_ramp=-1)
    with pytest.raises(ValueError, match=r"DFTConfig: matching_ramp must be an int of at least 0, got 0\.5"):
        config(tmp_path, matching_ramp=0.5)
    with pytest.raises(ValueError, match=r"DFTConfig: label_smoothing_factor must be 0, got 0\.1"):
        config(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="DFTTrainer: compute_loss_func must be None"):
        DFTTrainer(tiny(), config(tmp_path), store, compute_loss_func=lambda *given: 0.0)
    strange = DFTTrainer(tiny(), config(tmp_path), store, train_dataset=[{"input_ids": [3, 4], "labels": [3, 4]}] * 2)
    with pytest.raises(ValueError, match=r"batches must have the store's rows \(hidden\), got only input_ids, labels"):
        strange.train()
    with pytest.raises(TypeError, match="args must be a DFTConfig, got TrainingArguments"):
        DFTTrainer(tiny(), transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True), store)


def test_mistakes_in_the_teacher_and_the_loss_come_at_construction(store: Store, tmp_path: Path) -> None:
    sparse = top_k_store(tmp_path / "sparse")
    collator = PrinciplesCollator([5, 6])
    cases: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
        (torch.zeros(2, 3, 64), {}, {}, "teacher must be a Store, a model, a function of the batch, or a Mixture"),
        (torch.nn.Linear(2, 2), {}, {}, "teacher must be a causal LM of transformers where it is a module, got Linear"),
        (Labels(), {}, {}, "teacher must be a Store, .*got Labels"),
        (Mixture([store, store], [0.5, 0.5]), {}, {}, "teacher must hold one Store at most"),
        (Mixture([Mixture([store], [1.0])], [1.0]), {}, {}, "Multiply the weights out"),
        (Mixture([store, Labels()], [0.5, 0.6]), {}, {}, "DFTTrainer: Mixture weights must sum to 1"),
        (Mixture([store, Labels()], [0.5, 0.5], "log_linear"), {}, {}, r"Labels\(\) must come with target in a linear"),
        (Mixture([sparse, Labels()], [0.5, 0.5]), {}, {}, "teacher must hold no store of a top k as such in a Mixture"),
        (sparse, {"temperature": 2.0}, {}, "DFTTrainer: teacher_temperature must be 1.0"),
        (store, {"divergence": "kl"}, {}, "DFTConfig: divergence must be one of forward_kl"),
        (store, {"loss_backend": "gpu"}, {}, "DFTTrainer: backend must be one of auto"),
        (store, {}, {"data_collator": collator}, "teacher must be a model, .*got a Store, whose rows are there"),
        (None, {}, {"data_collator": collator}, "teacher must be a model, .*got none that could be run"),
        (Mixture([store, teacher()], [0.5, 0.5]), {}, {"data_collator": collator}, "teacher must be a model"),
    ]
    for given, changes, more, message in cases:
        model = tiny()
        with pytest.raises((ValueError, TypeError), match=message):
            DFTTrainer(model, config(tmp_path, **changes), given, **more)
        assert "forward" not in model.__dict__  # nothing was attached
