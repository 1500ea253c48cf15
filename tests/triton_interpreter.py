"""Lets Triton's interpreter run beside the numpy of this project, and faster. Imported in processes that run under
TRITON_INTERPRET=1, before their first kernel.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang
_compiled_range = tl.static_range


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


interpreter._patch_lang_tensor = _patched_tensor
interpreter._patch_lang = _patched_language
