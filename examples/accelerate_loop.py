"""The fused loss under accelerate, with gradient accumulation: every token of a step weighs the same, however many
tokens the batches that it is made of have, and on however many devices.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --accumulate 8
"""

from __future__ import annotations

import argparse
import contextlib
import itertools

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from dft_kernels import attach
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sequences of any length as a batch: labels are -100 where it is padded."""
    ids, labels = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (0, -100))
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada")
    parser.add_argument("--batch", type=int, default=2, help="sequences on a device at a time")
    parser.add_argument("--accumulate", type=int, default=4, help="batches a step, on each device")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args(arguments)

    accelerator = Accelerator()  # without gradient_accumulation_steps: backward() would divide by it
    model, tokenizer = model_of(options.model, cache_folder(), torch.float32)
    attach(model.train())  # before prepare(): the wrapper is what is called, so that it sees the forward
    texts = texts_of(options.text, cache_folder())[:2000]
    rows = [torch.tensor(ids) for ids in tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
    loader = DataLoader(rows, options.batch, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses: list[float] = []
    batches = (batch for _ in itertools.count() for batch in loader)
    while len(losses) < options.steps:
        step = list(itertools.islice(batches, options.accumulate))
        # the tokens that count in the whole step, of all devices; nothing predicts a sequence's first
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        items = accelerator.reduce(items, "sum")
        total = 0.0
        for number, batch in enumerate(step, 1):
            with accelerator.no_sync(model) if number < len(step) else contextlib.nullcontext():
                loss = model(**batch, num_items_in_batch=items).loss  # the sum over the batch's tokens, over items
                accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over the devices
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total, "sum").item())
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}, {int(items)} tokens")
    return losses


if __name__ == "__main__":
    main()
