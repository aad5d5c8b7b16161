"""Without a GPU, Triton's kernels are interpreted; that is settled when triton is first imported, by any test."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
