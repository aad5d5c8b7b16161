"""Triton's interpreter, in half the time: its language is replaced once in a launch, not for each call within it.

For a launch it replaces the functions of `triton.language` by its own, and does so again whenever the kernel calls
another function, going through every member of the modules and classes to find that all are replaced already.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replace: Callable[[Callable[..., Any]], Any] = interpreter._patch_lang


@functools.cache
def _languages(module: str) -> tuple[ModuleType, ...]:
    """Those of the two modules of the language that this one sees."""
    seen = vars(sys.modules[module]).values()
    return tuple(language for language in (tl, tl.core) if any(value is language for value in seen))


def _replace_once(function: Callable[..., Any]) -> Any:
    if any(tl.core.is_builtin(language.load) for language in _languages(function.__module__)):
        return _replace(function)
    return interpreter._LangPatchScope()  # nothing to restore


def quicken() -> None:
    """Works on the pinned version of Triton; where its parts have other names, an AttributeError says so."""
    interpreter._patch_lang = _replace_once
