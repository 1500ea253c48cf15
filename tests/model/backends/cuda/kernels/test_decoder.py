"""A decoder on kernels, over pages: the same bits in any cut and beside padding, nothing read back, what is observed.

That every family gives the logits of plain torch is in `test_decoder_families.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.backends.cuda import places
from model.backends.cuda.attention import attention_layer, attention_refusal
from model.backends.cuda.inputs import StepInputs, copied
from model.backends.cuda.kernels import attend
from model.backends.cuda.kernels.attend import QueryTiles
from model.backends.cuda.quantise import Precision
from model.backends.cuda.runnable import CudaRunnable
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, BudgetRows, LateIds, Pages
from model.budget import FAMILY_RULE, RoutingRule
from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Router
from tests.model.tiny import PagedRun, decoder, gpt2_like, infinity, llama_like, topk
from weights.repair import give_tables, neutral_tables

PAGE = 8
HEADS = {"heads": 2, "kv_heads": 1, "head_width": 8}
SPARSE = topk(experts=4, router=Router(normalise=True))
IDS, OTHER = [(7 * at) % 61 for at in range(11)], [5, 9, 2]
DECODERS = {
    "sparse": llama_like(SPARSE, Dense(20, "silu"), qk_norm="head", window=9, gated=True, **HEADS),
    "infinity": gpt2_like(infinity(draws="antithetic", maximum=3), heads=2, kv_heads=2, head_width=8),
}


@pytest.fixture(autouse=True)
def small_pages(poison: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short sequences cross a page, and a page is a segment. Nothing may be read that was not written."""
    monkeypatch.setattr(attend, "PAGE", PAGE)
    monkeypatch.setattr(places, "PAGE", PAGE)
    monkeypatch.setattr(attend, "SEGMENT", PAGE)
    with torch.inference_mode():
        yield


def runnable(config: DecoderConfig) -> CudaRunnable:
    return CudaRunnable(decoder(config), config.context)


def counts_of(config: DecoderConfig, tokens: int) -> Tensor:
    """Another count for each token."""
    most = max(1, config.experts.maximum)
    return torch.tensor([1 + at % most for at in range(tokens)]).expand(len(config.mixtures), -1)


def run_of(model: CudaRunnable | Decoder, *rows: list[int]) -> PagedRun:
    return PagedRun(model, list(rows), [counts_of(model.config, len(row)) for row in rows], PAGE)


@pytest.mark.parametrize("kind", DECODERS)
def test_bits_do_not_depend_on_chunks_or_neighbours(kind: str, chains: None) -> None:
    """All tokens at once; then seven, two beside another sequence, and two one by one."""
    model = runnable(DECODERS[kind])
    assert model.exact
    whole_TV = run_of(model, IDS).step({0: len(IDS)})[0]
    cut = run_of(model, IDS, OTHER)
    parts = [cut.step(lengths)[0] for lengths in ({0: 7}, {1: 2, 0: 2}, {0: 1}, {0: 1})]
    assert torch.equal(torch.cat(parts), whole_TV)


def step_of(run: PagedRun, lengths: dict[int, int]) -> tuple[Batch, Pages]:
    """The input of the run's next step."""
    taken: list[tuple[Batch, Pages]] = []

    def take(batch: Batch, pages: Pages) -> Tensor:
        taken.append((batch, pages))
        return torch.zeros(len(batch.ids_T), 1)

    model, run.model = run.model, take  # type: ignore[assignment]
    run.step(lengths)
    run.model = model
    return taken[0]


def padded(inputs: StepInputs, rows: int) -> StepInputs:
    """The same step with rows of padding behind its tokens, and an empty tile."""

    def longer(values: Tensor, value: int) -> Tensor:
        return torch.cat([values, values.new_full((*values.shape[:-1], rows), value)], dim=-1)

    tiles = inputs.tiles
    return replace(
        inputs,
        shape=replace(inputs.shape, tokens=inputs.shape.tokens + rows, tiles=inputs.shape.tiles + 1),
        ids_T=longer(inputs.ids_T, 0),
        positions_T=longer(inputs.positions_T, 0),
        seeds_T=longer(inputs.seeds_T, 0),
        counts_LT=longer(inputs.counts_LT, 0),
        slots_T=longer(inputs.slots_T, -1),
        tiles=QueryTiles(
            torch.cat([tiles.sequence_N, tiles.sequence_N.new_full((1,), -1)]),
            torch.cat([tiles.first_N, tiles.first_N.new_zeros(1)]),
            tiles.rows,
        ),
    )


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # a row of padding
@pytest.mark.parametrize("kind", DECODERS)
def test_padding_changes_nothing(kind: str, chains: None) -> None:
    model = runnable(DECODERS[kind])
    run = run_of(model, IDS[:5], OTHER)
    inputs = model.inputs(*step_of(run, {0: 4, 1: 2}))
    wanted = model.program.compute(inputs)
    written = [layer.clone() for layer in inputs.cache.layers]
    found = model.program.compute(padded(inputs, 3))
    assert torch.equal(model.program.logits(found.normed_BD), model.program.logits(wanted.normed_BD))
    assert all(torch.equal(*pair) for pair in zip(found.loads, wanted.loads, strict=True))
    for layer, before in zip(inputs.cache.layers, written, strict=True):
        assert torch.equal(layer, before)


class NothingRead(TorchDispatchMode):
    """Fails where an operation reads a value, or gives a size that follows from values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tag in (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape):
            assert tag not in func.tags, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", DECODERS)
def test_nothing_is_read_back(kind: str) -> None:
    model = runnable(DECODERS[kind])
    inputs = model.inputs(*step_of(run_of(model, OTHER), {0: 3}))
    with NothingRead():
        model.program.compute(inputs)


@pytest.mark.parametrize("read", [lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: x[x > 1]])
def test_what_is_read_is_found(read: Any) -> None:
    with NothingRead(), pytest.raises(AssertionError):
        read(torch.ones(4, dtype=torch.int64))


class Heard:
    """What an observer was told, by layer."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.told.append(("loads", layer, load_E.tolist()))

    def used(self, layer: int, used_T: Tensor) -> None:
        self.told.append(("used", layer, used_T.tolist()))

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        self.told.append(("routes", layer, [[e for e in row if e >= 0] for row in expert_TK.tolist()]))


def heard(model: TorchRunnable, batch: Batch, pages: Pages) -> tuple[list[tuple[Any, ...]], Tensor]:
    observer = Heard()
    logits_BV = model.launch(batch, replace(pages, cache=model.cache(4, PAGE)), observer)
    return observer.told, logits_BV


ADAPTIVE = (FAMILY_RULE, RoutingRule("raw", threshold=0.6), RoutingRule(2, top_p=0.5))
BY_BATCH = (FAMILY_RULE, RoutingRule(repair=True), RoutingRule(reuse=2))


@pytest.mark.parametrize(
    ("layers", "rules"),
    [
        ((SPARSE, Dense(20, "silu"), topk(experts=5)), ()),
        ((SPARSE, SPARSE), ADAPTIVE),
        ((SPARSE,), BY_BATCH),
        ((infinity(), SPARSE), ()),
    ],
    ids=["sparse", "rules", "rules by batch", "infinity"],
)
def test_observers_hear_what_plain_torch_tells_them(layers: Any, rules: tuple[RoutingRule, ...]) -> None:
    model = decoder(llama_like(*layers, **HEADS))
    give_tables(model, *tables_of(model.config))
    batch, pages = step_of(run_of(model, IDS[:4], OTHER), {0: 4, 1: 2})
    batch = replace(batch, routes=True, budget=with_rules(batch.budget, rules))
    found, logits_BV = heard(CudaRunnable(model, 64), batch, pages)
    wanted, wanted_BV = heard(TorchRunnable(model), batch, pages)
    assert found == wanted and len(found) == (3 if rules else 2) * len(model.config.mixtures)
    torch.testing.assert_close(logits_BV, wanted_BV, atol=2e-5, rtol=1e-5)


def tables_of(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Statistics of repair that change something."""
    scale, shift = neutral_tables(config)
    return scale * 1.5, shift + 0.25


def with_rules(budget: BudgetRows, rules: tuple[RoutingRule, ...]) -> BudgetRows:
    """Every token has another of the rules."""
    rule_T = torch.arange(budget.counts_LT.shape[1]) % len(rules) if rules else None
    return replace(budget, rules=rules, rule_T=rule_T)


def test_eight_bits_are_near_sixteen_and_the_layers_are_let_go() -> None:
    model = decoder(llama_like(SPARSE, Dense(20, "silu"), **HEADS))
    batch, pages = step_of(run_of(model, IDS[:3]), {0: 3})
    wanted_BV = heard(TorchRunnable(model), batch, pages)[1]
    quantised = CudaRunnable(model, 64, Precision("int8-weights", experts_only=False))
    found_BV = heard(quantised, batch, pages)[1]
    assert 0 < (found_BV - wanted_BV).abs().max() < 0.1
    assert not [
        name for name, _ in model.named_parameters() if "ffn." in name or "attention." in name or "head" in name
    ]


def test_ids_that_only_the_device_knows_take_their_place() -> None:
    model = runnable(llama_like(Dense(20, "silu"), **HEADS))
    batch, pages = step_of(run_of(model, IDS[:3]), {0: 3})
    late = LateIds(torch.tensor([2]), torch.tensor([1]), torch.tensor([50, 33]))
    assert model.inputs(replace(batch, late=late), pages).ids_T.tolist() == [*IDS[:2], 33]


def test_the_host_may_overwrite_a_step_that_was_launched() -> None:
    model = runnable(llama_like(Dense(20, "silu"), **HEADS))
    batch, pages = step_of(run_of(model, IDS[:3]), {0: 3})
    inputs = model.inputs(batch, pages)
    batch.ids_T.zero_(), pages.tables_BP.zero_(), batch.budget.counts_LT.zero_()
    assert inputs.ids_T.tolist() == IDS[:3] and inputs.slots_T.tolist() != [0, 1, 2]


def test_tensors_are_copied_side_by_side() -> None:
    tensors = [
        torch.arange(3),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.ones(2, 5),
        torch.tensor([7], dtype=torch.int32),
    ]
    copies = copied(tensors, torch.device("cpu"))
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(copies, tensors, strict=True))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert all(copy.storage_offset() * copy.element_size() % 256 == 0 for copy in copies)


def test_queries_are_cut_into_tiles_of_one_sequence() -> None:
    spans_B3 = torch.tensor([(0, 1, 9), (1, 5, 5), (6, 2, 40)])
    tiles = places.query_tiles(spans_B3, 2)
    assert tiles.rows == 2
    assert tiles.sequence_N.tolist() == [0, 1, 1, 1, 2] and tiles.first_N.tolist() == [0, 0, 2, 4, 0]
    assert places.query_tiles(spans_B3[:1], 2).rows == 1


def test_new_tokens_have_the_slots_of_their_positions() -> None:
    tables_BP = torch.tensor([[3, 1, 0], [7, 2, 5]])
    spans_B3 = torch.tensor([(0, 2, 9), (2, 3, 18)])
    assert places.slots_of(tables_BP, spans_B3).tolist() == [3 * 8 + 7, 8, 2 * 8 + 7, 5 * 8, 5 * 8 + 1]


def test_blocks_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="blocks of 8 tokens, not of 4"):
        runnable(llama_like(Dense(20, "silu"), **HEADS)).cache(3, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "attention to later tokens"),
        ({"gated": True, "qk_norm": "full"}, "a norm over all heads beside gates"),
        ({"head_width": 258}, "heads of more than 256 elements have no GPU kernel, these have 258"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    model = decoder(llama_like(SPARSE, **HEADS | changes))
    assert reason in attention_refusal(model.config.attention[0])
    with pytest.raises(ValueError, match=reason):
        attention_layer(model.layers[0].attention, 1e-5)
    found = CudaRunnable(model, 64)
    assert found.program.plain == (attention_refusal(model.config.attention[0]),)
    assert not found.exact and found.kernels.endswith("and torch")
