"""Opens a model's tensors, whatever kind of files they are in. It does not depend on parameters or rules."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weights.dequantise import Tensors
from weights.files import TensorFiles
from weights.folder import is_gguf, read_json
from weights.gguf.names import tensor_parts
from weights.gguf.reader import GgufFile
from weights.gguf.tensors import GgufTensors
from weights.source import TensorSource


@contextmanager
def open_tensors(model: Path, raw: Mapping[str, Any]) -> Iterator[TensorSource]:
    """The tensors of the model at a path, a folder or a GGUF file, whose config.json is `raw`.

    Raises:
        CheckpointError: a file is missing or damaged, or has tensors of kinds that are not read.
    """
    if is_gguf(model):
        with GgufFile(model) as file:
            yield GgufTensors(file, tensor_parts(file, raw))
    else:
        with TensorFiles(model) as files:
            yield Tensors(files, quantisation(model, raw))


def quantisation(folder: Path, raw: Mapping[str, Any]) -> object:
    """How a folder says that its weights are quantised: in config.json, or in the file that ModelOpt writes beside it.

    Raises:
        CheckpointError: that file cannot be read.
    """
    beside = folder / "hf_quant_config.json"
    if "quantization_config" in raw or not beside.exists():
        return raw.get("quantization_config")
    fields = read_json(beside).get("quantization")
    return {"quant_method": "modelopt"} | fields if isinstance(fields, dict) else None
