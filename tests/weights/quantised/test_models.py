"""Whole checkpoints in every format: logits are those of the dequantised weights, widened and in groups."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build import build_engine
from engine.types import EngineSettings
from model.backends.cpu.backend import CpuBackend
from model.backends.cpu.kernels.library import load
from model.backends.cpu.refusal import refusal
from model.decoder import Decoder, grouped_parts, parameter_count
from model.errors import CheckpointError
from model.grouped import Grouped
from model.options import Options
from tests.families.reference import PROMPT
from tests.model.tiny import PagedRun, randomise, whole_logits
from tests.weights.quantised import configs, layouts
from tests.weights.quantised.layouts import Writer
from weights import memory
from weights.config import decoder_config
from weights.groups import kept_as
from weights.load import load_model
from weights.save import tensors

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "dtype": "float32",
}
OLMOE = BASE | {"model_type": "olmoe"}
QWEN = BASE | {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
W4A16 = configs.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32)
W4A16_Z = configs.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False)
NVFP4 = configs.compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
FP8 = configs.compressed("float-quantized", type="float")
CHECKPOINTS: dict[str, tuple[dict[str, Any], Writer, dict[str, Any], str, float]] = {
    "gptq": (QWEN, layouts.gptq, configs.gptq(), "int4 g32", 0.0),
    "awq": (OLMOE, layouts.awq, configs.awq(), "int4 g32 with minimum", 1e-2),
    "W4A16": (OLMOE, layouts.packed, W4A16, "int4 g32", 0.0),
    "W4A16 with zeros": (QWEN, partial(layouts.packed, symmetric=False), W4A16_Z, "int4 g32 with minimum", 1e-2),
    "W8A8": (QWEN, layouts.int8, configs.compressed("int-quantized"), "int8 g64, int8 g32", 0.0),
    "FP8": (QWEN, layouts.fp8, FP8, "int8 g64, int8 g32", 2e-2),
    "NVFP4": (QWEN, partial(layouts.nvfp4, compressed=True), NVFP4, "fp4 g16", 0.0),
}


def write(folder: Path, raw: dict[str, Any], matrix: Callable[[str], Writer | None], config: dict[str, Any]) -> None:
    """`folder`/quantised, whose projections are as `matrix` says, and `folder`/plain, which holds what they mean."""
    model = Decoder(decoder_config(raw))
    randomise(model)
    stored, meant = dict[str, Tensor](), tensors(model, raw["model_type"])
    for seed, (name, tensor) in enumerate(list(meant.items())):
        writer = matrix(name) if name.endswith("proj.weight") else None
        if writer is None:
            stored[name] = tensor
        else:
            written = writer(tensor.shape[0], tensor.shape[1], seed)
            stored |= {name.removesuffix("weight") + part: each for part, each in written.stored.items()}
            meant[name] = written.meant.float()
    for place, state, more in (("quantised", stored, {"quantization_config": config}), ("plain", meant, {})):
        (folder / place).mkdir()
        save_file({name: each.contiguous() for name, each in state.items()}, folder / place / "model.safetensors")
        (folder / place / "config.json").write_text(json.dumps(raw | more))


def matrices(model: Decoder) -> list[str]:
    ends = ("attention.qkv.weight", "attention.out.weight", "ffn.gate_up", "ffn.down")
    return [name for name, _ in model.named_parameters() if name.endswith(ends)]


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_kernels_multiply_what_is_stored(name: str, tmp_path: Path) -> None:
    """Inputs are rounded to 8 bits; in any chunks the bits are the same."""
    raw, writer, config, form, _ = CHECKPOINTS[name]
    write(tmp_path, raw, lambda _: writer, config)
    backend, counts = CpuBackend(), [4, 4]
    assert refusal(decoder_config(raw), Options()) is None
    kept, _ = load_model(tmp_path / "quantised", keep_groups=backend.groups)
    assert kept_as(kept) == form
    native = backend.prepare(kept, Options())
    assert native.parameters == parameter_count(load_model(tmp_path / "plain")[0])
    whole = PagedRun(native, [PROMPT], [counts], block_size=16).step({0: len(PROMPT)})[0]
    run = PagedRun(native, [PROMPT], [counts], block_size=16)
    chunks = [run.step({0: length})[0] for length in (5, 1, len(PROMPT) - 6)]
    assert torch.equal(torch.cat(chunks), whole)
    expected = whole_logits(load_model(tmp_path / "plain")[0], PROMPT, counts)
    near = 0.05 * expected.std()
    assert (whole - expected).square().mean().sqrt() < near


def widened(model: Decoder) -> Decoder:
    """With parameters in place of what is grouped."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Grouped):
                delattr(module, name)
                setattr(module, name, torch.nn.Parameter(value.dense(), requires_grad=False))
    return model


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    raw, writer, config, form, near = CHECKPOINTS[name]
    write(tmp_path, raw, lambda _: writer, config)
    plain, dense = (load_model(tmp_path / place)[0] for place in ("plain", "quantised"))
    kept, _ = load_model(tmp_path / "quantised", keep_groups=matrices)
    expected = whole_logits(plain, PROMPT, [2, 2])
    assert expected.std() > 0.1 and torch.equal(whole_logits(dense, PROMPT, [2, 2]), expected)
    assert kept_as(kept) == form and len(list(grouped_parts(kept))) == 8
    torch.testing.assert_close(whole_logits(widened(kept), PROMPT, [2, 2]), expected, atol=near or 1e-5, rtol=0)


def free(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    """The bytes of memory that are free, each time that loading asks; the last for ever."""
    left = list(sizes)
    monkeypatch.setattr(
        memory, "free_memory", lambda device: SimpleNamespace(value=left.pop(0) if len(left) > 1 else left[0])
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_memory_for_all_that_is_kept_is_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, writer, config, *_ = CHECKPOINTS[name]
    write(tmp_path, raw, lambda _: writer, config)
    kept, _ = load_model(tmp_path / "quantised", keep_groups=matrices)
    taken = sum(parameter.nbytes for parameter in kept.parameters())
    taken += sum(part.nbytes for part in grouped_parts(kept))
    outputs = sum(part.shape[:-1].numel() for part in grouped_parts(kept))
    free(monkeypatch, taken - 1)
    with pytest.raises(CheckpointError, match="the weights need"):
        load_model(tmp_path / "quantised", keep_groups=matrices)
    free(monkeypatch, taken + 4 * outputs)  # factors are counted where they may be needed
    load_model(tmp_path / "quantised", keep_groups=matrices)


def test_zeros_that_the_config_does_not_say_are_kept_if_the_rest_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, QWEN, lambda _: partial(layouts.gptq, symmetric=False), configs.gptq())
    kept, _ = load_model(tmp_path / "quantised", keep_groups=matrices)
    assert kept_as(kept) == "int4 g32 with minimum"
    free(monkeypatch, 1 << 40, 1 << 40, 5)
    with pytest.raises(CheckpointError, match=r"layers\.0\..*, which has zero points despite sym: true, need"):
        load_model(tmp_path / "quantised", keep_groups=matrices)


def test_modelopt_may_say_how_in_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, QWEN, lambda _: layouts.nvfp4, {})
    folder = tmp_path / "quantised"
    (folder / "config.json").write_text(json.dumps(QWEN))
    said = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    expected = whole_logits(load_model(tmp_path / "plain")[0], PROMPT, [2, 2])
    assert torch.equal(whole_logits(load_model(folder)[0], PROMPT, [2, 2]), expected)


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
def test_an_engine_keeps_and_says_what_is_stored_unless_a_dtype_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, OLMOE, lambda _: layouts.packed, W4A16)
    settings = EngineSettings(model=str(tmp_path / "quantised"), max_model_len=32, kv_cache_bytes=1 << 20, threads=1)
    _, info = build_engine(settings)
    assert info.quantize == "as stored: int4 g32" and info.kernels == load().name
    _, wide = build_engine(replace(settings, dtype="float32"))
    assert wide.quantize == "none" and wide.parameters == info.parameters


@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_biases_that_autogptq_adds_are_dropped_if_they_are_zero(value: float, tmp_path: Path) -> None:
    write(tmp_path, QWEN, lambda _: layouts.gptq, configs.gptq())
    file = tmp_path / "quantised" / "model.safetensors"
    bias = {"model.layers.0.self_attn.o_proj.bias": torch.full((64,), value)}
    save_file(load_file(file) | bias, file)
    if value:
        with pytest.raises(CheckpointError, match=r"extra model.layers.0.self_attn.o_proj.bias"):
            load_model(file.parent)
    else:
        load_model(file.parent)


def test_parts_of_one_parameter_may_differ(tmp_path: Path) -> None:
    """Experts of 4 and of 8 bits in one stack; a query that is not quantised beside keys and values that are."""

    def matrix(name: str) -> Writer | None:
        if "q_proj" in name:
            return None
        return partial(layouts.gptq, bits=8, group=16) if "experts.1.up" in name else layouts.gptq

    write(tmp_path, QWEN, matrix, configs.gptq(dynamic={"-:.*q_proj": {}, r"+:.*\.1\.up_proj": {"bits": 8}}))
    kept, _ = load_model(tmp_path / "quantised", keep_groups=matrices)
    ffn: Any = kept.get_submodule("layers.1.ffn")
    assert isinstance(ffn.gate_up, Grouped) and ffn.gate_up.values == "bytes"
    assert ffn.gate_up.group == 16 and isinstance(ffn.down, Grouped) and ffn.down.values == "signed"
    assert isinstance(kept.get_parameter("layers.1.attention.qkv.weight"), Tensor)
    expected = whole_logits(load_model(tmp_path / "plain")[0], PROMPT, [2, 2])
    torch.testing.assert_close(whole_logits(widened(kept), PROMPT, [2, 2]), expected, atol=1e-5, rtol=0)
