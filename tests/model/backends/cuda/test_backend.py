"""What the CUDA backend takes and refuses, with GPUs that are not there: it refuses what it was not written for."""

import importlib.util
from dataclasses import dataclass, fields, make_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from model.backends import choose
from model.backends.cpu.backend import CpuBackend
from model.backends.cuda import backend
from model.backends.cuda.backend import CudaBackend
from model.backends.cuda.decoder import plain_layers
from model.backends.cuda.refusal import TAKEN, layer_refusal, refusal
from model.backends.cuda.runnable import kernels_name
from model.backends.taken import ANY, unknown
from model.backends.torch.backend import TorchBackend
from model.options import Options
from model.shapes.attention import MLA, Attention, GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Infinity, Router, TopK
from model.shapes.rope import Rope
from tests.model.tiny import decoder, infinity, llama_like, topk

DENSE = Dense(20, "silu")
CONFIG = llama_like(topk(), DENSE, infinity())
GPU = Options(device="cuda:0", block_size=64, dtype="bfloat16")
LATENT = MLA(heads=2, query_rank=None, rank=8, plain_width=4, rope=Rope(4), value_width=4)
SHAPES: dict[type, Any] = {
    DecoderConfig: CONFIG,
    Attention: CONFIG.attention[0],
    MLA: LATENT,
    GatedDeltaNet: GatedDeltaNet(key_heads=1, value_heads=2, key_width=4, value_width=4, kernel=2),
    Rope: Rope(16),
    Dense: DENSE,
    TopK: topk(),
    Router: topk().router,
    Infinity: infinity(),
}
each = pytest.mark.parametrize("kind", TAKEN, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_machine_without_a_c_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert "C compiler" in str(CudaBackend().refusal(CONFIG, GPU))


@pytest.mark.parametrize(("there", "fits"), [(166912, False), (232448, True)])
def test_latent_attention_needs_a_gpu_with_much_shared_memory(
    there: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config = replace(CONFIG, attention=(LATENT,) * 3)
    assert (CudaBackend().refusal(config, GPU) is None) == fits
    assert CudaBackend().refusal(CONFIG, GPU) is None


def test_every_shape_is_looked_at() -> None:
    assert SHAPES.keys() == TAKEN.keys() and refusal(CONFIG, GPU) is None
    assert all(layer_refusal(shape) is None for kind, shape in SHAPES.items() if kind is not DecoderConfig)
    assert plain_layers(CONFIG) == ()


@each
def test_a_new_field_refuses_by_itself(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is left at its default nothing has changed; where it is set the kernels do not know what it means."""
    grown = make_dataclass(kind.__name__, [("tilt", float, 0.0)], bases=(kind,), frozen=True)
    monkeypatch.setitem(TAKEN, grown, TAKEN[kind])
    given = {field.name: getattr(SHAPES[kind], field.name) for field in fields(kind)}
    assert list(unknown(grown(**given), TAKEN)) == []
    assert list(unknown(grown(**given, tilt=0.5), TAKEN)) == [f"{kind.__name__}.tilt is 0.5"]


@each
def test_a_shape_of_another_class_is_refused(kind: type) -> None:
    """Also one that is made of a known class: what it adds is not known."""
    other = dataclass(frozen=True)(type("Other", (kind,), {}))
    given = {field.name: getattr(SHAPES[kind], field.name) for field in fields(kind)}
    assert list(unknown(other(**given), TAKEN)) == ["a Other"]


@each
def test_an_unknown_value_refuses_by_itself(kind: type) -> None:
    for field in fields(kind):
        if TAKEN[kind].get(field.name) == ANY:
            continue
        shape = object.__new__(kind)
        for other in fields(kind):
            object.__setattr__(shape, other.name, getattr(SHAPES[kind], other.name))
        object.__setattr__(shape, field.name, "unheard of")
        assert list(unknown(shape, TAKEN)) == [f"{kind.__name__}.{field.name} is 'unheard of'"]


def test_layers_are_named_that_run_in_plain_torch() -> None:
    wide = llama_like(topk(), topk(), heads=66, kv_heads=2)
    assert refusal(wide, GPU) is None
    assert plain_layers(wide) == ("33 query heads share one key-value head, more than 32",) * 2


def test_what_runs_in_plain_torch_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    made = CudaBackend().prepare(decoder(llama_like(topk(), DENSE, heads=66, kv_heads=2)), GPU)
    assert "2 of 2 layers run in part as plain torch: 33 query heads" in caplog.text
    assert (made.backend, made.exact, made.kernels) == ("cuda", False, "triton interpreted and torch")
    whole = CudaBackend().prepare(decoder(CONFIG), GPU)
    assert whole.exact and not whole.sets


def test_kernels_are_named_by_what_they_are_compiled_for() -> None:
    assert kernels_name(torch.device("cuda:1")) == "triton sm_90"


NO_KERNEL = "for which there is no GPU kernel: use int8-weights or fp8-weights"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (GPU, None),
        (replace(GPU, block_size=16), "the block size 16: the GPU kernels read blocks of 64 tokens"),
        (replace(GPU, dtype="float32"), "weights of float32: the GPU kernels take bfloat16"),
        (replace(GPU, device="cpu"), "the device cpu"),
        (replace(GPU, quantize="int4"), f"quantize int4 multiplies in 8 bits, {NO_KERNEL}"),
        (replace(GPU, quantize="int2"), "quantize int2 of experts"),  # type: ignore[arg-type]
        (replace(GPU, kv_cache="int8"), "a KV cache in int8, for which there is no GPU kernel"),
    ],
)
def test_options_are_looked_at(options: Options, reason: str | None) -> None:
    assert CudaBackend().refusal(CONFIG, options) == reason


def test_a_machine_without_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert CudaBackend().refusal(CONFIG, GPU) == "triton is not installed"


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert CudaBackend().refusal(CONFIG, GPU) == "cuda:0 has compute capability 7.5; the GPU kernels need 8.0"


def test_a_gpu_runs_on_its_kernels_first() -> None:
    backend, reason = choose.choose(CONFIG, GPU)
    assert isinstance(backend, CudaBackend) and not reason
    backend, reason = choose.choose(CONFIG, replace(GPU, block_size=32))
    assert isinstance(backend, TorchBackend) and "block size 32" in reason


def test_kernels_of_the_cpu_are_left_alone_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "provide", lambda self: pytest.fail("loads kernels of the CPU"))
    monkeypatch.setattr(CpuBackend, "refusal", lambda self, config, options: pytest.fail("asks the CPU's"))
    choose.provide("cuda:0")
    choose.choose(CONFIG, GPU)


def test_blocks_have_the_size_that_a_device_reads() -> None:
    assert [choose.block_size(device) for device in ("cpu", "cuda:0", "cuda:1")] == [16, 64, 64]
