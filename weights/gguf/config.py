"""What a GGUF file's metadata says of its decoder, as a config.json of the family would.

Torch-free, so that the HTTP process may use it. The families' tables are in `weights/gguf/families.py`, and what they
share in `weights/gguf/common.py`.
"""

import struct
from itertools import islice
from typing import Any, NoReturn

from model.config_reader import MAX_LAYERS
from model.errors import CheckpointError, shown
from weights.gguf.harmless import harmless
from weights.gguf.header import Scalar
from weights.gguf.reader import GgufFile

MAX_ROTARY = 65_536
MAX_KEYS_IN_MESSAGE = 20  # keys in one message
YARN = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "attention_factor": "rope.scaling.yarn_attn_factor",
}


class Described:
    """The metadata of one architecture, with types checked, and which tensors there are. It records which keys were
    read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.name = file.paths[0].name
        self._read: set[str] = set()
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            self.fail(f"general.architecture is {shown(architecture)}, no name")
        self.architecture = architecture

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.name}: {message}")

    def get(self, key: str) -> Scalar | None:
        """The value of `{architecture}.{key}`; of a value per layer, the one that all share. Numbers of 32 bits that
        are stored as floats are the shortest decimals that mean them: 1e-6, not 9.999999974752427e-07."""
        self._read.add(key)
        key = f"{self.architecture}.{key}"
        value = self.file.metadata.get(key)
        if isinstance(value, list):
            if len(set(value)) != 1:
                self.fail(f"{key} differs between layers, which is not supported: {shown(value)}")
            value = value[0]
        return _shortest(value) if isinstance(value, float) else value

    def number(self, key: str) -> int:
        """A count that must be there."""
        value = self.get(key)
        if type(value) is not int:
            self.fail(f"{self.architecture}.{key} is {shown(value)}, but a whole number is needed")
        return value

    def mark_read(self, *keys: str) -> None:
        """Count these keys as read: the family does not depend on their values, or knows them otherwise."""
        self._read.update(keys)

    def expect(self, key: str, *values: Scalar) -> None:
        """Require the key to be absent or one of the values that the family supports."""
        value = self.get(key)
        if value is not None and value not in values:
            known = " or ".join(map(repr, values))
            self.fail(f"{self.architecture}.{key} is {shown(value)}, but only {known} is supported")

    def check(self) -> None:
        """Raise CheckpointError if a key of the architecture that was not read may change what is computed."""
        prefix = f"{self.architecture}."
        own = {key[len(prefix) :]: value for key, value in self.file.metadata.items() if key.startswith(prefix)}
        unread = (key for key, value in own.items() if key not in self._read and not harmless(key, value))
        if unknown := [f"{shown(prefix + key)} is {shown(own[key])}" for key in islice(unread, MAX_KEYS_IN_MESSAGE)]:
            self.fail(f"keys that the family does not know, and that may change what it computes: {', '.join(unknown)}")

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    @property
    def layers(self) -> int:
        """Without those for multi-token prediction, which come last."""
        layers = self.number("block_count") - self.extra_layers
        if not 1 <= layers <= MAX_LAYERS:
            self.fail(f"{self.architecture}.block_count leaves {layers} layers; 1 to {MAX_LAYERS} are supported")
        return layers

    @property
    def extra_layers(self) -> int:
        """For multi-token prediction."""
        return 0 if self.get("nextn_predict_layers") is None else self.number("nextn_predict_layers")

    @property
    def head_width(self) -> int:
        width = self.get("attention.key_length")
        heads = self.number("attention.head_count")
        if heads < 1:
            self.fail(f"{self.architecture}.attention.head_count is {heads}")
        return self.number("embedding_length") // heads if width is None else self.number("attention.key_length")

    def without_experts(self) -> list[int]:
        """The layers that have no router."""
        return [layer for layer in range(self.layers) if not self.has(f"blk.{layer}.ffn_gate_inp.weight")]

    def floats(self, tensor: str) -> list[float]:
        """A short tensor of 32-bit floats."""
        entry = self.file.tensors[tensor]
        if entry.type.name != "F32" or len(entry.shape) != 1 or entry.shape[0] > MAX_ROTARY:
            self.fail(f"tensor {shown(tensor)} is {entry.type.name} of shape {entry.shape}; F32 of one axis is needed")
        data = bytearray(entry.nbytes)
        self.file.read_into(tensor, memoryview(data))
        return list(struct.unpack(f"<{entry.shape[0]}f", data))


def _shortest(value: float) -> float:
    """The decimal of fewest digits that is this number in 32 bits."""
    try:
        stored = struct.pack("<f", value)
    except OverflowError:
        return value  # of 64 bits
    digits = (float(f"{value:.{count}g}") for count in range(1, 10))
    return next((number for number in digits if struct.pack("<f", number) == stored), value)


def rope_scaling(said: Described) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if said.has("rope_freqs.weight"):  # Llama 3's, computed by the converter: what every frequency is divided by
        factors = said.floats("rope_freqs.weight")
        return {"rope_type": "longrope", "factor": 1.0, "short_factor": factors, "long_factor": factors}
    kind, factor = said.get("rope.scaling.type"), said.get("rope.scaling.factor")
    factor = said.get("rope.scale_linear") if factor is None else factor  # in files of 2023
    if said.has("rope_factors_long.weight") and said.has("rope_factors_short.weight"):
        said.mark_read("rope.scaling.attn_factor")  # follows from the two contexts, or is the family's
        return {
            "rope_type": "longrope",
            "long_factor": said.floats("rope_factors_long.weight"),
            "short_factor": said.floats("rope_factors_short.weight"),
            "original_max_position_embeddings": said.number("rope.scaling.original_context_length"),
        }
    if kind == "yarn":
        return _yarn(said, factor)
    said.mark_read(*YARN.values(), "rope.scaling.yarn_log_multiplier")
    if kind not in (None, "none", "linear"):
        said.fail(f"rope.scaling.type is {shown(kind)}, which is not supported; known are none, linear and yarn")
    linear = kind != "none" and factor  # llama.cpp takes what names no kind for linear
    return {"rope_type": "linear", "factor": factor} if linear else None


def _yarn(said: Described, factor: Scalar | None) -> dict[str, Any]:
    said.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)  # -1 is unset
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    found |= {name: said.get(key) for name, key in YARN.items() if said.get(key) is not None}
    return found | {"original_max_position_embeddings": said.number("rope.scaling.original_context_length")}
