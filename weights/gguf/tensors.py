"""The tensors of a GGUF file under Hugging Face's names, as a loader reads them. It does not depend on families."""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.grouped import Grouped
from weights.files import Stored
from weights.gguf.parts import Part
from weights.gguf.reader import GgufFile


class GgufTensors:
    """A `TensorSource` (see `weights/source.py`) of one file. Tensors are read one at a time."""

    def __init__(self, file: GgufFile, parts: Mapping[str, Part]) -> None:
        """`parts`: see `weights/gguf/names.py`."""
        self._file, self._parts = file, parts
        self.stored: dict[str, Stored] = {name: part.stored(file) for name, part in parts.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, ready to be copied into a parameter."""
        return self._parts[name].dense(self._file)

    def read_into(self, name: str, target: Tensor) -> None:
        """One tensor that is stored as `target` is."""
        with torch.no_grad():
            target.copy_(self.read(name))

    def grouped(self, name: str) -> Grouped | None:
        """Quantised matrices without widening them, or None where `read` alone has them."""
        return self._parts[name].grouped(self._file)
