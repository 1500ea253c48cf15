"""How a loaded model is put to work: native kernels where they can, plain torch with a reason where not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from engine import build, memory, sizes
from engine.assembly import assemble
from engine.build import build_engine, prepare
from engine.description import describe
from engine.engine import Engine
from engine.memory import step_bytes
from engine.types import EngineSettings, Logprob, Request, Sampling
from model import devices
from model.backends.cpu import backend
from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import Kernels, load
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, Pages
from model.budget import ExpertBudget, RoutingRule
from model.decoder import Decoder
from model.errors import CheckpointError, InvalidRequest
from model.options import Quantize, QuantizeLayers
from model.resources import Amount
from model.shapes.memory import bytes_per_block
from model.step import Observer
from tests.model.tiny import decoder, llama_like, topk
from tests.server.calibrations import calibration
from tests.weights.checkpoints import OLMOE, write, write_config
from weights.calibration import REPAIR_FILE, checkpoint_hash
from weights.calibration import write as write_calibration
from weights.repair import neutral_tables, write_tables

SETTINGS = EngineSettings(model="", kv_cache_bytes=1 << 20, max_running=2)


def wide(head_width: int) -> Decoder:
    return decoder(llama_like(topk(), topk(), head_width=head_width, context=32))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "load", lambda: Kernels("torch", "they are not built"))


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
def test_a_model_that_the_kernels_take_runs_on_them() -> None:
    model, reason = prepare(wide(16), SETTINGS)
    assert isinstance(model, NativeDecoder) and reason == ""
    assert model.token_buckets == ()  # what a step costs does not depend on buckets
    assert describe(model, SETTINGS)["kernels"] == load().name


class OnKernels(TorchRunnable):
    """As a model on kernels of a device that computes by itself."""

    exact = True
    launched = 0

    @property
    def overlaps(self) -> bool:
        return True

    def launch(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        self.launched += 1
        return super().launch(batch, pages, observer)


@pytest.mark.parametrize(("asked", "drafts"), [("off", False), ("grammar", False), ("ngram", True)])
def test_the_default_drafts_do_not_keep_steps_from_overlapping(asked: str, drafts: bool) -> None:
    model = OnKernels(wide(16))
    engine, _ = assemble(model, replace(SETTINGS, speculate=asked))
    assert (engine.scheduler.speculator is not None) == drafts
    engine.add(Request("a", (1, 2), ExpertBudget((1, 1)), Sampling(max_tokens=3, seed=0)))
    engine.step()
    assert model.launched == (1 if drafts else 2)


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
@pytest.mark.parametrize(("head", "block", "word"), [(8, 16, "head width 8"), (16, 8, "block size 8")])
def test_a_model_that_they_do_not_take_runs_on_torch_and_says_why(
    head: int, block: int, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = EngineSettings(model="", block_size=block)
    model, reason = prepare(wide(head), settings)
    assert isinstance(model, TorchRunnable) and word in reason
    assert word in caplog.text
    assert describe(model, settings)["kernels"] == "torch"


def test_without_kernels_everything_runs_on_torch(no_kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    model, reason = prepare(wide(16), SETTINGS)
    assert isinstance(model, TorchRunnable) and reason == "they are not built"
    assert caplog.text.count("they are not built") == 1
    assemble(model, SETTINGS)


@pytest.mark.parametrize("quantize", ["int8", "int8-weights", "int4"])
def test_int8_without_kernels_is_refused_by_name(no_kernels: None, quantize: str) -> None:
    settings = EngineSettings(model="", quantize=quantize)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"quantize {quantize} needs the native kernels: they are not built"):
        prepare(wide(16), settings)


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
@pytest.mark.parametrize(
    ("quantize", "layers", "kinds"),
    [
        ("int8", "all", ("int8", "int8")),
        ("int8", "experts", ("int8", "float")),
        ("int4", "experts", ("grouped", "int8")),
        ("int4", "all", ("grouped", "grouped")),
    ],
)
def test_what_is_quantised_is_said(quantize: Quantize, layers: QuantizeLayers, kinds: tuple[str, str]) -> None:
    settings = EngineSettings(model="", quantize=quantize, quantize_layers=layers)
    model, _ = prepare(wide(16), settings)
    assert describe(model, settings)["quantize"] == f"{quantize} {layers}"
    assert isinstance(model, NativeDecoder)
    assert (model.precision.experts, model.precision.linears) == kinds


def test_cache_and_threads_follow_the_container(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the host has: here a limit that leaves room for ten blocks of the fraction that the cache may have."""
    config = wide(16).config
    settings = EngineSettings(model="", kv_cache_fraction=0.5, max_running=64)
    per_block = bytes_per_block(config.memory, sizes.block_size(settings), 4)
    monkeypatch.setattr(devices, "available_memory", lambda: Amount(20 * per_block, "memory.max"))
    monkeypatch.setattr(memory, "available_memory", lambda: Amount(20 * per_block, "memory.max"))
    monkeypatch.setattr(memory, "available_cores", lambda: Amount(3, "cpu.max"))
    assert sizes.cache_sizes(config, settings, torch.float32) == (10, 0)
    assert sizes.cache_sizes(config, settings, torch.float32, workspace=8 * per_block).blocks == 6
    small = replace(settings, kv_cache_dtype="int8")  # 16 bytes and a scale of 4 in place of 64
    assert sizes.cache_sizes(config, small, torch.float32).blocks == 32
    caplog.set_level("INFO")
    memory.log_resources()
    assert "3 cores (cpu.max)" in caplog.text and "(memory.max)" in caplog.text


def test_a_gpu_keeps_room_for_steps_and_gives_most_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU gives its third, whatever a step takes."""
    config = wide(16).config
    per_block, free = bytes_per_block(config.memory, 16, 4), 30 << 20
    monkeypatch.setattr(sizes, "resolve", lambda device: device)
    monkeypatch.setattr(sizes, "free_memory", lambda device: Amount(free, device))
    steps = step_bytes(config, 512, 2000, "cuda:0")
    assert steps == 4 * (6 * 2000 * config.vocabulary + 512 * config.width * (2 * config.experts.trained + 8))
    for device, room in (("cuda:0", 0.9 * (free - steps - (1 << 20))), ("cpu", 0.3 * (free - (1 << 20)))):
        settings = EngineSettings(model="", device=device, max_running=2000, max_step_tokens=512, block_size=16)
        assert sizes.cache_sizes(config, settings, torch.float32, 1 << 20).blocks == int(room) // per_block, device


def test_the_device_is_named_in_log_and_description(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, OLMOE)
    caplog.set_level("INFO")
    _, info = build_engine(replace(SETTINGS, model=str(tmp_path), device="cpu"))
    assert info.device == "cpu" and info.backend in ("cpu", "torch")
    assert "running on the CPU (as set)" in caplog.text


def test_a_device_that_is_not_there_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write(tmp_path, OLMOE)
    with pytest.raises(CheckpointError, match="device 'cuda' is not on this machine; it has cpu"):
        build_engine(replace(SETTINGS, model=str(tmp_path), device="cuda"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"default_num_experts": 99}, "default_num_experts must be between 1 and 5 for this model, got 99"),
        ({"aliases": {"fast": 1, "strong": 99}}, "aliases must be between 1 and 5 for this model, got 99"),
        ({"max_model_len": 1_000_000}, "max_model_len 1000000 is more than the model's context"),
    ],
)
def test_what_does_not_fit_the_config_is_refused_before_the_weights_are_read(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "keep_freed_memory", lambda: None)
    write_config(tmp_path, OLMOE)  # there are no weights
    settings = EngineSettings(str(tmp_path), threads=torch.get_num_threads(), **options)
    with pytest.raises(CheckpointError, match=words):
        build_engine(settings)


def with_calibration(folder: Path) -> EngineSettings:
    """A checkpoint whose calibration says that repair helps at one expert."""
    model = write(folder, OLMOE)
    scale_LKD, shift_LKD = neutral_tables(model.config)
    shift_LKD[:, 1] = 0.5
    digest = write_tables(folder / REPAIR_FILE, scale_LKD, shift_LKD)
    made = calibration(checkpoint_hash(folder))
    write_calibration(structs.replace(made, repair_hash=digest, repaired=(1,)), folder)
    return EngineSettings(str(folder), kv_cache_bytes=1 << 20, step_ms=0, threads=torch.get_num_threads())


def answer(engine: Engine, rule: RoutingRule) -> list[Logprob | None]:
    sampling = Sampling(max_tokens=3, seed=0, temperature=0.0, logprobs=0)
    engine.add(Request("a", (1, 2, 3), ExpertBudget((1, 1), rule=rule), sampling))
    found: list[Logprob | None] = []
    while engine.has_work:
        found += [event.logprob for event in engine.step().events]
    return found


def test_a_calibration_brings_repair(tmp_path: Path) -> None:
    engine, info = build_engine(with_calibration(tmp_path))
    assert (info.experts.repaired, info.calibration_reason) == ((1,), "")
    assert answer(engine, RoutingRule(repair=True)) != answer(engine, RoutingRule())


def test_a_calibration_of_another_checkpoint_is_named_and_the_model_served(tmp_path: Path) -> None:
    settings = with_calibration(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    engine, info = build_engine(settings)
    assert info.experts.repaired == () and "belongs to another checkpoint" in info.calibration_reason
    with pytest.raises(InvalidRequest, match=r"experts\.repair is refused"):
        answer(engine, RoutingRule(repair=True))
    assert None not in answer(engine, RoutingRule())
