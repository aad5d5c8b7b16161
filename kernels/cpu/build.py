"""Builds the C kernels for this very machine, once, into the user's cache.

No compiler is needed at install time: the first start takes `cc`, `gcc` or `clang`, or the one that the PyPI package
`ziglang` brings, and a few seconds.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
    "-pthread",
)


class KernelBuildError(RuntimeError):
    """The native kernels cannot be built here; the message says what was tried."""


def build(extra_flags: Sequence[str] = (), compilers: Sequence[Sequence[str]] | None = None) -> Path:
    """Path of the shared library, built now unless the cache has it.

    `extra_flags` follow the default ones; `compilers` (command lines) replace those found on this machine. Raises
    KernelBuildError if none of them can build.
    """
    failures = []
    for compiler in find_compilers() if compilers is None else compilers:
        try:
            return _build_with(compiler, (*FLAGS, *_machine_flags(), *extra_flags))
        except (OSError, subprocess.SubprocessError) as error:
            stderr = getattr(error, "stderr", None) or str(error)
            failures.append(f"{' '.join(compiler)}: {stderr.strip()[-2000:]}")
    tried = "\n".join(failures) or "no cc, gcc, clang on PATH and no ziglang package (pip install ziglang brings one)"
    raise KernelBuildError(f"cannot build the native kernels: {tried}")


def find_compilers() -> Iterator[list[str]]:
    """C compilers of this machine, the preferred one first, as command lines."""
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            yield [path]
    if importlib.util.find_spec("ziglang"):
        yield zig_compiler()


def zig_compiler() -> list[str]:
    """The command line of the C compiler in the PyPI package `ziglang`."""
    return [sys.executable, "-m", "ziglang", "cc"]


def cache_directory() -> Path:
    """Directory of built kernels: below DSPARK_CACHE_DIR, or ~/.cache/dspark-server."""
    root = os.environ.get("DSPARK_CACHE_DIR") or Path.home() / ".cache" / "dspark-server"
    return Path(root).expanduser() / "kernels"


def _build_with(compiler: Sequence[str], flags: Sequence[str]) -> Path:
    directory = cache_directory() / _fingerprint(compiler, flags)
    library = directory / "kernels.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        if not library.exists():
            sources = [str(path) for path in SOURCES if path.suffix == ".c"]
            _compile([*compiler, *flags, *sources], library)
    return library


def _compile(command: Sequence[str], library: Path) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch) / "kernels.so"
        subprocess.run([*command, "-o", str(output), "-lm"], check=True, capture_output=True, text=True, timeout=300)
        output.replace(library)  # atomic: another process sees the whole library or none
    seconds = time.perf_counter() - started
    print(f"dspark: built the native kernels in {seconds:.1f} s ({library})", file=sys.stderr)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Of processes that start at once, the ranks of a server or workers of a test run, one builds; the others wait.

    Where directories cannot be locked (Windows, some network file systems), each builds.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and unlocks


def _fingerprint(compiler: Sequence[str], flags: Sequence[str]) -> str:
    """Hash of everything that could change the library: sources, compiler, flags, processor."""
    digest = hashlib.sha256(repr((list(compiler), _version(compiler), list(flags), _processor())).encode())
    for path in SOURCES:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(compiler: Sequence[str]) -> str:
    if "ziglang" in compiler:
        return metadata.version("ziglang")
    return subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout


def _processor() -> str:
    """The properties of the processor that `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _machine_flags() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        flags = ["-march=native", "-mprefer-vector-width=512"]
        # VDPBF16PS does twice the multiplications of float32 FMA on AMD's cores, and half of them on Intel's.
        return [*flags, "-DDSPARK_BFLOAT16_DOT"] if "AuthenticAMD" in _processor() else flags
    return ["-mcpu=native"]
