"""A LightningModule whose training step has the fused loss, from hidden states and the head's weight.
It needs Lightning (2.6 was tried): pip install lightning.

    python examples/lightning_module.py
    python examples/lightning_module.py --model my-model/ --text my.txt --steps 100
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dft_kernels import linear_cross_entropy, shift_labels
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.training.students import pack


class LanguageModel(lightning.LightningModule):
    """A causal LM of transformers; batches are token ids [B, T]."""

    def __init__(self, model: Any, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def loss(self, ids: Tensor) -> Tensor:
        """Cross-entropy of the next token, without logits."""
        hidden = self.model.model(ids).last_hidden_state
        return linear_cross_entropy(hidden, self.model.lm_head.weight, shift_labels(ids))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train; the loss of held-out text before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args(arguments)

    model, tokenizer = model_of(options.model, cache_folder(), torch.float32)
    module = LanguageModel(model.train(), options.learning_rate)
    sequences = pack(texts_of(options.text, cache_folder())[:2000], tokenizer, options.length)
    held_out, training = DataLoader(sequences[:8], batch_size=4), DataLoader(sequences[8:], batch_size=4, shuffle=True)
    trainer = lightning.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False)
    before = trainer.validate(module, held_out)[0]["val_loss"]
    trainer.fit(module, training)
    after = trainer.validate(module, held_out)[0]["val_loss"]
    print(f"held-out loss: {before:.4f} before, {after:.4f} after")
    return before, after


if __name__ == "__main__":
    main()
