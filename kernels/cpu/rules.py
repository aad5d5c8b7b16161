"""The rules of requests as rules.c reads them."""

import ctypes
from collections.abc import Iterable
from ctypes import c_float, c_long, c_void_p

from dspark_kernels.interface import Rules

_POINTERS = ("touched", "bias", "seen", "counts", "allowed", "words", "tail", "early")
_SIZES = {"touched": "touched_count", "words": "words_length", "tail": "tail_length", "early": "early_count"}


class _Rules(ctypes.Structure):
    """`Rules` of rules.h."""

    _fields_ = [
        *((name, c_void_p) for name in _POINTERS),
        *((name, c_long) for name in (*_SIZES.values(), "until")),
        *((name, c_float) for name in ("repetition", "frequency", "presence", "unused")),
    ]


_NONE = bytes(_Rules())


def packed_rules(every: Iterable[Rules | None]) -> bytes:
    """The structures of these rules, one after the other. They hold addresses of the rules' tensors."""
    return b"".join(_NONE if rules is None else _packed(rules) for rules in every)


def _packed(rules: Rules) -> bytes:
    packed: bytes | None = rules.__dict__.get("_packed")  # kept beside them: a step needs it twice
    if packed is None:
        found = {name: tensor for name in _POINTERS if (tensor := getattr(rules, name)) is not None}
        structure = _Rules(
            **{name: tensor.data_ptr() for name, tensor in found.items()},
            **{size: len(found[name]) for name, size in _SIZES.items() if name in found},
            until=rules.until,
            repetition=rules.repetition,
            frequency=rules.frequency,
            presence=rules.presence,
        )
        packed = rules.__dict__["_packed"] = bytes(structure)
    return packed
