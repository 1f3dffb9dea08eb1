"""TRL's GRPOTrainer with our kernels: log-probabilities and entropies of what the model drew, without logits.

The reward is a toy, short words. Replace `reward` by what you want of the model.

    python examples/trl_grpo.py
    python examples/trl_grpo.py --model my-model/ --text my.txt --steps 100
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.training.trl import fuse


def reward(completions: list[str], **_: Any) -> list[float]:
    """Of each completion: minus the mean length of its words."""
    return [-len("".join(words)) / max(1, len(words)) for words in map(str.split, completions)]


def main(arguments: list[str] | None = None) -> Any:
    """Train; the trainer, whose state has the logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada; prompts begin them")
    parser.add_argument("--out", default="grpo-out", help="where the trainer writes")
    parser.add_argument("--completion", type=int, default=32, help="tokens a completion at most")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    options = parser.parse_args(arguments)

    model, tokenizer = model_of(options.model, cache_folder(), torch.float32)
    texts = texts_of(options.text, cache_folder())[:2000]
    prompts = [" ".join(text.split()[:16]) for text in texts]
    on_cpu = not torch.cuda.is_available()
    args = GRPOConfig(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=options.completion,
        learning_rate=options.learning_rate,
        beta=0.0,  # the weight of the KL to a reference model, which would be fused too
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=on_cpu,
        bf16=not on_cpu,
    )
    trainer = GRPOTrainer(
        model,
        reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    fuse(trainer).train()
    return trainer


if __name__ == "__main__":
    main()
