"""Parameters that stay quantised: parts of any forms are joined to the values that they had, and loaded so."""

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.decoder import Decoder, grouped_parts, parameter_count
from model.errors import CheckpointError
from model.grouped import CODES, Grouped, Values, code_bits, packed_codes
from tests.model.tiny import randomise
from tests.weights.quantised.test_mxfp4 import EXPERTS, RAW, write
from weights import memory
from weights.config import decoder_config
from weights.forms import Form, common
from weights.groups import bytes_per_weight, finite, joined, kept_as
from weights.load import load_model
from weights.rules import Index, TensorPart
from weights.save import save_model

FORMS: list[Form] = [
    Form("signed", 32, False),
    Form("signed", 128, False),
    Form("unsigned", 64, True),
    Form("e2m1", 16, False),
    Form("iq4", 32, False),
    Form("signed6", 16, False),
    Form("bytes", 128, False),
    Form("bytes", 32, True),
]


def random_grouped(shape: tuple[int, ...], form: Form, seed: int = 0, factors: bool = False) -> Grouped:
    generator = torch.Generator().manual_seed(seed)
    *outputs, k = shape
    if form.values == "bytes":
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    else:
        codes = packed_codes(torch.randint(len(CODES[form.values]), shape, generator=generator), code_bits(form.values))
    groups = (*outputs, k // form.group)
    scales = (torch.randn(groups, generator=generator) / 8).half()
    minima = torch.randn(groups, generator=generator).half() if form.minimum else None
    more = torch.exp2(torch.randint(-3, 4, tuple(outputs), generator=generator).float()) if factors else None
    return Grouped(codes, scales, form.group, form.values, minima, more)


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations_with_replacement(FORMS, 2)])
def test_joining_changes_no_value(first: Form, second: Form) -> None:
    parts = random_grouped((3, 128), first, 1), random_grouped((5, 128), second, 2, factors=True)
    whole = joined(
        [(TensorPart("a", (slice(0, 3),)), parts[0]), (TensorPart("b", (slice(3, 8),)), parts[1])], torch.Size([8, 128])
    )
    assert whole is not None and whole.shape == (8, 128) and whole.factors is not None
    assert torch.equal(whole.dense(), torch.cat([part.dense() for part in parts]))
    assert whole.nbytes == common([Form.of(part) for part in parts]).bytes(whole.shape)
    if first == second:
        assert Form.of(whole) == first._replace(factors=True)


def test_experts_are_stacked_and_rows_of_a_tensor_taken() -> None:
    form = FORMS[0]
    tensors = [random_grouped((2, 4, 128), form, seed) for seed in (1, 2)]
    indices: list[tuple[TensorPart, Grouped]] = [
        (TensorPart("gate", (slice(None), slice(0, 4))), tensors[0]),
        (TensorPart("up", (slice(None), slice(4, 8))), tensors[1]),
    ]
    whole = joined(indices, torch.Size([2, 8, 128]))
    assert whole is not None
    assert torch.equal(whole.dense(), torch.cat([tensor.dense() for tensor in tensors], dim=1))
    last = joined([(TensorPart("gate", rows=range(1, 2)), tensors[0])], torch.Size([1, 4, 128]))
    assert last is not None and torch.equal(last.dense(), tensors[0].dense()[1:])


@pytest.mark.parametrize("index", [(), (0,), (0, slice(0, 3)), (0, slice(0, 4), slice(0, 64))])
def test_what_does_not_lie_as_the_matrices_is_not_joined(index: Index) -> None:
    part = random_grouped((4, 64), FORMS[0])
    assert joined([(TensorPart("a", index), part)], torch.Size([1, 4, 128])) is None


@pytest.mark.parametrize(("scale", "fits"), [(8000.0, True), (9000.0, False)])
def test_a_minimum_beyond_float16_is_not_joined(scale: float, fits: bool) -> None:
    """Codes from -8 to 7 that become 0 to 15 need a minimum of -8 scales."""
    signed, unsigned = random_grouped((2, 64), FORMS[0]), random_grouped((2, 64), FORMS[2])
    signed.scales.fill_(scale)
    assert finite(signed) and finite(unsigned)
    parts = [(TensorPart("a", (slice(0, 2),)), signed), (TensorPart("b", (slice(2, 4),)), unsigned)]
    whole = joined(parts, torch.Size([4, 64]))
    assert (whole is not None) is fits
    if whole is not None:
        assert torch.equal(whole.dense(), torch.cat([signed.dense(), unsigned.dense()]))


@pytest.mark.parametrize(
    ("scale", "factor", "values", "expected"),
    [
        (1.0, 1.0, "signed", True),
        (torch.inf, 1.0, "signed", False),
        (torch.nan, 1.0, "signed", False),
        (1.0, torch.nan, "signed", False),
        (60000.0, 3e38, "signed", False),
        (2.0**11, 2.0**113, "e2m1", True),
    ],
)
def test_values_beyond_floats_are_found(scale: float, factor: float, values: Values, expected: bool) -> None:
    codes, scales = torch.zeros(2, 16, dtype=torch.uint8), torch.full((2, 1), scale).half()
    assert finite(Grouped(codes, scales, 32, values, factors=torch.full((2,), factor))) is expected


def experts(model: Decoder) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith((".gate_up", ".down"))]


def test_a_model_keeps_what_it_is_asked_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = write(tmp_path)
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        model, _ = load_model(tmp_path, progress=lambda *bytes: seen.append(bytes), keep_groups=experts)
    whole, _ = load_model(tmp_path)
    assert "quantised weights stay as they are stored: fp4 g32" in caplog.text
    assert kept_as(model) == "fp4 g32" and kept_as(whole) == ""
    assert parameter_count(model) == parameter_count(whole)
    assert bytes_per_weight(whole) == (2, 2)
    outputs = sum(part.shape[:-1].numel() for part in grouped_parts(model))
    factors = 4 * outputs / sum(part.shape.numel() for part in grouped_parts(model))
    found = bytes_per_weight(model)
    assert found.others == 2 and found.experts == pytest.approx(0.5 + 2 / 32 + factors)
    for name, tensor in expected.items():
        place, _, last = name.rpartition(".")
        kept = getattr(model.get_submodule(place), last)
        assert isinstance(kept, Grouped) and torch.equal(kept.dense(), tensor)
    assert dict(model.named_parameters()).keys() == dict(whole.named_parameters()).keys() - expected.keys()
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert seen[-1][0] == seen[-1][1] and abs(seen[-1][1] - files) < 0.2 * files
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def bytes_of(model: Decoder) -> int:
    """What the weights of a loaded model take."""
    floats = sum(parameter.nbytes for parameter in model.parameters())
    return floats + sum(part.nbytes for part in grouped_parts(model))


def only_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """From now on so many bytes of memory are free."""
    monkeypatch.setattr(memory, "free_memory", lambda device: type("Free", (), {"value": size}))


def test_memory_is_that_of_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    needed = bytes_of(load_model(tmp_path, keep_groups=experts)[0])
    only_free(monkeypatch, needed)
    load_model(tmp_path, keep_groups=experts)
    with pytest.raises(CheckpointError, match="the weights need"):
        load_model(tmp_path)
    only_free(monkeypatch, needed - 1)
    with pytest.raises(CheckpointError, match="the weights need"):
        load_model(tmp_path, keep_groups=experts)


def test_scales_that_groups_do_not_hold_are_widened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scales = torch.full((3, 32, 3), 120, dtype=torch.uint8)
    scales[0, 0, 0] = 60
    write(tmp_path, down_proj_scales=scales)
    with caplog.at_level(logging.INFO):
        model, _ = load_model(tmp_path, keep_groups=experts)
    assert "layers.0.ffn.down: its quantised values are computed in the run-time dtype" in caplog.text
    assert isinstance(model.get_submodule("layers.0.ffn").gate_up, Grouped)
    assert torch.equal(
        model.get_parameter("layers.0.ffn.down"), load_model(tmp_path)[0].get_parameter("layers.0.ffn.down")
    )


def test_what_is_widened_must_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = torch.full((3, 32, 3), 120, dtype=torch.uint8)
    scales[0, 0, 0] = 60
    write(tmp_path, down_proj_scales=scales)
    asked: list[str] = []

    def free(device: str) -> Any:
        asked.append(device)
        return type("Free", (), {"value": 1 << 40 if len(asked) < 3 else 3 * 32 * 96 * 2})

    monkeypatch.setattr(memory, "free_memory", free)
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.down, whose values do not fit groups, .* too little"):
        load_model(tmp_path, keep_groups=experts)


def test_square_matrices_are_turned(tmp_path: Path) -> None:
    """FP8 in groups along the outputs is widened: only matrices that are not square show it by their shape."""
    raw = RAW | {"intermediate_size": 32, "quantization_config": {"quant_method": "fp8"}}
    model = Decoder(decoder_config(raw))
    randomise(model)
    save_model(model, raw, tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if name.endswith("down_proj")]:
        assert stored[name].shape == (3, 32, 32)
        stored[name] = stored[name].to(torch.float8_e4m3fn)
        stored[name + "_scale"] = torch.tensor(0.5)
    save_file(stored, tmp_path / "model.safetensors")
    found, whole = load_model(tmp_path, keep_groups=experts)[0], load_model(tmp_path)[0]
    for name, expected in whole.named_parameters():
        assert torch.equal(found.get_parameter(name), expected)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write(tmp_path, down_proj_scales=torch.full((3, 32, 3), 255, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=f"{EXPERTS}down_proj has values that are not finite"):
        load_model(tmp_path, keep_groups=experts)
