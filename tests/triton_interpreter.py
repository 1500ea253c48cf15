"""Lets Triton's interpreter run beside the numpy of this project. Imported in processes that run under
TRITON_INTERPRET=1, before their first kernel.
"""

from typing import Any

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """As Triton 3.6 does, but numpy 2.4 turns only arrays without axes into an `int`, and scalars have one here."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patched
