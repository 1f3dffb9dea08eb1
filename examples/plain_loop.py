"""A PyTorch loop whose loss is ours: the model without its head gives hidden states, and the loss takes these and the
head's weight in place of logits.

    python examples/plain_loop.py                                    # SmolLM2 on novels, both from pip
    python examples/plain_loop.py --model my-model/ --text my.txt    # or yours
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

from dft_kernels import linear_cross_entropy, shift_labels
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.training.students import pack


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = model_of(options.model, cache_folder(), torch.float32)  # or from_pretrained
    model.to(device).train()
    sequences = pack(texts_of(options.text, cache_folder())[:2000], tokenizer, options.length)  # [n, length]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    losses: list[float] = []
    while len(losses) < options.steps:
        for ids in DataLoader(sequences, batch_size=options.batch, shuffle=True):
            ids = ids.to(device)
            hidden = model.model(ids).last_hidden_state  # [B, T, H]: everything but the head
            # in place of F.cross_entropy(model.lm_head(hidden).flatten(0, 1), shift_labels(ids).flatten())
            loss = linear_cross_entropy(hidden, model.lm_head.weight, shift_labels(ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"step {len(losses)}: loss {losses[-1]:.4f}")
            if len(losses) == options.steps:
                break
    return losses


if __name__ == "__main__":
    main()
