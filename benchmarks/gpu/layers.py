"""How fast are a decoder's layers, and how far from what the card allows? Under graph replay, with several sets of
weights in turn, so that none is still in the cache.

The floor of a layer is the time to move the bytes that must move (distinct experts, router, tokens in and out; keys and
values) at the bandwidth that `card.py` measured, or to do its operations at the peak of large products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import peers, shapes
from benchmarks.gpu.card import FIGURES
from benchmarks.gpu.pages import Paged, mask_of, paged
from benchmarks.gpu.part import Part
from benchmarks.gpu.shapes import LayerShape
from benchmarks.gpu.timing import Timed, forget, timed
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.layer import MoELayer, moe_layer, row_tile
from model.backends.cuda.quantise import quantised
from model.moe.topk import TopKMixture

TOKENS = (1, 8, 32, 128, 1024, 4096)
TARGETS = {1: 0.60, 8: 0.75, 32: 0.85, 128: 0.80}  # of the bandwidth, by tokens
COPIES = 3
COLD_BYTES = 200 << 20  # that no cache holds
CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the card reaches; nothing is known of it on a dry run."""

    bytes_s: float | None
    flops_s: float | None

    @classmethod
    def of(cls, part: Part) -> "Ceiling":
        """As the part `card` has measured it."""
        row = part.earlier(FIGURES)
        copy, read, products = (row.get(name) for name in ("copy_gb_s", "read_gb_s", "bf16_tflop_s"))
        return cls(1e9 * max(copy, read) if copy and read else None, 1e12 * products if products else None)

    def micro(self, moved: float, flops: float = 0.0) -> float | None:
        """The least microseconds."""
        if self.bytes_s is None or self.flops_s is None:
            return None
        return 1e6 * max(moved / self.bytes_s, flops / self.flops_s)


def share(floor: float | None, time: Timed) -> float | None:
    """The floor over the time."""
    return None if floor is None or time.micro is None else floor / time.micro


def run(part: Part) -> None:
    """Mixtures first; kernels are compiled beforehand, in processes side by side."""
    dtype = torch.float32 if part.dry else torch.bfloat16
    chosen = shapes.shapes(part.dry)[-1 if part.dry else 0 :]
    tokens = (2,) if part.dry else TOKENS
    if not part.dry:
        part.share([(f"compiling for {shape.name}, {rows} tokens", partial(_compile, part, shape, rows, dtype))
                    for rows in reversed(tokens) for shape in chosen])  # fmt: skip
    ceiling = Ceiling.of(part)
    for shape in chosen:
        with part.tried(f"mixture of {shape.name}"), torch.inference_mode():
            _mixtures(part, shape, tokens, dtype, ceiling)
        forget()
    for shape in chosen:
        with part.tried(f"attention of {shape.name}"), torch.inference_mode():
            _attentions(part, shape, dtype, ceiling)
        with part.tried(f"dense layers of {shape.name}"), torch.inference_mode():
            _dense(part, shape, tokens, dtype, ceiling)
        forget()


@torch.inference_mode()
def _compile(part: Part, shape: LayerShape, rows: int, dtype: torch.dtype) -> None:
    """Run every launch of a number of tokens once: the kernels are then on disk."""
    layer = moe_layer(shapes.mixture(shape, part.device, dtype))
    for name, counts in _counts(shape).items():
        with part.tried(f"{shape.name}, {rows} tokens, K = {name}"):
            _ours(layer, *_input(shape, rows, counts, part.device, dtype, 0))
    torch.cuda.synchronize()


def _counts(shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Counts of neighbouring tokens."""
    trained = shape.moe.trained
    single = {str(count): (count,) for count in sorted({1, 2, trained})}
    return single | {f"{trained} / 2 mixed": (trained, 2)}


Input = tuple[Tensor, Tensor, int]


def _input(
    shape: LayerShape, rows: int, counts: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int
) -> Input:
    """Rows, their counts, and the largest."""
    counts_T = torch.tensor([counts[at % len(counts)] for at in range(rows)], device=device)
    return shapes.rows(rows, shape.width, device, dtype, seed), counts_T, max(counts[:rows])


def _ours(layer: MoELayer, x_TD: Tensor, counts_T: Tensor, k_max: int) -> Tensor:
    """The layer's output alone: it is added to zeros."""
    residual_TD = torch.zeros_like(x_TD)
    layer(x_TD, counts_T, k_max, residual_TD)
    return residual_TD


def _mixtures(part: Part, shape: LayerShape, tokens: Sequence[int], dtype: torch.dtype, ceiling: Ceiling) -> None:
    """All tokens and counts of one shape."""
    modules = [shapes.mixture(shape, part.device, dtype, seed) for seed in range(1 if part.dry else COPIES)]
    layers = [moe_layer(module) for module in modules]
    for rows in tokens:
        for name, counts in _counts(shape).items():
            what = f"{shape.name}, {rows} tokens, K = {name}"
            if rows < len(counts) or not part.enough(what, 3):
                continue
            with part.tried(what):
                made = 1 if part.dry else max(2, min(24, 512 // rows))
                inputs = [_input(shape, rows, counts, part.device, dtype, seed) for seed in range(made)]
                _mixture(part, shape, name, modules, layers, inputs, ceiling)
    narrow = [_in_8_bits(layer) for layer in layers]
    for rows in tokens:
        what = f"{shape.name} in 8 bits, {rows} tokens"
        if part.enough(what, 3):
            with part.tried(what):
                made = 1 if part.dry else max(2, min(24, 512 // rows))
                counts = (shape.moe.trained,)
                inputs = [_input(shape, rows, counts, part.device, dtype, seed) for seed in range(made)]
                ours = _timed(narrow, inputs, part.device)
                work = _work(shape, narrow[0], inputs, weight_bytes=1)
                _add(part, f"mixture of {shape.name}, fp8-weights", rows, str(counts[0]), work, ours, ceiling)


def _mixture(
    part: Part,
    shape: LayerShape,
    name: str,
    modules: list[TopKMixture],
    layers: list[MoELayer],
    inputs: list[Input],
    ceiling: Ceiling,
) -> None:
    """One row: ours beside torch's ways, which run the largest count for all."""
    (x_TD, counts_T, k_max), rows = inputs[0], len(inputs[0][0])
    ours = _timed(layers, inputs, part.device)
    ways: dict[str, peers.Layer] = {"grouped_mm": peers.grouped}
    if rows * k_max <= peers.MAX_GATHERED:
        ways["gathered"] = peers.gathered
    theirs: dict[str, Timed] = {}
    for way, peer in ways.items():
        with part.tried(f"{way}, {shape.name}, {rows} tokens, K = {name}"):
            calls = [partial(peer, modules[n % len(modules)], given[0], k_max) for n, given in enumerate(inputs)]
            if not bool((counts_T < k_max).any()):
                _same(part, way, _ours(layers[0], x_TD, counts_T, k_max), peer(modules[0], x_TD, k_max))
            theirs[way] = timed(calls, part.device)
    others = {f"{way}_us": time.micro for way, time in theirs.items()}
    work = _work(shape, layers[0], inputs, x_TD.element_size())
    _add(part, f"mixture of {shape.name}", rows, name, work, ours, ceiling, **others)


def _timed(layers: list[MoELayer], inputs: list[Input], device: torch.device) -> Timed:
    """Layers and inputs take turns."""
    return timed([partial(_ours, layers[n % len(layers)], *given) for n, given in enumerate(inputs)], device)


def _in_8_bits(layer: MoELayer) -> MoELayer:
    """The same with experts in float8_e4m3fn."""
    gate_up, down = (quantised(weight, "fp8-weights") for weight in (layer.gate_up, layer.down))
    return replace(layer, gate_up=gate_up, down=down)


@dataclass(frozen=True, slots=True)
class Work:
    """What a call must do, mean over the inputs."""

    distinct: float  # experts
    bytes: float
    flops: float


def _work(shape: LayerShape, layer: MoELayer, inputs: list[Input], weight_bytes: int) -> Work:
    """Bytes: distinct experts, router, tokens in and out. Operations: router and pairs."""
    (x_TD, counts_T, _), size = inputs[0], inputs[0][0].element_size()
    rows, router = len(x_TD), shape.moe.experts * shape.width
    distinct = sum(_distinct(layer, *given) for given in inputs) / len(inputs)
    moved = weight_bytes * distinct * shape.expert_weights + size * (router + 2 * rows * shape.width)
    return Work(distinct, moved, 2 * (int(counts_T.sum()) * shape.expert_weights + rows * router))


def _add(
    part: Part, table: str, rows: int, name: str, work: Work, ours: Timed, ceiling: Ceiling, **others: float | None
) -> None:
    floor = ceiling.micro(work.bytes, work.flops)
    part.add(table, tokens=rows, K=name, experts=work.distinct, mb=work.bytes / 1e6, floor_us=floor,
             ours_us=ours.micro, share=share(floor, ours), target=TARGETS.get(rows, "–"), launched=ours.how,
             **others)  # fmt: skip


def _distinct(layer: MoELayer, x_TD: Tensor, counts_T: Tensor, k_max: int) -> int:
    """How many experts any row uses."""
    return int((layer.route(x_TD, counts_T, k_max).loads_E > 0).sum())


def _same(part: Part, way: str, ours_TD: Tensor, theirs_TD: Tensor) -> None:
    """A peer that computes something else would be no peer. Near-ties of bfloat16 logits may go another way."""
    error = (ours_TD.float() - theirs_TD.float()).square().mean().sqrt() / ours_TD.float().std()
    if not float(error) < 0.2:
        part.lose(way, f"its result differs from ours: relative error {float(error):.3f}")


def _attentions(part: Part, shape: LayerShape, dtype: torch.dtype, ceiling: Ceiling) -> None:
    """Decoding by the number of sequences, and chunks of a prompt; beside torch's attention over contiguous keys."""
    steps: list[tuple[int, int, int]] = [(batch, 1, CONTEXT) for batch in (1, 8, 32, 128)]
    steps += [(1, 1, 32 * CONTEXT), (1, 1024, 1024), (1, 1024, 4096)]
    for batch, new, context in [(2, 1, 70)] if part.dry else steps:
        what = f"attention of {shape.name}: {batch} × {new} of {context}"
        if not part.enough(what, 3):
            continue
        with part.tried(what):
            _attention(part, shape, (batch, new, context), dtype, ceiling)


def _attention(part: Part, shape: LayerShape, step: tuple[int, int, int], dtype: torch.dtype, ceiling: Ceiling) -> None:
    (batch, new, context), attention = step, shape.attention
    moved = 2 * batch * context * attention.kv_heads * attention.head_width * dtype.itemsize
    copies = 1 if part.dry else max(2, min(24, -(-COLD_BYTES // moved)))
    spec = mask_of(attention, part.device)
    batches = [paged(attention, [(new, context)] * batch, part.device, dtype, seed) for seed in range(copies)]
    ours = timed([one.prepared(spec) for one in batches], part.device)
    torch_time = timed([_torch_attention(one, batch, new, context) for one in batches], part.device)
    seen = batch * (new * context - new * (new - 1) // 2)
    floor = ceiling.micro(moved, 4 * seen * attention.heads * attention.head_width)
    part.add(f"attention of {shape.name}", sequences=batch, new=new, context=context, mb=moved / 1e6, floor_us=floor,
             ours_us=ours.micro, share=share(floor, ours), launched=ours.how,
             torch_contiguous_us=torch_time.micro)  # fmt: skip


def _torch_attention(one: Paged, batch: int, new: int, context: int) -> Callable[[], Tensor]:
    """Torch's, without sinks, over as many keys that lie side by side."""
    k_BSGC, v_BSGC = one.cache_PSGC[:, : batch * context].unflatten(1, (batch, context))
    q_BHTC = one.q_THC.unflatten(0, (batch, new)).transpose(1, 2)
    given = (q_BHTC, k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2))
    return partial(F.scaled_dot_product_attention, *given, is_causal=new == context, enable_gqa=True)


def _dense(part: Part, shape: LayerShape, tokens: Sequence[int], dtype: torch.dtype, ceiling: Ceiling) -> None:
    """Queries, keys and values; beside torch's product."""
    attention, device = shape.attention, part.device
    outputs = (attention.heads + 2 * attention.kv_heads) * attention.head_width
    bytes_of_one = outputs * shape.width * dtype.itemsize
    copies = 1 if part.dry else max(2, min(24, -(-COLD_BYTES // bytes_of_one)))
    matrices = [shapes.rows(outputs, shape.width, device, dtype, seed) for seed in range(copies)]
    for rows in tokens:
        what = f"dense layers of {shape.name}, {rows} tokens"
        if not part.enough(what, 2):
            return
        x_TD, out_TU = shapes.rows(rows, shape.width, device, dtype), torch.empty(rows, outputs, device=device)
        tile = row_tile(rows)
        ours = timed([partial(gemm, x_TD, Weight(one[None]), out_TU, tile=tile) for one in matrices], device)
        theirs = timed([partial(F.linear, x_TD, one) for one in matrices], device)
        moved = bytes_of_one + rows * (shape.width + outputs) * dtype.itemsize
        floor = ceiling.micro(moved, 2 * rows * outputs * shape.width)
        part.add(f"queries, keys and values of {shape.name}", tokens=rows, mb=moved / 1e6, floor_us=floor,
                 ours_us=ours.micro, share=share(floor, ours), torch_us=theirs.micro)  # fmt: skip
