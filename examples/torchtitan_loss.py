"""A loss for torchtitan, `loss_fn(pred, labels)`, whose pred are hidden states and not logits.

torchtitan must be told: the model returns its last hidden states. Newer versions have a switch, `_skip_lm_head = True`,
which their trainer sets for a ChunkedLossWrapper alone: set it for this loss too. In older ones return `self.norm(h)`
from the model's forward. The head's weight must be whole where the loss runs: not sharded by tensor parallelism, and
with FSDP in the unit of the final norm or of the root.

This has not been run inside of torchtitan, which is not needed here. The function is the `fn` of its losses as of its
components/loss.py: a sum over shifted labels, which newer versions divide by the tokens of all devices around it
(BaseLoss.__call__); where yours expects a mean, leave out reduction="sum".

    python examples/torchtitan_loss.py    # a training step's shape, with a model of transformers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dft_kernels import linear_cross_entropy
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.training.students import pack


def fused_loss(lm_head: nn.Linear) -> Callable[[Tensor, Tensor], Tensor]:
    """torchtitan's `fn` of a loss: hidden states [..., H], labels [...] (-100: ignored), to the sum over them."""

    def loss_fn(pred: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(pred, lm_head.weight, labels, linear_bias=lm_head.bias, reduction="sum")

    return loss_fn


class Decoder(nn.Module):
    """A stand-in for torchtitan's model: tokens to hidden states, its head beside them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers, self.lm_head = model.model, model.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens).last_hidden_state


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
    causal, tokenizer = model_of(options.model, cache_folder(), torch.float32)
    model = Decoder(causal.to(device).train())
    loss_fn = fused_loss(model.lm_head)
    sequences = pack(texts_of(options.text, cache_folder())[:2000], tokenizer, options.length + 1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=options.learning_rate), []
    for _, ids in zip(range(options.steps), DataLoader(sequences, batch_size=4, shuffle=True), strict=False):
        tokens, labels = ids[:, :-1].to(device), ids[:, 1:].to(device)  # as torchtitan's data loader yields them
        loss = loss_fn(model(tokens), labels) / (labels != -100).sum()  # the trainer's division
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
