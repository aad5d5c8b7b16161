"""Without a GPU, Triton's kernels are interpreted; whether they are is settled when triton is first imported, by whatever test."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
