"""How a loaded model is put to work: native kernels where they can, plain torch with a reason where not."""

import pytest

from engine import build
from engine.build import assemble, describe, prepare
from engine.types import EngineSettings
from model.decoder import Decoder
from model.errors import CheckpointError
from model.kernels.library import Kernels, load
from model.native.decoder import NativeDecoder
from tests.model.tiny import decoder, llama_like, topk

SETTINGS = EngineSettings(model="", kv_cache_bytes=1 << 20, max_running=2)


def wide(head_width: int) -> Decoder:
    return decoder(llama_like(topk(), topk(), head_width=head_width, context=32))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", lambda: Kernels("torch", "they are not built"))


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
def test_a_model_that_the_kernels_take_runs_on_them() -> None:
    model, reason = prepare(wide(16), SETTINGS)
    assert isinstance(model, NativeDecoder) and reason == ""
    assert describe(model, SETTINGS)["kernels"] == load().name


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
@pytest.mark.parametrize(("head", "block", "word"), [(8, 16, "head width 8"), (16, 8, "block size 8")])
def test_a_model_that_they_do_not_take_runs_on_torch_and_says_why(
    head: int, block: int, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = EngineSettings(model="", block_size=block)
    model, reason = prepare(wide(head), settings)
    assert isinstance(model, Decoder) and word in reason
    assert word in caplog.text
    assert describe(model, settings)["kernels"] == "torch"


def test_without_kernels_everything_runs_on_torch(no_kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    model, reason = prepare(wide(16), SETTINGS)
    assert isinstance(model, Decoder) and reason == "they are not built"
    assert caplog.text.count("they are not built") == 1
    assemble(model, SETTINGS)


@pytest.mark.parametrize("quantize", ["int8", "int8-weights"])
def test_int8_without_kernels_is_refused_by_name(no_kernels: None, quantize: str) -> None:
    settings = EngineSettings(model="", quantize=quantize)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"quantize {quantize} needs the native kernels: they are not built"):
        prepare(wide(16), settings)


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
def test_what_is_quantised_is_said() -> None:
    settings = EngineSettings(model="", quantize="int8", quantize_layers="all")
    model, _ = prepare(wide(16), settings)
    assert describe(model, settings)["quantize"] == "int8 all"
    assert isinstance(model, NativeDecoder) and model.precision.linears == "int8"
