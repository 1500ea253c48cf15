"""A decoder on native kernels gives what the plain-torch decoder gives, for every kind of layer and at every count."""

import copy
import random
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import load
from model.backends.cpu.refusal import refusal
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, BudgetRows, Pages
from model.decoder import Decoder
from model.options import Options, Quantize
from model.shapes.attention import MLA, Attention, GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense, Infinity, Router
from model.shapes.rope import Rope
from model.step import Observer
from tests.model.tiny import VOCABULARY, PagedRun, decoder, gpt2_like, infinity, llama_like, topk

LENGTH = 64
PLAIN, GATED = Dense(20, "gelu_tanh", gated=False, bias=True), Dense(20, "silu")


def llama(*layers: FeedForward, **changes: object) -> DecoderConfig:
    return llama_like(*layers, **{"head_width": 16} | changes)


def gpt2(*layers: FeedForward, **changes: object) -> DecoderConfig:
    return gpt2_like(*layers, **{"head_width": 16} | changes)


def wide(block: int, units: int = 192, **changes: object) -> Infinity:
    return infinity(block=block, units=units, **changes)


LATENT = MLA(4, 12, 32, 8, Rope(16, interleaved=True), 16, bias=True, scale=0.4)
SIGMOID = Router("sigmoid", selection_bias=True)
GROUPED = Router("sigmoid", True, 2.5, selection_bias=True, groups=3, kept_groups=2, group_score="top2", eps=1e-20)
MIN_SUM = Router(normalise=True, selection_bias=True, eps=0.3, clamp_sum=True)
MIXER = Router("sparse_mixer", jitter=0.3)
DELTA = GatedDeltaNet(2, 4, 16, 32, 4)
WINDOW = Attention(4, 4, 32, Rope(32), window=5)
SCALES = {"embed_scale": 3.0, "residual_scale": 0.7, "logit_scale": 1.3, "head_bias": True}
CLAMPED = topk(activation="swiglu_clamped", bias=True, normalise=True)
NEIGHBOURS = Rope(12, interleaved=True)
CHUNKS = Attention(4, 2, 16, Rope(16, interleaved=True), qk_norm="unit", chunk=6)
TEMPERATURE = Attention(4, 2, 16, floor_scale=5.0, attn_scale=0.5)
LAYOUTS: dict[str, DecoderConfig] = {
    "llama-topk": llama(topk(), topk(normalise=True)),
    "llama-topk-tied": llama(topk(width=32, experts=20), topk(), tied=True),
    "gpt2-topk": gpt2(topk(width=40, activation="gelu"), topk(normalise=True)),
    "gpt2-untied": gpt2(topk(), topk(), tied=False),
    "olmoe": llama(topk(), topk(), qk_norm="full", clip=0.8, kv_heads=4),
    "dense": llama(GATED, Dense(33, "relu", bias=True)),
    "gpt2-dense": gpt2(PLAIN, Dense(48, "gelu", gated=False)),
    "blocks-of-64": llama(wide(64), wide(64, draws="antithetic")),
    "blocks-of-32": llama(wide(32), wide(32, sigma_link="softplus")),
    "blocks-of-16": gpt2(wide(16, activation="gelu_tanh"), wide(16, draws="antithetic", sigma_min=0.1)),
    "units": llama(wide(1), wide(1, draws="antithetic", keep_ratio=0.1)),
    "units-softplus": gpt2(wide(1, sigma_link="softplus"), wide(1, units=50, draws="antithetic")),
    "eights": llama(wide(8), wide(8, sigma_link="softplus", draws="antithetic")),
    "units-of-width-32": llama(wide(1), wide(8, activation="relu"), width=32),
    "all-kinds": gpt2(PLAIN, topk(), infinity(), GATED),
    "qwen3": llama(topk(normalise=True), topk(), qk_norm="head", scale=0.3),
    "windows": llama(topk(), topk(), attention=(WINDOW, Attention(4, 2, 16, Rope(16, 500.0)))),
    "sinks": llama(topk(), topk(), sinks=True, window=3, bias=True),
    "zero-centred": llama(topk(), topk(), qk_norm="head", norm_offset=1.0, scale=0.05),
    "gates": llama(topk(), topk(), rope=NEIGHBOURS, qk_norm="head", bias=True, gated=True),
    "neighbours": llama(topk(), topk(), rope=NEIGHBOURS, qk_norm="full", clip=0.8),
    "llama4": llama(topk(), topk(), attention=(CHUNKS, TEMPERATURE)),
    "latents": llama(topk(), topk(), attention=(LATENT, replace(LATENT, query_rank=None, rope=Rope(16)))),
    "yarn": llama(topk(), topk(), rope=Rope(16, scaling="yarn", factor=4.0, original=16)),
    "delta": llama(GATED, GATED, topk(), attention=(DELTA, WINDOW, DELTA)),
    "one-group": llama(topk(), infinity(), kv_heads=1, qk_norm="full"),
    "scaled": llama(topk(), Dense(20, "silu", bias=True), infinity(block=1), topk(), **SCALES),
    "scaled-gpt2": gpt2(topk(), PLAIN, **SCALES | {"head_bias": False}),
    "sigmoid": llama(topk(router=GROUPED), topk(router=SIGMOID)),
    "router-biases": llama(topk(router=Router(normalise=True, logit_bias=True)), topk(router=MIN_SUM)),
    "weighed-inputs": llama(topk(router=Router("sigmoid", weigh_input=True)), topk(router=Router(scale=0.5))),
    "sparse-mixer": llama(topk(router=MIXER), topk(router=MIXER)),
    "shared": llama(topk(shared=Dense(24, "silu")), topk(shared=GATED, shared_gate=True)),
    "shared-apart": llama(
        topk(shared=Dense(20, "silu", bias=True), shared_gate=True),
        topk(shared=Dense(12, "gelu"), router=Router("sigmoid", weigh_input=True)),
        residual_scale=0.7,
    ),
    "biases": llama(topk(bias=True, width=20), replace(CLAMPED, interleaved=True)),
}
NEAR_TIES = ("sigmoid", "router-biases", "sparse-mixer")  # whose choices rounding changes more often
each_layout = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not load().native:
        pytest.skip(f"no native kernels: {load().reason}")


def native(model: Decoder, quantize: Quantize = "none", experts_only: bool = True) -> NativeDecoder:
    """Of a copy: a native decoder takes over what it is made from."""
    return NativeDecoder(copy.deepcopy(model), LENGTH, quantize, experts_only)


def sequences(config: DecoderConfig, counts: str) -> tuple[list[list[int]], list[Tensor]]:
    """Random rows of ids, and counts per layer and token: all 1, all as trained, all the most, or mixed."""
    rng = random.Random(2)
    rows = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(9, 40))] for _ in range(4)]
    if not config.mixtures:
        return rows, [torch.zeros(0, len(row), dtype=torch.int64) for row in rows]
    experts, generator = config.experts, torch.Generator().manual_seed(3)
    fixed = {"one": experts.minimum, "trained": experts.trained, "most": experts.maximum}
    shapes = [(experts.layers, len(row)) for row in rows]
    if counts in fixed:
        return rows, [torch.full(shape, fixed[counts]) for shape in shapes]
    return rows, [torch.randint(1, experts.maximum + 1, shape, generator=generator) for shape in shapes]


def in_chunks(run: PagedRun, largest: int) -> Tensor:
    """All logits, row by row; chunks of several sequences in each step."""
    rng = random.Random(4)
    parts: dict[int, list[Tensor]] = {row: [] for row in range(len(run.rows))}
    while todo := [row for row in parts if run.done[row] < len(run.rows[row])]:
        some = rng.sample(todo, rng.randint(1, len(todo)))
        lengths = {row: min(rng.randint(1, largest), len(run.rows[row]) - run.done[row]) for row in some}
        for row, logits in run.step(lengths).items():
            parts[row].append(logits)
    return torch.cat([torch.cat(logits) for logits in parts.values()])


@each_layout
@pytest.mark.parametrize("counts", ["one", "trained", "most", "mixed"])
def test_logits_are_those_of_the_torch_decoder(name: str, counts: str) -> None:
    model = decoder(LAYOUTS[name])
    rows, per_token = sequences(model.config, counts)
    expected = in_chunks(PagedRun(model, rows, per_token), 40)
    found = in_chunks(PagedRun(native(model), rows, per_token, block_size=16), 40)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@each_layout
@pytest.mark.parametrize("quantize", ["none", "int8", "int8-weights", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_do_not_depend_on_the_chunks(name: str, quantize: Quantize, dtype: torch.dtype) -> None:
    """To the bit; and rounded weights stay near the model that they were rounded from."""
    model = decoder(LAYOUTS[name])
    rows, per_token = sequences(model.config, "mixed")
    made = native(copy.deepcopy(model).to(dtype), quantize, experts_only=False)
    runs = [in_chunks(PagedRun(made, rows, per_token, block_size=size), most) for size, most in ((16, 1), (48, 50))]
    assert torch.equal(*runs)
    expected = in_chunks(PagedRun(model, rows, per_token), 40)
    if not model.config.draws_noise:  # there a draw's choice is another as soon as anything is rounded
        apart = (runs[0] - expected).square().mean().sqrt() / expected.std()
        rounded = quantize != "none" or dtype == torch.bfloat16
        most = 0.5 if quantize == "int4" else 0.2 if name in NEAR_TIES else 0.1
        assert apart < (most if rounded else 1e-4)


def test_a_shared_part_keeps_its_form_where_experts_alone_are_int8() -> None:
    """It is a layer of its own then, whose result is that of the pieces behind the experts."""
    model = decoder(LAYOUTS["shared"])
    rows, per_token = sequences(model.config, "mixed")
    made = native(model, "int8", experts_only=True)
    runs = [in_chunks(PagedRun(made, rows, per_token, block_size=16), most) for most in (1, 50)]
    assert torch.equal(*runs)
    expected = in_chunks(PagedRun(native(model), rows, per_token, block_size=16), 40)
    assert 1e-4 < (runs[0] - expected).square().mean().sqrt() / expected.std() < 0.1


@pytest.mark.parametrize("name", ["sinks", "gates"])
def test_a_cache_in_int8_is_near_and_does_not_depend_on_the_chunks(name: str) -> None:
    model = decoder(LAYOUTS[name])
    rows, per_token = sequences(model.config, "mixed")
    made = NativeDecoder(copy.deepcopy(model), LENGTH, kv_cache="int8")
    expected, one, many = (
        in_chunks(PagedRun(run, rows, per_token, block_size=16), most)
        for run, most in ((native(model), 40), (made, 1), (made, 50))
    )
    assert torch.equal(one, many)
    assert 1e-4 < (one - expected).square().mean().sqrt() / expected.std() < 0.03


class Seen(Observer):
    """Observer that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, list[int]]] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.told.append((layer, pairs, load_E.tolist()))


@each_layout
def test_both_tell_the_same_of_their_work(name: str) -> None:
    model, seen = decoder(LAYOUTS[name]), []
    rows, per_token = sequences(model.config, "mixed")
    for made, size in ((TorchRunnable(model), 4), (native(model), 16)):
        observer, run = Seen(), PagedRun(made, rows, per_token, block_size=size)
        run.model = lambda batch, pages, made=made, observer=observer: made(batch, pages, observer)
        run.step({row: len(ids) for row, ids in enumerate(rows)})
        seen.append(observer.told)
    assert seen[0] == seen[1] and len(seen[0]) == len(model.config.mixtures)


def test_only_the_wanted_rows_get_logits() -> None:
    made = native(decoder(LAYOUTS["llama-topk"]))
    cache, ids_T = made.cache(3, 16), torch.arange(20)
    budget = BudgetRows(torch.full((2, 20), 2), 2, (40, 40))
    fixed = (ids_T, torch.arange(20), torch.zeros(20, dtype=torch.int64), budget)
    pages = Pages(cache, torch.tensor([[1, 2]]), torch.tensor([[0, 20, 20]]))
    all_rows, few, none = (
        made(Batch(*fixed, rows_B=torch.tensor(rows, dtype=torch.int64)), pages)
        for rows in (list(range(20)), [17, 3], [])
    )
    assert torch.equal(few, all_rows[[17, 3]]) and none.shape == (0, VOCABULARY)


@each_layout
def test_the_model_is_taken_over(name: str) -> None:
    model = decoder(LAYOUTS[name])
    parameters = sum(p.numel() for p in model.parameters())
    layers = [weakref.ref(layer) for layer in model.layers]
    made = NativeDecoder(model, LENGTH)
    assert not any(layer() for layer in layers)  # each is given back as soon as the next is taken
    assert made.parameters == parameters and len(model.layers) == 0
    assert made.config == LAYOUTS[name] and made.dtype == torch.float32 and made.exact


@pytest.mark.parametrize(
    "config, block_size, reason",
    [
        (llama(topk()), 16, None),
        (llama(topk(), heads=32, kv_heads=1), 64, None),
        (llama_like(topk()), 16, "the head width 6 is not a multiple of 16"),
        (
            llama(topk(), topk(), attention=(WINDOW, replace(LATENT, rank=48))),
            16,
            "latents, rotary keys and values of 48, 16 and 16, no multiples of 32, 16 and 16",
        ),
        (
            llama(topk(), attention=(GatedDeltaNet(1, 1, 8, 16, 4),)),
            16,
            "the key_width 8 of a delta net is not a multiple of 16",
        ),
        (
            llama(topk(), attention=(GatedDeltaNet(1, 1, 16, 16, 17),)),
            16,
            "a convolution of 17 inputs, more than 16",
        ),
        (llama(topk(router=Router("sigmoid"))), 16, None),
        (llama(topk(router=Router("relu"))), 16, "Router.score is 'relu'"),
        (llama(topk(shared=GATED)), 16, None),
        (llama(topk(gated=False)), 16, "TopK.gated is False"),
        (llama(Dense(8, "swiglu_clamped")), 16, None),
        (llama(infinity(activation="swiglu_clamped")), 16, "Infinity.activation is 'swiglu_clamped'"),
        (llama(topk(), logit_scale=2.0), 16, None),
        (llama(topk()), 24, "the block size 24 is not a multiple of 16"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_with_a_reason(
    config: DecoderConfig, block_size: int, reason: str | None
) -> None:
    assert refusal(config, Options(block_size)) == reason
