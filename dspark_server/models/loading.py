"""Strict reading of safetensors checkpoints: a missing, unexpected or damaged tensor is an error that names it.

Tensors dropped silently have halved acceptance in other loaders (a drafter's head that was never loaded), so every
tensor of a checkpoint must be requested. Only safetensors are read: pickle runs code.
"""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models import packed
from dspark_server.models.block_scaled import expanded, scale_shape, scaled, stored_shape
from dspark_server.models.fields import GGUF_IS_NOT_READ, read_json
from dspark_server.models.layers.rope import RopeConfig, may_be_frequencies
from dspark_server.models.quantization import packed_version
from dspark_server.runtime.quantized import QuantizedMatrix

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

EVERY = slice(None)
_INTEGERS = ("I64", "I32", "I16", "U16", "U8", "BOOL")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_SCALED = ("F8_E4M3", "I8")  # beside e8m0 scales
_SCALES = ("F8_E8M0",)
_FLOAT_SCALES = ("weight_scale_inv", "weight_scale")  # in place of "weight" at the end of a name
# Buffers that old exporters saved; rotary frequencies are computed from the config, and must agree with them.
_FREQUENCIES = r".*rotary_emb\.inv_freq"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a file's header; `dtype` is safetensors' name, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a model directory, read one by one from memory-mapped files."""

    def __init__(self, directory: Path, files: dict[Path, Any], tensors: dict[str, TensorInfo]) -> None:
        self.directory = directory
        self.tensors = tensors
        self._files = files

    def read(self, name: str) -> Tensor:
        """Return the tensor as stored. Raises CheckpointError if its bytes cannot be read."""
        info = self.tensors[name]
        try:
            tensor: Tensor = self._files[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read ({error}); download it again") from error
        return tensor


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open model.safetensors, or the shards that model.safetensors.index.json names, reading headers only.

    Raises CheckpointError for a directory without safetensors, a damaged or truncated file, an absent shard, or an
    index that disagrees with its shards.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a model directory or a Hugging Face model id")
    if (directory / SINGLE_FILE).is_file():
        handles, tensors = _open_files([directory / SINGLE_FILE])
        return Checkpoint(directory, handles, tensors)
    if not (directory / INDEX_FILE).is_file():
        raise CheckpointError(_no_weights(directory))

    shard_of = _read_index(directory / INDEX_FILE)
    handles, tensors = _open_files(sorted(set(shard_of.values())))
    for name, shard in shard_of.items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(f"{directory / INDEX_FILE}: tensor {name} is not in {shard}; download both again")
    return Checkpoint(directory, handles, tensors)


def _no_weights(directory: Path) -> str:
    if gguf := next(iter(sorted(directory.glob("*.gguf"))), None):
        return f"{directory} holds {gguf.name}: {GGUF_IS_NOT_READ}"
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} holds pickled weights ({pickles[0]}), which can run code and are not read; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    return f"{directory} holds no weights: expected {SINGLE_FILE}, or {INDEX_FILE} and its shards"


def _read_index(path: Path) -> dict[str, Path]:
    """Return tensor name -> shard; all shards exist beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download it again")
    shard_of = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: tensor {name} is said to be in {file!r}, which is not a plain file name")
        shard_of[name] = path.parent / file
        if not shard_of[name].is_file():
            raise CheckpointError(f"{path} names {file} (for tensor {name}), which is absent; download the model again")
    return shard_of


def _open_files(paths: list[Path]) -> tuple[dict[Path, Any], dict[str, TensorInfo]]:
    """Return handles and the headers' entries. Opening checks each header against the file's size."""
    handles: dict[Path, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        try:
            handle: Any = safe_open(path, framework="pt")
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or not a safetensors file ({error}); download it again"
            ) from error
        handles[path] = handle
        for name, entry in slices.items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is both in {tensors[name].file} and in {path}; keep one of them")
            tensors[name] = TensorInfo(path, entry.get_dtype(), tuple(entry.get_shape()))
    return handles, tensors


def weight_bytes(checkpoint: Checkpoint, itemsize: int, ranks: int, whole: str, unused: tuple[str, ...]) -> int:
    """Bytes of the weights on one of `ranks`, of `itemsize` each, from the headers alone.

    The tensor whose name ends with `whole` is on every rank; those whose names begin with one of `unused` are on none.
    """
    shared = everywhere = 0
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for name, info in checkpoint.tensors.items():
        if name.startswith(unused or "\0") or info.dtype in _SCALES or name.endswith(_FLOAT_SCALES + packed.BESIDE):
            continue
        pairs = info.dtype == "I8" and _float_scale(checkpoint, name) is None
        count = prod(info.shape) * (2 if pairs else 1)
        if name.endswith(packed.WORDS):
            count = packed.count_values(shapes, checkpoint.read, name)
        if name.endswith(whole):
            everywhere += count
        else:
            shared += count
    return (everywhere + -(-shared // ranks)) * itemsize


def stored_names(tensors: Container[str], name: str) -> list[str]:
    """The names of the tensors that hold one weight: its own, those of its scales, or those of its words."""
    if not name.endswith(".weight"):
        return [name]
    ends = ("weight", "scale", *_FLOAT_SCALES, *packed.WORDS, *packed.BESIDE)
    names = [name.removesuffix("weight") + end for end in ends]
    return [each for each in names if each in tensors]


def _float_scale(checkpoint: Checkpoint, name: str) -> str | None:
    """The name of the floats that scale a weight of 8 bits; None: it has none."""
    names = [name.removesuffix("weight") + each for each in _FLOAT_SCALES]
    return next((each for each in names if each in checkpoint.tensors), None)


class WeightReader:
    """Reads a checkpoint's tensors by name and shape, in one dtype, and checks that none is left over.

    `where`: the device of the tensors; None: the CPU.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, where: torch.device | None = None) -> None:
        self.dtype = dtype
        self.where = where or torch.device("cpu")
        self._checkpoint = checkpoint
        self._taken: set[str] = set()
        self._left: set[str] = set()  # prefixes

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint.tensors or self._is_packed(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if there is none."""
        info = self._checkpoint.tensors.get(name)
        return None if info is None else info.shape

    def take(
        self,
        name: str,
        shape: Sequence[int],
        rows: slice = EVERY,
        columns: slice = EVERY,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the tensor, or these of its rows and columns, in `dtype` (None: the reader's); `shape` of the whole.

        Files are memory-mapped: other rows are neither read nor checked; the rank that uses them does both.

        Raises CheckpointError if it is absent, of another shape or an unsupported dtype, or holds NaN or infinity.
        """
        if len(shape) == 2 and self._is_packed(name):
            whole = self._packed(name, (shape[0], shape[1])).expanded(torch.float32)
            return self._finite(name, whole[rows][:, columns].to(self.where).to(dtype or self.dtype))
        info = self._find(name, shape)
        if info.dtype in _BLOCK_SCALED and len(shape) == 2:
            tensor = self._expanded(name, info, tuple(shape), rows, columns)
        elif info.dtype in _DTYPES:
            tensor = self._checkpoint.read(name)[rows]
            tensor = tensor if columns == EVERY else tensor[:, columns]
        else:
            raise CheckpointError(
                f"{info.file}: tensor {name} has dtype {info.dtype}; {', '.join(_DTYPES.values())} are supported, and "
                "8 and 4 bits with scales of blocks"
            )
        return self._finite(name, tensor.to(self.where).to(dtype or self.dtype))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # either bound is NaN if any element is
            raise CheckpointError(
                f"{self._checkpoint.directory}: tensor {name} holds NaN or infinity; download or export it again"
            )
        return tensor

    @cached_property
    def _packed_version(self) -> str:
        return packed_version(self._checkpoint.directory)

    def _is_packed(self, name: str) -> bool:
        stem = name.removesuffix("weight")
        return stem != name and any(stem + each in self._checkpoint.tensors for each in packed.WORDS)

    def _packed(self, name: str, shape: tuple[int, int]) -> QuantizedMatrix:
        """A weight that is packed into words."""
        stem = name.removesuffix("weight")

        def read(end: str) -> Tensor | None:
            return self._checkpoint.read(stem + end) if stem + end in self._checkpoint.tensors else None

        self._taken.update(stored_names(self._checkpoint.tensors, name))
        try:
            return packed.read_packed(read, shape, self._packed_version)
        except CheckpointError as error:
            raise CheckpointError(f"{self._checkpoint.directory}: {name}: {error}") from None

    def _expanded(self, name: str, info: TensorInfo, shape: tuple[int, ...], rows: slice, columns: slice) -> Tensor:
        """Part of a weight that is stored beside scales, in float32."""
        if floats := _float_scale(self._checkpoint, name):
            found = self._checkpoint.tensors[floats]
            if found.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{found.file}: tensor {floats} has dtype {found.dtype}, where floats are expected"
                )
            self._taken.add(floats)
            try:
                return scaled(self._checkpoint.read(name), self._checkpoint.read(floats), rows, columns)
            except CheckpointError as error:
                raise CheckpointError(f"{info.file}: tensor {name}: {error}") from None
        scale = name.removesuffix("weight") + "scale"
        if self._find(scale, scale_shape(info.dtype, shape)).dtype not in _SCALES:
            raise CheckpointError(f"{info.file}: tensor {scale} should hold e8m0 scales of {name}")
        codes, scales = self._checkpoint.read(name), self._checkpoint.read(scale)
        try:
            return expanded(codes, scales, shape, rows, columns)
        except CheckpointError as error:
            raise CheckpointError(f"{info.file}: tensor {name}: {error}; download or export it again") from None

    def leave(self, prefix: str) -> None:
        """Pass over the tensors whose names begin with `prefix`, which ends with a dot: another rank reads them."""
        self._left.add(prefix)

    def _is_left(self, name: str) -> bool:
        # Looked up, not searched for: a checkpoint has 150,000 names and 20,000 experts.
        return any(name[: place + 1] in self._left for place, letter in enumerate(name) if letter == ".")

    def integers(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a tensor of indices or flags, as int64.

        Raises CheckpointError if it is absent, of another shape or type.
        """
        info = self._find(name, shape)
        if info.dtype not in _INTEGERS:
            raise CheckpointError(f"{info.file}: tensor {name} has dtype {info.dtype}, where integers are expected")
        return self._checkpoint.read(name).long().to(self.where)

    def _find(self, name: str, shape: Sequence[int]) -> TensorInfo:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self._checkpoint.directory}: tensor {name} is missing; the checkpoint is incomplete, "
                "or its config.json belongs to another model"
            )
        whole = _float_scale(self._checkpoint, name) is not None  # two of four bits make a byte, one of eight does
        if info.shape != (tuple(shape) if whole else stored_shape(info.dtype, tuple(shape))):
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, but config.json asks for {list(shape)}; "
                "weights and config.json must come from the same model"
            )
        self._taken.add(name)
        return info

    def finish(self, ropes: Iterable[tuple[RopeConfig, int]] = (), unused: tuple[str, ...] = ()) -> None:
        """Raise CheckpointError if a tensor was never requested, except those whose names begin with one of `unused`.

        Buffers of rotary frequencies are passed over if they hold those of `ropes`, each with its head size.
        """
        left = sorted(self._checkpoint.tensors.keys() - self._taken)
        left = [name for name in left if not (name.startswith(unused or "\0") or self._is_left(name))]
        frequencies = [name for name in left if ropes and re.fullmatch(_FREQUENCIES, name)]
        for name in frequencies:
            stored = self._checkpoint.read(name)
            if not any(may_be_frequencies(stored, *rope) for rope in ropes):
                raise CheckpointError(
                    f"{self._checkpoint.tensors[name].file}: {name} holds other rotary frequencies than config.json's "
                    "rope settings give; weights and config.json must come from the same model"
                )
        left = [name for name in left if name not in frequencies]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(
                f"{self._checkpoint.tensors[left[0]].file}: unexpected tensor {left[0]}{more}; "
                "weights and config.json must come from the same model"
            )
