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
    "frequencies that are in tensors and scaled too": (
        "llama",
        lambda said, tensors: tensors.update({"rope_freqs.weight": blob("F32", (8,))}),
        r"may change what it computes: 'llama\.rope\.scaling\.factor' is 2\.0$",
    ),
    "positions that turn nothing": (
        "llama",
        lambda said, tensors: said.update({"llama.rope.dimension_count": 0}),
        "rope.dimension_count is 0",
    ),
    "a YaRN that is blended otherwise": (
        "qwen3",
        lambda said, tensors: said.update({"qwen3.rope.scaling.yarn_ext_factor": 0.0}),
        "yarn_ext_factor is 0.0, but only 1.0 or -1.0 is supported",
    ),
    "a temperature": (
        "deepseek2",
        lambda said, tensors: said.update({"deepseek2.attention.temperature_scale": 0.5}),
        r"the family does not know, .*: 'deepseek2\.attention\.temperature_scale' is 0\.5$",
    ),
    "a window": (
        "llama, mixtral",
        lambda said, tensors: said.update({"llama.attention.sliding_window": 8}),
        r"'llama\.attention\.sliding_window' is 8$",
    ),
    "a factor of some layers": (
        "olmoe",
        lambda said, tensors: said.update({"olmoe.swiglu_clamp_exp": [0.0, 7.0]}),
        r"'olmoe\.swiglu_clamp_exp' is \[0\.0, 7\.0\]$",
    ),
    "attention to both sides": (
        "llama",
        lambda said, tensors: said.update({"llama.attention.causal": False}),
        r"'llama\.attention\.causal' is False$",
    ),
    "softmax for sigmoid": (
        "dots1",
        lambda said, tensors: said.update({"dots1.expert_gating_func": 1}),
        "expert_gating_func is 1, but only 0 or 2 is supported",
    ),
    "weights that are not normalised": (
        "minimax-m2",
        lambda said, tensors: said.update({"minimax-m2.expert_weights_norm": False}),
        "expert_weights_norm is False, but only True",
    ),
    "a Granite without positions": (
        "granitemoe",
        lambda said, tensors: said.update({"granitemoe.rope.scaling.finetuned": False}),
        "finetuned is False, but only True",
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


WRITTEN: dict[str, dict[str, Any]] = {
    "llama, mixtral": {"vocab_size": 37, "tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": False}
    | {"attention.causal": True, "expert_weights_norm": True, "expert_gating_func": 1, "attention.sliding_window": 0},
    "qwen3": {"pooling_type": 3, "rope.scaling.yarn_ext_factor": 1.0, "expert_count": 0, "nextn_predict_layers": 0},
    "olmoe": {"rope.scaling.type": "none", "rope.scaling.original_context_length": 64, "expert_weights_scale": 1.0},
    "qwen3next": {"full_attention_interval": 4, "attention.recurrent_layers": [True, True, True, False]},
    "glm4moe": {"rope.dimension_sections": [2, 3, 3, 0]},
    "gpt-oss": {"expert_gating_func": 3, "attention.layer_norm_epsilon": 1e-5},
    "ernie4_5-moe": {"expert_shared_feed_forward_length": 48},
    "deepseek2, second": {"expert_gating_func": 1, "rope.scaling.attn_factor": 1.0},
    "llama4": {"expert_gating_func": 2, "attention.sliding_window": 8192},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_keys_that_change_nothing_may_be_there(name: str, tmp_path: Path) -> None:
    said, tensors = metadata_of(name), converted(name, random_decoder(raw_of(name)), floats)
    more = {f"{said['general.architecture']}.{key}": value for key, value in WRITTEN[name].items()}
    assert not more.keys() & said.keys()
    configs = []
    for each in (said, said | more):
        with GgufFile(write_gguf(tmp_path / "x.gguf", each, tensors)) as file:
            configs.append(raw_config(file))
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"scaling.factor": 2.0}, 2.0),
        ({"scale_linear": 2.0}, 2.0),
        ({"scale_linear": 2.0, "scaling.type": "linear"}, 2.0),
        ({"scaling.type": "linear"}, None),
        ({"scaling.factor": 2.0, "scaling.type": "none"}, None),
    ],
)
def test_what_names_no_scaling_is_linear(keys: dict[str, Any], factor: float | None, tmp_path: Path) -> None:
    said = {key: value for key, value in metadata_of("llama").items() if "scaling" not in key}
    said |= {f"llama.rope.{key}": value for key, value in keys.items()}
    tensors = converted("llama", random_decoder(raw_of("llama")), floats)
    with GgufFile(write_gguf(tmp_path / "x.gguf", said, tensors)) as file:
        found = raw_config(file)["rope_scaling"]
    assert found == (None if factor is None else {"rope_type": "linear", "factor": factor})


def test_a_window_of_0_is_none(tmp_path: Path) -> None:
    said, tensors = metadata_of("phimoe"), converted("phimoe", random_decoder(raw_of("phimoe")), floats)
    windows = []
    for width in (20, 0):
        said["phimoe.attention.sliding_window"] = width
        with GgufFile(write_gguf(tmp_path / "x.gguf", said, tensors)) as file:
            shape = decoder_config(raw_config(file)).attention[0]
        assert isinstance(shape, Attention)
        windows.append(shape.window)
    assert windows == [20, 0]


def test_every_rotary_pair_has_a_factor(tmp_path: Path) -> None:
    said = {key: value for key, value in metadata_of("llama").items() if "scaling" not in key}
    tensors = converted("llama", random_decoder(raw_of("llama")), floats)
    for count in (1, 7, 16):
        tensors["rope_freqs.weight"] = floats("", torch.ones(count))
        with GgufFile(write_gguf(tmp_path / "x.gguf", said, tensors)) as file:
            raw = raw_config(file)
        with pytest.raises(CheckpointError, match=f"short_factor has {count} factors, but 16 elements are 8 pairs"):
            decoder_config(raw)


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


MISFITS: dict[str, tuple[str, str, tuple[int, ...], str]] = {
    "gates that are gates and values already": (
        "gpt-oss",
        "blk.0.ffn_gate_exps.weight",
        (5, 192, 64),
        r"ffn_gate_exps\.weight' has shape \(5, 192, 64\) and 'blk\.0\.ffn_up_exps\.weight' has shape \(5, 96, 64\)",
    ),
    "gates of other inputs": (
        "qwen3next",
        "blk.0.attn_gate.weight",
        (64, 32),
        r"attn_qkv\.weight' has shape \(96, 64\) and 'blk\.0\.attn_gate\.weight' has shape \(64, 32\)",
    ),
    "too few gates": (
        "qwen3next",
        "blk.0.attn_gate.weight",
        (32, 64),
        "has 128 rows, but queries, keys, values and gates have 160",
    ),
    "values of fewer heads": (
        "deepseek2",
        "blk.0.attn_v_b.weight",
        (2, 12, 32),
        r"attn_k_b\.weight' has shape \(4, 32, 16\) and 'blk\.0\.attn_v_b\.weight' has shape \(2, 12, 32\)",
    ),
    "rows behind the values": (
        "llama",
        "blk.0.attn_qkv.weight",
        (144, 64),
        "'blk.0.attn_qkv.weight' has 144 rows, but queries, keys and values have 128",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_parts_that_do_not_fit_each_other_are_refused(what: str, tmp_path: Path) -> None:
    name, tensor, shape, message = MISFITS[what]
    tensors = converted(name, random_decoder(raw_of(name)), floats) | {tensor: blob("F32", shape)}
    with (
        GgufFile(write_gguf(tmp_path / "x.gguf", metadata_of(name), tensors)) as file,
        pytest.raises(CheckpointError, match=message),
    ):
        GgufTensors(file, tensor_parts(file, raw_config(file)))


@pytest.mark.parametrize(
    ("name", "tensor", "theirs", "shape"),
    [
        ("olmoe", "blk.0.ffn_gate_exps.weight", "ffn_gate_exps.weight", (7, 96, 64)),  # not one part for each expert
        ("deepseek2", "blk.1.exp_probs_b.bias", "mlp.gate.e_score_correction_bias", (2, 6)),
        ("qwen2moe", "blk.0.ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", (2, 64)),
        ("qwen3next", "blk.0.ssm_conv1d.weight", "linear_attn.conv1d.weight", (2, 96, 4)),
    ],
)
def test_a_tensor_of_another_size_keeps_its_shape(
    name: str, tensor: str, theirs: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = converted(name, random_decoder(raw_of(name)), floats) | {tensor: blob("F32", shape)}
    with GgufFile(write_gguf(tmp_path / "x.gguf", metadata_of(name), tensors)) as file:
        source = GgufTensors(file, tensor_parts(file, raw_config(file)))
        found = next(each for each in source.stored if each.endswith(f".{tensor[4]}.{theirs}"))
        assert source.stored[found].shape == source.read(found).shape == shape
