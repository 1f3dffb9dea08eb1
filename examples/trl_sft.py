"""TRL's SFTTrainer with our kernels and a teacher: KL(teacher || student) + 0.1 cross-entropy.

The student is every second layer of the teacher. Any causal LM of the same vocabulary may take its place.

    python examples/trl_sft.py
    python examples/trl_sft.py --teacher my-model/ --text my.txt --steps 100
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.training.students import every_second_layer
from dft_kernels.training.trl import fuse


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada")
    parser.add_argument("--out", default="sft-out", help="where the trainer writes")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence at most")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    teacher, tokenizer = model_of(options.teacher, cache_folder(), torch.float32)
    texts = texts_of(options.text, cache_folder())[:2000]
    on_cpu = not torch.cuda.is_available()
    args = SFTConfig(
        options.out,
        max_steps=options.steps,
        max_length=options.length,
        per_device_train_batch_size=4,
        learning_rate=options.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=on_cpu,
        bf16=not on_cpu,
    )
    trainer = SFTTrainer(
        every_second_layer(teacher),
        args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    fuse(trainer, teacher, divergence="forward_kl", hard_weight=0.1)  # without a teacher: fuse(trainer)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
