"""TRL's trainers with a tiny model: two steps each, of accumulated batches, and what came of them."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tiny_models import WORDS, far, word_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

SETTINGS = {
    **{"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.1},
    **{"optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": []},
    **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_grad_norm": 0.0},
}
TIMES = ("runtime", "per_second", "step_time", "epoch", "flos", "/time")


def text(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 7 + 3 * n * n) % 90] for n in range(length))


PROMPTS = [text(n, 3 + n % 2) for n in range(8)]
CHOSEN = [" " + text(n + 11, 4 + n % 3) for n in range(8)]
REJECTED = [" " + text(n + 23, 3 + n % 4) for n in range(8)]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(len, words.split())) % 5) for words in completions]


GROUPS = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.8, "beta": 0.1}
TRAINERS: dict[str, tuple[str, dict[str, Any], dict[str, list[Any]]]] = {  # class, settings, data
    "SFT": ("SFT", {}, {"text": [p + c for p, c in zip(PROMPTS, CHOSEN, strict=True)]}),
    "SFT completions": ("SFT", {}, {"prompt": PROMPTS, "completion": CHOSEN}),
    "SFT packed": ("SFT", {"packing": True, "max_length": 16}, {"text": [text(n, 5) for n in range(40)]}),
    "SFT dynamic": ("SFT", {"loss_type": "dft"}, {"text": [text(n, 9) for n in range(8)]}),
    "DPO": ("DPO", {}, {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}),
    "DPO weighted": ("DPO", {"use_weighting": True}, {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}),
    "KTO": ("KTO", {}, {"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False] * 4}),
    "DPO checkpointed": (
        "DPO",
        {"gradient_checkpointing": True},
        {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED},
    ),
    "GRPO": ("GRPO", GROUPS, {"prompt": PROMPTS}),
    "GRPO entropy": ("GRPO", {**GROUPS, "entropy_coef": 0.1, "num_iterations": 2}, {"prompt": PROMPTS}),
    "RLOO": ("RLOO", GROUPS, {"prompt": PROMPTS}),
}
DISTILLATION = {
    f"distillation at {beta}": (
        "Distillation",
        {"beta": beta, "temperature": 0.8, "max_completion_length": 6},
        {"prompt": PROMPTS},
    )
    for beta in (0.0, 0.3, 1.0)
}


class Run(NamedTuple):
    logs: list[dict[str, float]]  # what each step logged, and the evaluation after them
    change: dict[str, torch.Tensor]  # of each trained parameter: learning rate times the sum of the steps' gradients
    rounding: dict[str, torch.Tensor]  # of each parameter, once a step


def loaded(folder: Path, kind: str = "llama", **config: Any) -> Any:
    """A model that is a step away from what its folder holds, where reference models come from."""
    if not folder.exists():
        far(kind, **config).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def make(name: str, folder: Path, model: Any = None, **settings: Any) -> Any:
    """A trainer of TRL."""
    kind, own, data = {**TRAINERS, **DISTILLATION}[name]
    args = getattr(trl, f"{kind}Config")(output_dir=str(folder), **{**SETTINGS, **own, **settings})
    rows = datasets.Dataset.from_dict(data)
    more: dict[str, Any] = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
    more |= {"teacher_model": far(hidden_size=24)} if kind == "Distillation" else {}
    tokenizer = word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS])
    model = loaded(folder / "model") if model is None else model
    return getattr(trl, f"{kind}Trainer")(
        model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, **more
    )


def run(trainer: Any) -> Run:
    """Train it, and evaluate."""
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.set_seed(7)  # whatever was drawn since the trainer was made
        trainer.train()
        trainer.evaluate()
    logs = [{k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in trainer.state.log_history]
    after = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    eps = torch.finfo(torch.float32).eps
    changes = {name: (parameter - before[name]).detach() for name, parameter in after.items()}
    return Run(logs, changes, {name: 2 * eps * parameter.detach() for name, parameter in after.items()})


def assert_equal(mine: Run, theirs: Run, tolerance: float = 2e-5) -> None:
    """Logs to `tolerance`; the steps taken to that, and to the rounding of parameters that they are added to."""
    assert len(mine.logs) == len(theirs.logs) >= 4  # two steps, the training, the evaluation
    for line, own in zip(mine.logs, theirs.logs, strict=True):
        assert line.keys() == own.keys()
        for name, value in own.items():
            near = math.isclose(line[name], value, rel_tol=tolerance, abs_tol=tolerance / 10)
            assert near or (math.isnan(value) and math.isnan(line[name])), (name, line[name], value)
    for name, change in theirs.change.items():
        assert float(change.norm()) > 0, name
        rounding = float(theirs.rounding[name].norm())
        assert float((mine.change[name] - change).norm()) < tolerance * float(change.norm()) + rounding, name
