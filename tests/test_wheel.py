"""The wheel has everything that the checkout has: an install that is not editable imports nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"dspark_server": "dspark_server", "kernels": "dspark_kernels"}  # and the package of each
MADE_HERE = ("__pycache__", "*.pyc", "build", "*.egg-info")


def test_the_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns(*MADE_HERE))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"{package}/{path.relative_to(source / folder)}"
        for folder, package in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert len(wanted) > 200
    assert not sorted(wanted - packed)
