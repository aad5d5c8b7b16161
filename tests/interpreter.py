"""Triton's interpreter in a fraction of its time: the same operations on the same arrays, without repeated bookkeeping.

Of an operation on a block, NumPy takes a small part; the rest goes into types, shapes and constants that are made anew
for it. Here the language is replaced once in a process, not for each launch and call; there is one object of each block
type; operands of one type are not converted to a common one; and the checks for overflows, which are computed in int64
beside each operation on integers and reported in debug mode only, are left out.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_SEMANTIC = interpreter.interpreter_semantic
_BUILTIN = tl.core.builtin(lambda: None).__code__


def _bind(holder: Any, name: str, member: Any, builder: object, scope: Any) -> None:
    """`_patch_attr` without the check that `_semantic` is given, and one call the less."""
    function = member.__wrapped__ if member.__code__ is _BUILTIN else member

    def call(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = _SEMANTIC
        return function(*arguments, **named)

    scope.set_attr(holder, name, call)


def _share_block_types() -> None:
    """Makes `block_type` give the same object for the same element type and shape."""
    known: dict[tuple[Any, ...], Any] = {}
    begin = tl.block_type.__init__

    def new(cls: type, element: Any, shape: Any) -> Any:
        sizes = tuple([size.value if type(size) is tl.constexpr else size for size in shape])
        key = (element.name, getattr(element, "address_space", None), sizes)
        if key not in known:
            known[key] = object.__new__(cls)
        return known[key]

    def begin_once(self: Any, element: Any, shape: Any) -> None:
        if "name" not in vars(self):  # set last
            begin(self, element, shape)

    tl.block_type.__new__, tl.block_type.__init__ = new, begin_once


def _begin_tensors() -> Callable[..., None]:
    """`tensor.__init__`, which makes a shape once and finds it with the type."""
    shapes: dict[tuple[int, ...], Any] = {}

    def begin(self: Any, handle: Any, of: Any) -> None:
        self.handle, self.type = handle, of
        if "parts" not in vars(of):
            sizes = tuple(of.shape) if of.is_block() else ()
            shape = shapes.setdefault(sizes, tl.tuple([tl.constexpr(size) for size in sizes]))
            of.parts = shape, tl.constexpr(math.prod(sizes)), of.scalar
        self.shape, self.numel, self.dtype = of.parts

    return begin


def _remember_by_type(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of a type that needs no more than its name."""
    known: dict[str, Any] = {}

    def call(of: Any) -> Any:
        if of.name not in known:
            known[of.name] = function(of)
        return known[of.name]

    return call


def _convert_operands(function: Callable[..., Any]) -> Callable[..., Any]:
    """`binary_op_type_checking_impl`: operands of one type are left as they are, a number fills a block once a type.

    Of its options, the first two let pointers through; a call with more, as of a division, is left to `function`.
    """

    def with_number(self: Any, at: int, operands: list[Any], options: tuple[bool, ...]) -> Any:
        number, other = operands[at], operands[1 - at]
        key = at, type(number), number, math.copysign(1.0, number)
        constants = vars(other.type).setdefault("constants", {})
        if key in constants:
            operands[at] = constants[key]
            return operands
        results = function(self, *operands, *options)
        if results[1 - at] is other:  # it was not converted
            results[at].handle.data.flags.writeable = False
            constants[key] = results[at]
        return results

    def call(self: Any, left: Any, right: Any, *options: bool, **named: bool) -> Any:
        blocks = type(left) is tl.tensor, type(right) is tl.tensor
        if named or len(options) > 2 or not any(blocks):
            return function(self, left, right, *options, **named)
        if not all(blocks):
            return with_number(self, blocks.index(False), [left, right], options)
        if left.type is right.type and not left.dtype.is_ptr():
            return left, right
        return function(self, left, right, *options)

    return call


def _broadcast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`broadcast_impl_value`, which compares two equal shapes size by size."""
    return lambda self, left, right: (left, right) if left.shape is right.shape else function(self, left, right)


def _same_or(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self is other or function(self, other)


def _unwrap(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value if type(value) is tl.tensor else function(value)


def quicken() -> None:
    """Works on the pinned version of Triton; where its parts have other names, an AttributeError says so."""
    assert not interpreter.interpreter_builder.options.debug, "overflows would be reported"
    interpreter._patch_attr = _bind
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()  # nothing to restore
    interpreter._get_np_dtype = _remember_by_type(interpreter._get_np_dtype)
    _share_block_types()
    tl.tensor.__init__ = _begin_tensors()
    semantic = type(_SEMANTIC)
    semantic.binary_op_sanitize_overflow_impl = lambda *_: None
    semantic.binary_op_type_checking_impl = _convert_operands(semantic.binary_op_type_checking_impl)
    semantic.broadcast_impl_value = _broadcast(semantic.broadcast_impl_value)
    tl.core._unwrap_if_constexpr = _unwrap(tl.core._unwrap_if_constexpr)
    tl.dtype.__eq__ = _same_or(tl.dtype.__eq__)
    for name in ("is_int", "is_int_signed", "is_int_unsigned", "is_floating", "is_standard_floating", "kind"):
        setattr(tl.dtype, name, _remember_by_type(getattr(tl.dtype, name)))
