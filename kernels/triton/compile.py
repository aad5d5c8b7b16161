"""Compile every kernel for GPUs that need not be here, and say what each takes of one.

    python -m dspark_kernels.triton.compile [--targets 80 90 100] [--models Qwen3-8B] [--families attention] [--one]

prints registers a thread, bytes spilled to local memory, shared memory of a block, and occupancy: the share of a
streaming multiprocessor's warps that fit at once. Keys are split as on an H100 (132 multiprocessors). Kernels over e4m3
are not compiled for sm_80, which has none: "-". Exits 1 if a kernel spills or does not fit its GPU. These are facts of
the binary; how fast it is, they do not say.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from dspark_kernels.triton import fp8
from dspark_kernels.triton.latent_shapes import FLASH, PRO, Compressed, compressed_cases
from dspark_kernels.triton.launch import H100, Gpu, Launch
from dspark_kernels.triton.shapes import OTHERS, QWEN3_8B, SMOLLM2, Case, Model, cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor, equal on all three GPUs
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes of a multiprocessor; a block has at most 1 KiB less
MODELS: tuple[Model | Compressed, ...] = (QWEN3_8B, SMOLLM2, FLASH, PRO, *OTHERS)


@dataclass(frozen=True)
class Usage:
    """Resources of a block of a compiled kernel: warps, registers per thread, bytes of stack (spills) and shared
    memory.
    """

    capability: int
    warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def blocks(self) -> int:
        """Number of blocks that a multiprocessor holds at once; 0: the kernel does not fit."""
        if self.shared + 1024 > SHARED[self.capability]:
            return 0
        of_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out to warps, 256 at a time
        return min(
            REGISTERS // (of_warp * self.warps),
            SHARED[self.capability] // (self.shared + 1024),  # the driver keeps 1 KiB of each block
            WARPS // self.warps,
            BLOCKS,
        )

    @property
    def occupancy(self) -> float:
        """Warps at once, as a share of the most possible."""
        return self.blocks * self.warps / WARPS


def usage(launch: Launch, capability: int) -> Usage | None:
    """Compile for sm_`capability` and read the binary's resources; None: the kernel uses e4m3, which it lacks.

    Raises CompilationError if Triton cannot compile it.
    """
    if capability < fp8.CAPABILITY and "*fp8e4nv" in launch.signature().values():
        return None
    source = ASTSource(
        launch.kernel,
        signature={
            name: "constexpr" if name in launch.constants else kind for name, kind in launch.signature().items()
        },
        constexprs=launch.constexprs(),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    spilled = int(fields["STACK"]) + int(fields["LOCAL"])
    return Usage(capability, compiled.metadata.num_warps, int(fields["REG"]), spilled, compiled.metadata.shared)


def table(found: list[tuple[str, Case, list[Usage | None]]]) -> Iterator[str]:
    """Markdown, a line for each launch, a column of figures for each target."""
    yield "| model | kernel | configuration | warps | registers | spilled, B | shared, KiB | occupancy, % |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for model, case, usages in found:
        cells = (
            (str(u.registers) if u else "-" for u in usages),
            (str(u.spilled) if u else "-" for u in usages),
            (f"{u.shared / 1024:.1f}" if u else "-" for u in usages),
            (f"{100 * u.occupancy:.0f}" if u else "-" for u in usages),
        )
        figures = " | ".join(" / ".join(cell) for cell in cells)
        yield f"| {model} | {case.family} | {case.configuration} | {case.launch.num_warps} | {figures} |"


def _cases_of(model: Model | Compressed, capability: int) -> Iterator[Case]:
    if isinstance(model, Compressed):
        return compressed_cases(model)  # the same for all GPUs
    return cases(model, Gpu(H100.processors, capability))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], choices=[80, 90, 100])
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS])
    parser.add_argument("--families", nargs="+", help="attention, combine, norm, …: all")
    parser.add_argument("--one", action="store_true", help="the first launch of each family only")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled.", file=sys.stderr)
        return 2
    found: list[tuple[str, Case, list[Usage | None]]] = []
    with ThreadPoolExecutor() as pool:
        for model in (model for model in MODELS if model.name in arguments.models):
            each = [list(_cases_of(model, capability)) for capability in arguments.targets]
            for same in zip(*each, strict=True):
                known = any(model.name == name and case.family == same[0].family for name, case, _ in found)
                if not (arguments.one and known) and same[0].family in (arguments.families or [same[0].family]):
                    usages = pool.map(lambda case, capability: usage(case.launch, capability), same, arguments.targets)
                    found.append((model.name, same[0], list(usages)))
    print(f"Triton {triton.__version__}; figures for {' / '.join(f'sm_{target}' for target in arguments.targets)}.\n")
    print("\n".join(table(found)))
    bad = [f"{model}: {case.family}, {case.configuration}" for model, case, usages in found
           if any(u and (u.spilled or not u.blocks) for u in usages)]  # fmt: skip
    print(f"\n{len(found)} kernels, {len(bad)} of them spill or do not fit{': ' if bad else ''}{'; '.join(bad)}.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
