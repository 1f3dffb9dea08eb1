"""transformers' own Trainer on an attached model, feature by feature: the numbers of the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny
from training_runs import random_rows

import dft_kernels
from dft_kernels.training import fused_forward

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


class Average(transformers.TrainerCallback):
    """A moving average of the weights, as an EMA callback keeps it."""

    def __init__(self) -> None:
        self.mean: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, p in model.named_parameters():
            self.mean[name] = 0.9 * self.mean.get(name, p.detach()) + 0.1 * p.detach()


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of the user's own, of logits."""
    logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum", ignore_index=-100)
    return 1.5 * total / num_items_in_batch


def right(found: Any) -> dict[str, float]:
    predicted, labels = torch.as_tensor(found.predictions)[:, :-1], torch.as_tensor(found.label_ids)[:, 1:]
    valid = labels != -100
    return {"right": float((predicted == labels)[valid].float().mean())}


METRICS = {"compute_metrics": right, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
# options of TrainingArguments, of Trainer, whether the loss is fused in training
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
BY_PROCESS = {"gradient_accumulation_steps": 3, "average_tokens_across_devices": False}
FEATURES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], bool]] = {
    "as it is": ({}, dict, True),
    "accumulation": ({"gradient_accumulation_steps": 3}, dict, True),
    "accumulation by process": (BY_PROCESS, dict, True),
    "clipping": ({"max_grad_norm": 0.05}, dict, True),
    "checkpointing": (CHECKPOINTED, dict, True),
    "reentrant checkpointing": (REENTRANT, dict, True),
    "bf16 autocast": ({"bf16": True}, dict, True),
    "label smoothing": ({"label_smoothing_factor": 0.2}, dict, False),  # Trainer's own loss, of logits
    "a loss of one's own": ({}, lambda: {"compute_loss_func": summed}, False),
    "metrics": ({"eval_strategy": "steps", "eval_steps": 2}, lambda: METRICS, True),
    "moving average": ({}, lambda: {"callbacks": [Average()]}, True),
    "compiled": ({"torch_compile": True}, dict, True),
}


@pytest.mark.kept(where=lambda feature: feature != "compiled")
@pytest.mark.parametrize("feature", FEATURES)
def test_the_numbers_are_the_models_own(feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more, given, fused = FEATURES[feature]
    calls: list[torch.dtype] = []  # in which products are, of each
    own = fused_forward.linear_distribution_loss

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return own(*arguments, **named)

    monkeypatch.setattr(fused_forward, "linear_distribution_loss", counted)
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in random_rows(5, 9, 7, 12, 3, 8, 6, 4)]
    pad = tiny().config.pad_token_id or 0

    def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([torch.tensor(one[name]) for one in items], True, value)

        ids, labels = padded("input_ids", pad), padded("labels", -100)
        lengths = torch.tensor([len(one["input_ids"]) for one in items])
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }

    found = []
    for attached in (False, True):
        model = tiny()
        if attached:
            dft_kernels.attach(model)
        layers: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, layers=layers: layers.append(1))
        torch._dynamo.reset()
        traced = torch._dynamo.utils.counters["frames"]["ok"]
        options = transformers.TrainingArguments(
            str(tmp_path / str(attached)), use_cpu=True, max_steps=3, per_device_train_batch_size=2, optim="sgd",
            learning_rate=0.2, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, seed=3, **more,
        )  # fmt: skip
        extra = given()
        before, calls[:] = {name: p.detach().clone() for name, p in model.named_parameters()}, []
        trainer = transformers.Trainer(
            model, options, train_dataset=rows, eval_dataset=rows[:3], data_collator=collate, **extra
        )
        trainer.train()
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        if extra.get("callbacks"):
            moved |= {f"mean {name}": mean for name, mean in extra["callbacks"][0].mean.items()}
        logs = [
            {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
        ]
        found.append((logs, moved, list(calls)))
        batches = 7 if "gradient_accumulation_steps" in more else 3  # three, the fourth and last, and three
        if "gradient_checkpointing" in more:
            assert len(layers) == 2 * batches  # once more in backward
        assert (torch._dynamo.utils.counters["frames"]["ok"] > traced) == ("torch_compile" in more)
    (logs, moved, none), (ours, steps, taken) = found
    assert not none
    rough = more.get("bf16") is True
    if "torch_compile" not in more:  # whose graphs call it where they are traced
        assert taken == ([torch.bfloat16 if rough else torch.float32] * batches if fused else [])
    assert bool(taken) == fused
    assert [entry.keys() for entry in logs] == [entry.keys() for entry in ours]
    for one, other in zip(logs, ours, strict=True):
        assert other == pytest.approx(one, rel=2e-2 if rough else 1e-4)
    assert any("loss" in entry for entry in logs)
    for name, step in moved.items():
        gap = float((steps[name] - step).norm())
        assert gap <= (3e-2 if rough else 1e-3) * float(step.norm()) + 1e-6, name
    if feature == "metrics":
        assert any("eval_right" in entry for entry in logs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_a_scaled_loss(dtype: torch.dtype) -> None:
    """What Trainer does with fp16=True on a GPU; on a CPU it leaves fp16 out."""
    ids = torch.tensor(random_rows(9, 9))
    found = []
    for attached in (False, True):
        model = dft_kernels.attach(tiny()) if attached else tiny()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        with torch.autocast("cpu", dtype):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append((float(loss), [p.grad for p in model.parameters()]))
    (loss, gradients), (fused, ours) = found
    assert fused == pytest.approx(loss, rel=2e-3)
    for mine, own in zip(ours, gradients, strict=True):
        assert 0 < float((mine - own).norm()) <= 3e-2 * float(own.norm())
