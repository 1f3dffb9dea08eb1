"""Before anything imports triton: on a machine without a GPU its kernels are interpreted, on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
