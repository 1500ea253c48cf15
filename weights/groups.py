"""Parameters that stay quantised (`Grouped`): joins the parts of one, without rounding, in a form that holds all of
them, and puts the result in the parameter's place. Also the bytes that a weight of the loaded model takes.

It depends on parameters and their parts, not on files or formats.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.decoder import Decoder, Layer, grouped_parts
from model.grouped import Grouped, code_bits, code_bounds, packed_codes
from weights.files import Stored
from weights.forms import Form, common
from weights.rules import Index, TensorPart
from weights.share import FillPlan
from weights.sizes import BytesPerWeight
from weights.source import TensorSource

KeepGroups = Callable[[Decoder], Collection[str]]  # the names of the parameters that may be `Grouped`


def keepable(plan: FillPlan, source: TensorSource, names: Collection[str]) -> dict[str, int]:
    """The parameters among `names` whose tensors all have a grouped form, and their bytes in the form that holds
    all."""
    found = {}
    for target in plan.keys() & set(names):
        parts = [(part, source.stored[part.source]) for part in plan[target]]
        forms = [form for part, stored in parts if (form := _form(part, stored)) is not None]
        if forms and len(forms) == len(parts):
            found[target] = sum(common(forms).bytes(_matrices(part, stored)) for part, stored in parts)
    return found


def _form(part: TensorPart, stored: Stored) -> Form | None:
    """The grouped form of a part; None if it has none in the layout of the parameter."""
    return stored.form if stored.grouped and part.stored is None and part.transposed == stored.turned else None


def _matrices(part: TensorPart, stored: Stored) -> tuple[int, ...]:
    """The shape of the rows that a part takes of a tensor."""
    return stored.matrices if part.rows is None else (len(part.rows), *stored.matrices[1:])


def joined(parts: Sequence[tuple[TensorPart, Grouped]], shape: torch.Size) -> Grouped | None:
    """One parameter of `shape` from all its parts; None if a part does not have the shape of its place, or if the form
    that holds all parts would have numbers beyond float16."""
    placed = [(part.index, _chosen(part, grouped)) for part, grouped in parts]
    empty = torch.empty(shape, device="meta")
    if any(len(index) > len(shape) - 1 or empty[index].shape != part.shape for index, part in placed):
        return None
    form = common([Form.of(part) for _, part in placed])
    if len(placed) == 1 and not placed[0][0]:
        return _converted(placed[0][1], form)
    result = _empty(shape, form)
    for index, part in placed:
        _copy(_converted(part, form), result, index)
    beyond = form.minimum and not finite(result) and all(finite(part) for _, part in placed)
    return None if beyond else result


def _chosen(part: TensorPart, grouped: Grouped) -> Grouped:
    """The rows that a part takes of a tensor, in its first dimension (experts or outputs)."""
    if part.rows is None:
        return grouped
    rows = slice(part.rows.start, part.rows.stop)
    fields = {name: None if tensor is None else tensor[rows] for name, tensor in _fields(grouped)}
    return replace(grouped, **fields)  # type: ignore[arg-type]


def _fields(grouped: Grouped) -> Iterator[tuple[str, Tensor | None]]:
    """Its tensors by name."""
    return ((name, getattr(grouped, name)) for name in ("codes", "scales", "minima", "factors"))


def _converted(part: Grouped, form: Form) -> Grouped:
    """The same values in a form that holds them."""
    ratio = part.group // form.group
    scales = part.scales.repeat_interleave(ratio, -1) if ratio > 1 else part.scales
    minima = part.minima if part.minima is None or ratio == 1 else part.minima.repeat_interleave(ratio, -1)
    if form.minimum and minima is None:
        offset = -8 if (part.values, form.values) == ("signed", "unsigned") else 0
        minima = scales * offset
    codes = part.codes
    if form.values != part.values and code_bits(form.values) > 4:
        codes = part.integers()
        codes = codes if form.values == "bytes" else packed_codes(codes + 32, 6)
    ones = torch.ones(part.shape[:-1]) if form.factors and part.factors is None else part.factors
    return Grouped(codes, scales, form.group, form.values, minima, ones)


def _empty(shape: torch.Size, form: Form) -> Grouped:
    *batch, k = shape
    dtype = torch.int8 if form.values == "bytes" else torch.uint8
    codes = torch.empty(*batch, k * code_bits(form.values) // 8, dtype=dtype)
    scales = torch.empty(*batch, k // form.group, dtype=torch.float16)
    minima = torch.empty_like(scales) if form.minimum else None
    return Grouped(codes, scales, form.group, form.values, minima, torch.empty(batch) if form.factors else None)


def _copy(part: Grouped, target: Grouped, index: Index) -> None:
    for (_, given), (_, kept) in zip(_fields(part), _fields(target), strict=True):
        if given is not None and kept is not None:
            kept[index].copy_(given)


def finite(grouped: Grouped) -> bool:
    """Whether all values are finite."""
    largest = max(map(abs, code_bounds(grouped.values)))
    bound = grouped.scales.float().abs().amax(-1) * largest
    if grouped.minima is not None:
        bound = bound + grouped.minima.float().abs().amax(-1)
    if grouped.factors is not None:
        bound = bound * grouped.factors
    return bool(bound.isfinite().all())


def replace_parameter(model: nn.Module, target: str, grouped: Grouped) -> None:
    """Replace a parameter by its quantised form."""
    place, _, name = target.rpartition(".")
    module = model.get_submodule(place)
    delattr(module, name)
    setattr(module, name, grouped)


def kept_as(model: nn.Module) -> str:
    """The forms of the matrices that stay quantised, those with most values first; "" if there are none."""
    values: Counter[str] = Counter()
    for part in grouped_parts(model):
        values[str(Form.of(part))] += part.shape.numel()
    return ", ".join(form for form, _ in values.most_common())


def bytes_per_weight(model: Decoder) -> BytesPerWeight:
    """Bytes per weight of experts and of the rest, as loaded. An embedding that is not the head too is left out: a
    token reads one row of it."""
    mixtures = {layer.get_submodule("ffn") for layer in model.layers if isinstance(layer, Layer)}
    experts, others = Counter[str](), Counter[str]()
    for module in model.modules():
        if module is model.embed and not model.config.tied:
            continue
        parts: list[Tensor | Grouped] = [part for part in vars(module).values() if isinstance(part, Grouped)]
        for part in (*parts, *module.parameters(recurse=False)):
            of = experts if module in mixtures and len(part.shape) == 3 else others
            of.update(weights=part.shape.numel(), bytes=part.nbytes)
    return BytesPerWeight(*(of["bytes"] / max(1, of["weights"]) for of in (experts, others)))
