"""The native kernels refuse what they have not been written for, without being told: fields, values and kinds."""

from dataclasses import dataclass, fields, make_dataclass, replace
from typing import Any

import pytest

from model.backends.cpu.refusal import TAKEN, refusal, unknown
from model.backends.taken import ANY
from model.options import Options
from model.shapes.attention import MLA, Attention, GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Infinity, Router, TopK
from model.shapes.rope import Rope
from tests.model.tiny import infinity, llama_like, topk

DENSE = Dense(20, "silu")
CONFIG = llama_like(topk(), DENSE, infinity(), head_width=16)


def placed(shape: Any) -> DecoderConfig:
    """A decoder that the kernels take, but for this shape in its place."""
    attention, router = CONFIG.attention[0], topk().router
    assert isinstance(attention, Attention) and isinstance(router, Router)
    kind = next(base for base in type(shape).__mro__ if base in TAKEN)
    if kind is DecoderConfig:
        found: DecoderConfig = shape
        return found
    if kind in (Attention, MLA, GatedDeltaNet, Rope):
        attention = replace(attention, rope=shape) if kind is Rope else shape
        return replace(CONFIG, attention=(attention, *CONFIG.attention[1:]))
    ffn = topk(router=shape) if kind is Router else shape
    return replace(CONFIG, feed_forward=(ffn, *CONFIG.feed_forward[1:]))


SHAPES: dict[type, Any] = {
    DecoderConfig: CONFIG,
    Attention: CONFIG.attention[0],
    GatedDeltaNet: GatedDeltaNet(1, 2, 16, 32, 4),
    MLA: MLA(4, None, 32, 8, Rope(16), 16),
    Rope: Rope(16),
    Dense: DENSE,
    TopK: topk(),
    Router: topk().router,
    Infinity: infinity(),
}
each = pytest.mark.parametrize("kind", TAKEN, ids=lambda kind: kind.__name__)


def test_every_shape_is_looked_at() -> None:
    assert SHAPES.keys() == TAKEN.keys() and refusal(CONFIG, Options()) is None
    assert all(refusal(placed(shape), Options()) is None for shape in SHAPES.values())


@each
def test_a_new_field_refuses_by_itself(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is left at its default nothing has changed; where it is set the kernels do not know what it means."""
    grown = make_dataclass(kind.__name__, [("tilt", float, 0.0)], bases=(kind,), frozen=True)
    monkeypatch.setitem(TAKEN, grown, TAKEN[kind])
    given = {field.name: getattr(SHAPES[kind], field.name) for field in fields(kind)}
    assert list(unknown(grown(**given))) == []
    assert list(unknown(grown(**given, tilt=0.5))) == [f"{kind.__name__}.tilt is 0.5"]


@each
def test_a_shape_of_another_class_is_refused(kind: type) -> None:
    """Also one that is made of a known class: what it adds is not known."""
    other = dataclass(frozen=True)(type("Other", (kind,), {}))
    given = {field.name: getattr(SHAPES[kind], field.name) for field in fields(kind)}
    found = refusal(placed(other(**given)), Options())
    assert found is not None and "Other" in found


@each
def test_an_unknown_value_refuses_by_itself(kind: type) -> None:
    """Of every field whose values are named, and of every field that is not read at all."""
    for field in fields(kind):
        if TAKEN[kind].get(field.name) == ANY:
            continue
        shape = object.__new__(kind)
        for other in fields(kind):
            object.__setattr__(shape, other.name, getattr(SHAPES[kind], other.name))
        object.__setattr__(shape, field.name, "unheard of")
        found = list(unknown(shape))
        assert found == [f"{kind.__name__}.{field.name} is 'unheard of'"]


def test_what_is_nested_is_looked_at() -> None:
    shape = topk(router=Router("relu"))
    assert list(unknown(shape)) == ["Router.score is 'relu'"]
    assert refusal(replace(CONFIG, feed_forward=(shape,) * 3), Options()) is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(block_size=24), "the block size 24 is not a multiple of 16"),
        (Options(device="cuda"), "the device cuda"),
        (Options(dtype="float16"), "weights of float16: the kernels take float32 and bfloat16"),
        (Options(dtype="float64"), "weights of float64: the kernels take float32 and bfloat16"),
        (Options(dtype="bfloat16"), None),
        (Options(kv_cache="int8"), None),
        (Options(kv_cache="int4"), "a KV cache in int4"),  # type: ignore[arg-type]
        (Options(quantize="int3"), "quantize int3 of experts"),  # type: ignore[arg-type]
        (Options(quantize="fp8-weights"), "quantize fp8-weights has kernels for GPUs only: use int8-weights on a CPU"),
        (Options(quantize="int8", quantize_layers="some"), "quantize int8 of some"),  # type: ignore[arg-type]
        (Options(quantize="int8", quantize_layers="all"), None),
        (Options(quantize="int4"), None),
    ],
)
def test_options_are_looked_at(options: Options, reason: str | None) -> None:
    assert refusal(CONFIG, options) == reason


def test_clipping_before_the_norm_of_each_head_is_refused() -> None:
    """The kernels clip what is normed; over all heads at once that is the families' order."""
    config = llama_like(topk(), head_width=16, qk_norm="head", clip=0.5)
    assert refusal(config, Options()) == "queries and keys that are clipped before each head is normed"


@pytest.mark.parametrize("router", [Router("sparse_mixer", selection_bias=True), Router("sparse_mixer", groups=2)])
def test_a_sparse_mixer_ranks_logits_alone(router: Router) -> None:
    """Biases and groups rank what an expert is worth, which a sparse mixer does not know before it weighs."""
    assert refusal(placed(topk(router=Router("sparse_mixer"))), Options()) is None
    assert refusal(placed(topk(router=router)), Options()) == "a sparse mixer with a selection bias or groups"


def test_latents_are_kept_as_they_are() -> None:
    config = llama_like(topk(), attention=(SHAPES[MLA],))
    assert refusal(config, Options()) is None
    assert refusal(config, Options(kv_cache="int8")) == (
        "a KV cache in int8 for latent attention, which keeps one small copy already"
    )
