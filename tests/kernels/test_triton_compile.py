"""Ahead-of-time compilation for GPUs that are not here: a kernel of each family, in a process that compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dspark_kernels.triton import compile
from dspark_kernels.triton.compile import Usage

ROOT = Path(__file__).parents[2]
TARGETS = ("80", "90", "100")
OVER_FP8 = {"attention, e4m3", "rotary, e4m3"}
DRAFTING = {"draft_tokens", "draft_tokens, filtered", "accept_drafts", "accept_drafts, jointly", "filter_logits"}
FAMILIES = {"attention", "combine", "norm", "norm_add", "gate_mul", "argmax", "rotary", "experts", *OVER_FP8, *DRAFTING}
FAMILIES |= {"latent attention"}  # the largest kernel of DeepSeek-V4
MODELS = ("SmolLM2-135M", "DeepSeek-V4-Flash, 8 ranks")


@pytest.fixture(scope="module")
def table() -> list[list[str]]:
    """The command's rows, cell by cell; it exits 1 if a kernel spills or does not fit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")  # by source, options and target
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth of the time, and nothing that the table says
    done = subprocess.run(
        [sys.executable, "-m", "dspark_kernels.triton.compile", "--one", "--models", *MODELS, "--families", *FAMILIES],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in done.stdout.splitlines()
        if line.startswith(tuple(f"| {name}" for name in MODELS))
    ]


def test_every_family_compiles_for_every_target_without_spills(table: list[list[str]]) -> None:
    assert {row[1] for row in table} == FAMILIES
    for row in table:
        registers, spilled = row[4].split(" / "), row[5].split(" / ")
        assert len(registers) == len(spilled) == len(TARGETS)
        if row[1] in OVER_FP8:
            assert registers.pop(0) == spilled.pop(0) == "-", "sm_80 has no e4m3"
        assert all(0 < int(count) <= 255 for count in registers)
        assert set(spilled) == {"0"}


def test_occupancy_is_what_registers_and_shared_memory_leave() -> None:
    assert Usage(90, warps=4, registers=32, spilled=0, shared=0).occupancy == 1.0
    assert Usage(90, warps=4, registers=128, spilled=0, shared=0).occupancy == 0.25
    assert Usage(90, warps=4, registers=129, spilled=0, shared=0).blocks == 3  # handed out by eights
    assert Usage(80, warps=8, registers=32, spilled=0, shared=80 << 10).blocks == 2
    assert Usage(80, warps=8, registers=32, spilled=0, shared=164 << 10).blocks == 0


def test_what_is_interpreted_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["compile"])
    assert compile.main() == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
