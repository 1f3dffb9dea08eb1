"""Short training runs: a teacher and stores of it, options, batches, and what a run has logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny

import dft_kernels
from dft_kernels import TopK
from dft_kernels.models.heads import head_of, hidden_states
from dft_kernels.store.manifest import Contents
from dft_kernels.store.reader import Store
from dft_kernels.store.writer import StoreWriter
from dft_kernels.training.capture import top_k
from dft_kernels.training.trainer import DFTConfig

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


def locally(model: Any, k: int = 5) -> Any:
    """The k tokens of each row that a served teacher keeps."""

    def top(inputs: dict[str, Any]) -> TopK:
        with torch.no_grad():
            told = {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}
            logits = model(input_ids=inputs["input_ids"], use_cache=False, **told).logits
            log_p = logits.double().log_softmax(-1).float()
        kept = log_p.topk(k).indices
        own = inputs["input_ids"].roll(-1, 1)[..., None]
        kept[..., -1:] = torch.where((kept == own).any(-1, keepdim=True), kept[..., -1:], own)
        return TopK(kept, log_p.gather(-1, kept), log_p.scatter(-1, kept, -torch.inf).logsumexp(-1))

    return top


def config(tmp_path: Path, **changes: Any) -> DFTConfig:
    plain: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return DFTConfig(**{**plain, **changes})


def curve(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


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
