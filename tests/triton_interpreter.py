"""Lets Triton's interpreter run beside the numpy of this project, and faster. Imported in processes that run under
TRITON_INTERPRET=1, before their first kernel.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang
_compiled_range = tl.static_range
_new_tuple = tl.core.tuple.__init__
_new_block_type = tl.core.block_type.__init__
_block_types: dict[Any, dict[str, Any]] = {}
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
    """As Triton 3.6 does, but its table is made once, not for each tensor."""
    scalar = dtype.scalar
    return _dtype_of(scalar) if scalar.is_ptr() else _dtype_of_number(scalar)


def _untyped_tuple(self: Any, args: Any, type: Any = None) -> None:
    """As Triton 3.6 does, but the type of a tuple, and every tensor's shape is one, is made when it is asked for."""
    if type is None:
        self.values, self._type = list(args), None
    else:
        _new_tuple(self, args, type)


def _tuple_type(self: Any) -> Any:
    if self._type is None:
        self._type = tl.core._type_for_tuple_values(self.values)
    return self._type


def _known_block_type(self: Any, element_ty: Any, shape: Any) -> Any:
    """As Triton 3.6 does, but what it derives from a number's type and a shape is derived once for each."""
    if element_ty.is_ptr():
        return _new_block_type(self, element_ty, shape)
    key = (element_ty, tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    if key not in _block_types:
        _new_block_type(self, element_ty, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key])


def _shapeless_tensor(self: Any, handle: Any, type: Any) -> None:
    """As Triton 3.6 does, but shape and size are made when they are asked for."""
    self.handle, self.type, self.dtype = handle, type, type.scalar


def _tensor_shape(self: Any) -> Any:
    return tl.core.tuple([tl.constexpr(size) for size in self.type.shape] if self.type.is_block() else [])


def _tensor_size(self: Any) -> Any:
    return tl.constexpr(self.type.numel if self.type.is_block() else 1)


tl.core.block_type.__init__ = _known_block_type
tl.core.tensor.__init__ = _shapeless_tensor
tl.core.tensor.shape, tl.core.tensor.numel = property(_tensor_shape), property(_tensor_size)
tl.core.tuple.__init__ = _untyped_tuple
tl.core.tuple.type = property(_tuple_type, lambda self, type: setattr(self, "_type", type))
options = interpreter.interpreter_builder.options
interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)  # would be asserted if it debugged
interpreter._get_np_dtype = _known_dtype
interpreter._patch_lang_tensor = _patched_tensor
interpreter._patch_lang = _patched_language
