"""How all tests run: one thread for each worker of pytest-xdist, files whole, and Triton interpreted without a GPU."""

import gc
import os
import sys
from functools import cache
from pathlib import Path

import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # another worker has the other core; processes that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
# What takes longest starts first, so that no worker is left with it at the end.
FIRST = (
    "engine/test_device_executor.py",
    "engine/test_real_lossless.py",
    "engine/test_monte_carlo.py",
    "models",
    "server",
    "distributed",
    "training",
    "kernels/test_triton_compile.py",
    "kernels/test_native.py",
    "kernels",
    "evaluation",
)


def pytest_configure(config: pytest.Config) -> None:
    """Import torch, if tests run in this process, after all that it reads."""
    if not WORKER and config.getoption("numprocesses", None):
        return
    # isort: off
    import dspark_server  # noqa: F401 - says how threads wait: torch's would spin, where two share a core
    import torch
    # isort: on

    # Settled when triton is first imported, by any test.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _rank(path: str) -> int:
    return next((rank for rank, begin in enumerate(FIRST) if path.startswith(begin)), len(FIRST))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; with `--dist loadfile` a file's tests run on one worker, where its fixtures are."""
    if WORKER:
        items.sort(key=lambda item: _rank(item.path.relative_to(HERE).as_posix()))


def pytest_collection_finish() -> None:
    """Spare tests what their libraries repeat; what no file has imported by now need not be."""
    gc.collect()
    gc.freeze()  # the collector need not look through all that is imported again and again
    for name in ("httpx", "httpx2"):  # the second is OpenAI's
        if transport := sys.modules.get(f"{name}._transports.default"):
            # A client else reads all certificate authorities anew, which takes 60 ms.
            transport.create_ssl_context = cache(transport.create_ssl_context)  # type: ignore[attr-defined]
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules:
        from tests import interpreter

        interpreter.quicken()
