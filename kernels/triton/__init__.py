"""The GPU's kernel set, in Triton: `dspark_kernels.load("triton")`. Nothing here is imported unless it is asked for.

A file per family, each with its kernels and the `Launch` that says how they are started; `set.py` is
`interface.Kernels` over them, `compile.py` builds every launch ahead of time for GPUs that need not be there,
`costs.py` counts what each must read, write and compute. docs/kernels.md has the choices, tables and what was checked.
"""
