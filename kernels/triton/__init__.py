"""The GPU's kernel set, in Triton: `dspark_kernels.load("triton")`. Nothing here is imported before that call.

A file per family, each with its kernels and the `Launch` that starts them; `set.py` is `interface.Kernels` over them,
`compile.py` builds every launch ahead of time for GPUs that need not be present, `costs.py` counts the bytes and FLOPs
of each. docs/kernels.md has the choices, tables and checks.
"""
