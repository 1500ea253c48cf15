"""What llama.cpp's converter makes of a checkpoint is read back as the same decoder: shapes and every parameter."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.rope import _frequencies, rotary_tables
from model.errors import CheckpointError
from model.shapes.attention import Attention
from model.shapes.rope import Rope
from tests.weights.checkpoints import random_decoder
from tests.weights.gguf.architectures import RAW, converted, metadata_of, raw_of
from tests.weights.gguf.quantisers import floats, mixed
from tests.weights.gguf.writer import Blob, blob, write_gguf
from weights.config import decoder_config
from weights.gguf.families import ARCHITECTURES, raw_config
from weights.gguf.names import tensor_parts
from weights.gguf.reader import GgufFile
from weights.gguf.tensors import GgufTensors
from weights.names import rules_for

TURNED = ("experts.gate_up_proj", "experts.down_proj", "c_attn.weight", "c_proj.weight", "c_fc.weight")  # [in, out]


def test_every_architecture_is_tested() -> None:
    assert {name.partition(",")[0] for name in RAW} == set(ARCHITECTURES)


def assert_same(found: Tensor, expected: Tensor, name: str) -> None:
    """Bits; but of Qwen3-Next the file has 1 + w for w, and e to the decays."""
    if name == "qwen3next":
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", RAW)
def test_a_converted_checkpoint_is_the_same_decoder(name: str, tmp_path: Path) -> None:
    raw = raw_of(name)
    model = random_decoder(raw)
    with GgufFile(write_gguf(tmp_path / "x.gguf", metadata_of(name), converted(name, model, floats))) as file:
        found = raw_config(file)
        config = decoder_config(found)
        assert config == model.config
        source = GgufTensors(file, tensor_parts(file, found))
        used, filled = set(), set()
        for rule in rules_for(found["model_type"], config):
            parts = rule.parts()
            if parts[0].source not in source.stored or rule.target in filled:
                continue
            filled.add(rule.target)
            parameter = model.get_parameter(rule.target)
            for part in parts:
                used.add(part.source)
                stored, expected = source.stored[part.source], parameter[part.index]
                assert part.shape_error(stored.shape, expected.shape) is None
                tensor = source.read(part.source)
                assert (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype)
                assert_same(part.to_parameter(tensor), expected, name)
        assert filled == {target for target, _ in model.named_parameters()}
        assert used == source.stored.keys()


@pytest.mark.parametrize("name", RAW)
def test_groups_are_the_values_that_are_read(name: str, tmp_path: Path) -> None:
    """The types of `mixed` are exact in any form, and what parts are made of stays so."""
    tensors = converted(name, random_decoder(raw_of(name)), mixed)
    with GgufFile(write_gguf(tmp_path / "x.gguf", metadata_of(name), tensors)) as file:
        source = GgufTensors(file, tensor_parts(file, raw_config(file)))
        kept = [name for name, stored in source.stored.items() if stored.grouped]
        assert any(each.endswith("_proj.weight") or each.endswith(TURNED) for each in kept)
        for each in kept:
            values, found = source.read(each), source.grouped(each)
            assert found is not None
            if found.shape != values.shape or each.endswith(TURNED):
                values = values.transpose(-1, -2)
            assert torch.equal(found.dense(), values.float()), each
        for each in source.stored.keys() - kept:
            assert source.grouped(each) is None


def test_queries_keys_and_values_in_one_are_taken_apart(tmp_path: Path) -> None:
    model = random_decoder(raw_of("llama, biased"))
    apart = converted("llama, biased", model, floats)
    fused = {name: each for name, each in apart.items() if ".attn_q." not in name}
    for layer, ending in itertools.product((0, 1), ("weight", "bias")):
        three = [apart[f"blk.{layer}.attn_{part}.{ending}"] for part in "qkv"]
        shape = (sum(each.shape[0] for each in three), *three[0].shape[1:])
        fused[f"blk.{layer}.attn_qkv.{ending}"] = blob("F32", shape, b"".join(each.data for each in three))
        del fused[f"blk.{layer}.attn_k.{ending}"], fused[f"blk.{layer}.attn_v.{ending}"]
    found = []
    for tensors in (apart, fused):
        with GgufFile(write_gguf(tmp_path / "x.gguf", metadata_of("llama, biased"), tensors)) as file:
            source = GgufTensors(file, tensor_parts(file, raw_config(file)))
            found.append({name: (source.stored[name].shape, source.read(name)) for name in source.stored})
    assert found[0].keys() == found[1].keys()
    for name, (shape, tensor) in found[0].items():
        assert shape == found[1][name][0]
        assert torch.equal(tensor, found[1][name][1])


def test_llama_3_frequencies_are_those_of_the_file(tmp_path: Path) -> None:
    """The converter writes what every frequency is divided by, not Llama 3's parameters."""
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    rope, plain = (_rope(raw_of("llama") | {"rope_scaling": each}) for each in (scaling, None))
    positions = torch.arange(64)
    factors = _frequencies(positions, plain) / _frequencies(positions, rope)
    assert factors.min() == 1 and factors.max() == 4
    tensors = converted("llama", random_decoder(raw_of("llama")), floats) | {"rope_freqs.weight": floats("", factors)}
    metadata = {key: value for key, value in metadata_of("llama").items() if "scaling" not in key}
    with GgufFile(write_gguf(tmp_path / "x.gguf", metadata, tensors)) as file:
        found = _rope(raw_config(file))
    for ours, theirs in zip(rotary_tables(positions, found), rotary_tables(positions, rope), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def _rope(raw: dict[str, Any]) -> Rope:
    shape = decoder_config(raw).attention[0]
    assert isinstance(shape, Attention) and shape.rope is not None
    return shape.rope


def test_longrope_is_in_tensors(tmp_path: Path) -> None:
    factors = {"short": torch.linspace(1, 2, 8), "long": torch.linspace(1, 9, 8)}
    tensors = converted("phimoe", random_decoder(raw_of("phimoe")), floats)
    tensors |= {f"rope_factors_{name}.weight": floats("", each) for name, each in factors.items()}
    metadata = metadata_of("phimoe") | {"phimoe.rope.scaling.original_context_length": 32}
    metadata |= {"phimoe.rope.scaling.type": "longrope", "phimoe.rope.scaling.attn_factor": 1.19}
    with GgufFile(write_gguf(tmp_path / "x.gguf", metadata, tensors)) as file:
        found = _rope(raw_config(file))
    assert (found.scaling, found.original, found.short_mscale) == ("longrope", 32, found.long_mscale)
    assert (found.short_factor, found.long_factor) == (
        tuple(factors["short"].tolist()),
        tuple(factors["long"].tolist()),
    )


Change = Callable[[dict[str, Any], dict[str, Blob]], object]
REFUSED: dict[str, tuple[str, Change, str]] = {
    "an unknown architecture": (
        "olmoe",
        lambda said, tensors: said.update({"general.architecture": "mamba"}),
        "architecture 'mamba' is not supported; known are deepseek2, dots1",
    ),
    "no architecture": ("olmoe", lambda said, tensors: said.pop("general.architecture"), "is None, no name"),
    "a size that is missing": (
        "olmoe",
        lambda said, tensors: said.pop("olmoe.block_count"),
        r"olmoe\.block_count is None, but a whole number is needed",
    ),
    "a size that is text": (
        "olmoe",
        lambda said, tensors: said.update({"olmoe.attention.key_length": "16"}),
        "key_length is '16', but a whole number",
    ),
    "too many layers": (
        "olmoe",
        lambda said, tensors: said.update({"olmoe.block_count": 2**32 - 1}),
        "leaves 4294967295 layers; 1 to 1024",
    ),
    "no heads": ("olmoe", lambda said, tensors: said.update({"olmoe.attention.head_count": 0}), "head_count is 0"),
    "heads that differ between layers": (
        "llama",
        lambda said, tensors: said.update({"llama.attention.head_count_kv": [2, 4]}),
        "head_count_kv differs between layers",
    ),
    "values of another width": (
        "llama",
        lambda said, tensors: said.update({"llama.attention.value_length": 8}),
        "value_length is 8, but keys have a width of 16",
    ),
    "an unknown scaling": (
        "llama",
        lambda said, tensors: said.update({"llama.rope.scaling.type": "ntk"}),
        "rope.scaling.type is 'ntk', which is not supported",
    ),
    "frequencies that are quantised": (
        "llama",
        lambda said, tensors: tensors.update({"rope_freqs.weight": blob("Q8_0", (32,))}),
        "F32 of one axis is needed",
    ),
    "no embedding": (
        "gpt2",
        lambda said, tensors: tensors.pop("token_embd.weight"),
        "token_embd.weight is missing",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_decoder_is_refused(what: str, tmp_path: Path) -> None:
    name, change, message = REFUSED[what]
    said, tensors = metadata_of(name), converted(name, random_decoder(raw_of(name)), floats)
    change(said, tensors)
    with (
        GgufFile(write_gguf(tmp_path / "x.gguf", said, tensors)) as file,
        pytest.raises(CheckpointError, match=message),
    ):
        raw_config(file)


def test_a_value_for_each_layer_may_be_equal(tmp_path: Path) -> None:
    said = metadata_of("llama") | {"llama.attention.head_count_kv": [2, 2]}
    tensors = converted("llama", random_decoder(raw_of("llama")), floats)
    with GgufFile(write_gguf(tmp_path / "x.gguf", said, tensors)) as file:
        assert raw_config(file)["num_key_value_heads"] == 2


def test_a_tensor_without_a_name_of_ours_keeps_its_own(tmp_path: Path) -> None:
    tensors = converted("llama", random_decoder(raw_of("llama")), floats)
    tensors |= {"blk.0.attn_rot_embd.weight": blob("F32", (4,)), "cls.weight": blob("F32", (4,))}
    with GgufFile(write_gguf(tmp_path / "x.gguf", metadata_of("llama"), tensors)) as file:
        parts = tensor_parts(file, raw_config(file))
    assert {"model.layers.0.attn_rot_embd.weight", "cls.weight"} <= parts.keys()
