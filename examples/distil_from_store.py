"""Run a teacher over texts once, keep its distributions in a store, and train a student from that: the teacher is not
needed again. Repeated with the same texts, the script takes the store that is there.

The student is every second layer of the teacher. Any causal LM of the same tokenizer may take its place.

    python examples/distil_from_store.py
    python examples/distil_from_store.py --teacher my-model/ --text my.txt --store my-store/ --k 128
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dft_kernels import attach, capture
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.training.students import every_second_layer, pack


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada")
    parser.add_argument("--store", type=Path, default=Path("teacher-store"), help="the store's folder")
    parser.add_argument("--k", type=int, default=64, help="tokens of each distribution that are kept")
    parser.add_argument("--sequences", type=int, default=64, help="how many the teacher sees at most")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, tokenizer = model_of(options.teacher, cache_folder(), torch.float32)
    teacher.to(device)
    texts = texts_of(options.text, cache_folder())[:2000]
    sequences = pack(texts, tokenizer, options.length)[: options.sequences]
    store = capture(teacher, tokenizer, list(sequences), options.store, "topk", k=options.k)
    print(f"{len(store)} sequences, {store.rows} distributions, {store.bytes} bytes")

    student = every_second_layer(teacher).train()
    del teacher  # Store(folder, tokenizer) opens the store in another run
    attach(student, divergence="forward_kl", hard_weight=0.1)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=options.learning_rate), []
    loader = DataLoader(store, batch_size=4, shuffle=True, collate_fn=store.collate)
    for batch in (batch for _ in range(options.epochs) for batch in loader):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
        out = student(**inputs, teacher=store.teacher(batch, device))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        agreement = out.metrics.teacher_agreement.float().mean()
        print(f"step {len(losses)}: loss {losses[-1]:.4f}, agreement with the teacher {agreement:.2f}")
    return losses


if __name__ == "__main__":
    main()
