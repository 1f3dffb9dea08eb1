"""A loss for torchtitan: `loss(pred, labels, global_valid_tokens)`, whose pred are last hidden states and not logits.

torchtitan's trainer (0.3.0) gives the head to a ChunkedLossWrapper, and has the model leave it out (`_skip_lm_head`),
so be one. Then name it in the trainer's configuration, `loss=TitanLoss.Config()`:

    class TitanLoss(FusedLoss, ChunkedLossWrapper):
        @dataclass(kw_only=True, slots=True)
        class Config(ChunkedLossWrapper.Config):
            pass

The head's weight must be whole where the loss runs: not sharded by tensor parallelism, and with FSDP in the unit of the
final norm, as torchtitan has it, or of the root. Beside torchtitan's own classes, value and gradients were found to be
ChunkedLossWrapper's; a training by its trainer has not been run.

    python examples/torchtitan_loss.py    # a training step's shape, with a model of transformers
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dft_kernels import linear_cross_entropy
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.training.students import pack


class FusedLoss:
    """pred [..., H], labels [...] (-100: ignored): the cross-entropy's sum over the tokens of all devices, {}."""

    lm_head: nn.Linear

    def set_lm_head(self, lm_head: nn.Linear) -> None:
        """Before the first call."""
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weight, bias = self.lm_head.weight, self.lm_head.bias
        loss = linear_cross_entropy(pred, weight, labels, linear_bias=bias, reduction="sum")
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = model_of(options.model, cache_folder(), torch.float32)
    model.to(device).train()
    loss_fn = FusedLoss()
    loss_fn.set_lm_head(model.lm_head)
    sequences = pack(texts_of(options.text, cache_folder())[:2000], tokenizer, options.length + 1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=options.learning_rate), []
    for _, ids in zip(range(options.steps), DataLoader(sequences, batch_size=4, shuffle=True), strict=False):
        tokens, labels = ids[:, :-1].to(device), ids[:, 1:].to(device)  # as torchtitan's data loader yields them
        loss, _ = loss_fn(model.model(tokens).last_hidden_state, labels, (labels != -100).sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
