"""A head whose vocabulary is divided over processes: each has the backbone and its own rows of the head, and no process
has logits of the others' rows. The loss is the same in all of them, to the bit, and so are the backbone's gradients.

    python examples/vocabulary_parallel.py
    torchrun --nproc-per-node 2 examples/vocabulary_parallel.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dft_kernels import linear_cross_entropy, shift_labels
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import model_of, texts_of
from dft_kernels.models.heads import hidden_states


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder or name for transformers, or smollm2")
    parser.add_argument("--text", nargs="+", default=["lambada"], help="UTF-8 files, or lambada")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step, the same in every process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args(arguments)

    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **alone)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # with GPUs: "cuda", and "nccl" above
    model, tokenizer = model_of(options.model, cache_folder(), torch.float32)
    ids = tokenizer("\n\n".join(texts_of(options.text, cache_folder())[:1000]), return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // options.length * options.length].view(-1, options.length)

    # this process's rows of the head, as a leaf of its own: a tied embedding keeps its own copy
    head = distribute_tensor(model.lm_head.weight.detach().clone(), mesh, [Shard(0)]).requires_grad_()
    parameters = [p for p in model.parameters() if p is not model.lm_head.weight]
    optimizer = torch.optim.AdamW([{"params": parameters}, {"params": [head]}], lr=options.learning_rate)
    losses = []
    for step in range(options.steps):
        batch = rows[torch.arange(options.batch * step, options.batch * (step + 1)) % len(rows)]
        hidden = hidden_states(model, batch)  # [B, T, H]
        loss = linear_cross_entropy(hidden, head, shift_labels(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}, {head.to_local().shape[0]} of {head.shape[0]} rows here")
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
