"""Lets Triton's interpreter run beside the numpy of this project, and faster. Imported in processes that run under
TRITON_INTERPRET=1, before their first kernel.
"""

from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang
_compiled_range = tl.static_range
_type_of_tuple = tl.core._type_for_tuple_values
_dtype_of = interpreter._get_np_dtype
_dtype_of_number = cache(_dtype_of)


def _patched_tensor(tensor: Any, scope: Any) -> None:
    """As Triton 3.6 does, but numpy 2.4 turns only arrays without axes into an `int`, and scalars have one here."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _patched_language(function: Any) -> Any:
    """As Triton 3.6 does, but once for a launch and not again for each function that a kernel calls."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if all(language.static_range is not _compiled_range for language in languages):
        return interpreter._LangPatchScope()
    return _patch_language(function)


def _known_dtype(dtype: Any) -> np.dtype[Any]:
    """As Triton 3.6 does, but its table is not made anew for each tensor."""
    scalar = dtype.scalar
    return _dtype_of(scalar) if scalar.is_ptr() else _dtype_of_number(scalar)


@cache
def _type_of_sizes(sizes: tuple[int, ...]) -> Any:
    return _type_of_tuple([tl.constexpr(size) for size in sizes])


def _type_of(values: Any, fields: Any = None) -> Any:
    """As Triton 3.6 does, but the types of shapes, one for each tensor, are made once."""
    if fields is None and all(type(value) is tl.constexpr and type(value.value) is int for value in values):
        return _type_of_sizes(tuple(value.value for value in values))
    return _type_of_tuple(values, fields)


tl.core._type_for_tuple_values = _type_of
interpreter._get_np_dtype = _known_dtype
interpreter._patch_lang_tensor = _patched_tensor
interpreter._patch_lang = _patched_language
