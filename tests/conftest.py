"""Without a GPU, Triton's kernels are interpreted. Whether they are is settled when triton is first imported, anywhere."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
