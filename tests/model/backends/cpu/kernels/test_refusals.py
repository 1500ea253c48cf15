"""Everything that a kernel takes for granted is checked: a wrong argument is an error that names it, never a crash."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from model.backends.cpu.kernels.build import SOURCES
from model.backends.cpu.kernels.pack import Kind
from model.backends.cpu.kernels.params import SCORES
from tests.model.backends.cpu.kernels.arguments import OPS, arguments, run
from tests.model.backends.cpu.kernels.program import (
    MADE,
    PROGRAM_REFUSALS,
    RULE_REFUSALS,
    drawing_program,
    headless,
    made,
    refused,
    rule_refused,
)

ops = torch.ops.moedial


class Refusal(NamedTuple):
    """An op, what is wrong with one argument, and what the error says of it."""

    op: str
    argument: str
    change: Callable[[Any], Any]
    says: str
    kind: Kind = "float"

    def message(self) -> str:
        given = arguments(self.op, self.kind)
        given[self.argument] = self.change(given[self.argument])
        with pytest.raises(RuntimeError) as error:
            run(self.op, given)
        return str(error.value)


def set_at(*values: tuple[tuple[int, ...], int]) -> Callable[[Tensor], Tensor]:
    """The tensor with other values at some indices."""

    def change(tensor: Tensor) -> Tensor:
        for at, value in values:
            tensor[at] = value
        return tensor

    return change


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1].clone()


def six_bits(table: Tensor) -> Tensor:
    """One of codes of 6 bits that stand for other integers than they must."""
    return torch.arange(-31, 33, dtype=table.dtype)


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


REFUSALS = [
    # What every op asks of tensors.
    Refusal("argmax", "logits", lambda x: x[:, :0].contiguous(), "there must be logits to choose from"),
    Refusal("constrain", "raw", shorter, "constrain: shapes do not fit"),
    Refusal("constrain", "allowed", lambda allowed: allowed[:, 1:].contiguous(), "constrain: shapes do not fit"),
    Refusal("constrain", "allowed", Tensor.long, "allowed has the wrong dtype, Long"),
    Refusal("constrain", "mask_of", shorter, "constrain: shapes do not fit"),
    Refusal("constrain", "mask_of", set_at(((1,), 4)), "row 1 has mask 4 of"),
    Refusal("constrain", "mask_of", set_at(((2,), -2)), "row 2 has mask -2 of"),
    Refusal("draw_tokens", "logits", lambda x: x[:, :0].contiguous(), "there cannot be 0 logits in a row"),
    Refusal("draw_tokens", "rows", set_at(((1,), 5)), "row 5 is not one of 5"),
    Refusal("draw_tokens", "rules", shorter, r"rules must be [2, 5], got [1, 5]"),
    Refusal("draw_tokens", "rules", set_at(((1, 0), 0)), "nothing is drawn with 0, 20, 0.9"),
    Refusal("draw_tokens", "rules", set_at(((0, 4), 1)), "nothing is drawn with 0.8, 20, 0.9"),
    Refusal("linear", "x", lambda x: x[0], "x must have 2 dimensions, got 1"),
    Refusal("linear", "x", strided, "x must be contiguous"),
    Refusal("linear", "x", Tensor.double, "x has the wrong dtype, Double"),
    Refusal("linear", "norm_weight", shorter, "norm weight must have 16 values, got 15"),
    Refusal("linear", "norm_bias", Tensor.bfloat16, "norm bias has the wrong dtype, BFloat16"),
    Refusal("linear", "bias", shorter, "bias must have 20 values, got 19"),
    Refusal("linear", "weight", Tensor.half, "packed weights cannot be Half"),
    Refusal("linear", "weight", shorter, "packed weights of 1 x [20, 16] must have 512 elements, got 511"),
    Refusal("linear", "weight", strided, "packed weights of 1 x [20, 16]"),
    Refusal("linear", "outputs", to(40), "packed weights of 1 x [40, 16] must have 768 elements"),
    Refusal("linear", "outputs", to(0), "a matrix must have outputs and inputs, got [0, 16]"),
    Refusal("linear", "outputs", to(-5), "a matrix must have outputs and inputs, got [-5, 16]"),
    Refusal("linear", "outputs", to(1 << 60), "a matrix of 1 x [1152921504606846976, 16] is too large"),
    Refusal("linear", "x", lambda x: x[:, :0].contiguous(), "a matrix must have outputs and inputs, got [20, 0]"),
    Refusal("linear", "weight_scales", to(None), "int8 weights need 2 x 32 scales and offsets", "int8"),
    Refusal("linear", "weight_scales", lambda s: s[:, 1:].contiguous(), "int8 weights need 2 x 32", "int8-weights"),
    Refusal("linear", "weight_scales", Tensor.float, "scales has the wrong dtype, Float", "int8"),
    Refusal("linear", "weight_group", to(24), "a group must have 16, 32, 64 or 128 inputs, got 24", "grouped"),
    Refusal("linear", "weight_group", to(-1), "a group must have 16, 32, 64 or 128 inputs, got -1", "grouped"),
    Refusal("linear", "weight_group", to(32), "1 x [20, 16] must have 544 bytes, got 288", "grouped"),
    Refusal("linear", "weight_header", to(3), "grouped weights of 1 x [20, 16] must have 352 bytes", "grouped"),
    Refusal("linear", "weight_header", to(0), "scale and minimum of a group must have 1 to 4 bytes, got 0", "grouped"),
    Refusal("linear", "weight_header", to(5), "scale and minimum of a group must have 1 to 4 bytes, got 5", "grouped"),
    Refusal("linear", "weight_header", to(2), "of 1 x [20, 16] must have 320 bytes, got 288", "grouped"),
    Refusal("linear", "weight_table", to(None), "grouped weights of 1 x [20, 16] must have 544 bytes", "grouped"),
    Refusal("linear", "weight_table", shorter, "a table must have 16 or 64 values, got 15", "grouped"),
    Refusal("linear", "weight_table", six_bits, "code 0 of 6 bits must stand for -32, got -31", "grouped"),
    Refusal("linear", "weight_table", Tensor.int, "table has the wrong dtype, Int", "grouped"),
    Refusal("linear", "weight_scales", to(None), "a grouped matrix needs the factors of its outputs", "grouped"),
    Refusal("linear", "weight_scales", shorter, "factors must have 32 values, got 31", "grouped"),
    Refusal("linear", "weight", Tensor.float, "a grouped matrix has the wrong dtype, Float", "grouped"),
    Refusal("quantise", "weight", lambda w: w[0], "weight must have 2 dimensions, got 1"),
    Refusal("quantise", "weight", Tensor.half, "weight cannot be Half"),
    Refusal("quantise", "group", to(20), "a group must have 16, 32, 64 or 128 inputs, got 20"),
    Refusal("quantise", "group", to(64), "32 inputs are not a multiple of the group, 64"),
    Refusal("quantise", "table", shorter, "a table must have 16 values, got 15"),
    Refusal("quantise", "table", lambda table: table.flip(0), "the table must rise"),
    # Experts.
    Refusal("experts", "ends", lambda ends: ends.flip(0), "ends must not fall"),
    Refusal("experts", "ends", set_at(((-1,), 99)), "ends cover 99 pairs of "),
    Refusal("experts", "ends", lambda ends: ends[:0], "experts need at least one unit and input"),
    Refusal("experts", "ends", lambda ends: ends.int(), "ends has the wrong dtype, Int"),
    Refusal("experts", "token", set_at(((0,), 5)), "token 5"),
    Refusal("experts", "token", set_at(((0,), -1)), "token -1"),
    Refusal("experts", "token", lambda token: token.long(), "token has the wrong dtype, Long"),
    Refusal("experts", "weight", shorter, "weight must have "),
    Refusal("experts", "units", to(0), "experts need at least one unit and input"),
    Refusal("experts", "units", to(64), "packed weights of 3 x [128, 16] must have"),
    Refusal("experts", "gated", to(False), "packed weights of 3 x [32, 16] must have"),
    Refusal("experts", "activation", to(5), "activation 5 is not known"),
    Refusal("infinity_block", "activation", to(4), "activation 4 is not known"),
    Refusal("experts", "up_bias", to(torch.zeros(3)), "up bias must have 192 values, got 3"),
    Refusal("experts", "down_bias", to(torch.zeros(3)), "down bias must have 48 values, got 3"),
    Refusal("experts", "activation", to(-1), "activation -1 is not known"),
    Refusal("ffn_block", "up_bias", lambda b: b[:, 1:].contiguous(), "up bias must have 64 values, got 63"),
    Refusal("ffn_block", "down_bias", lambda b: b[:, 1:].contiguous(), "down bias must have 16 values, got 15"),
    # Counts and choices.
    Refusal("route", "counts", set_at(((1,), 0)), "count 0 is not between 1 and 4"),
    Refusal("route", "counts", set_at(((1,), 7)), "count 7 is not between 1 and 4"),
    Refusal("route", "counts", shorter, "counts do not fit the logits"),
    Refusal("route", "k_max", to(7), "counts do not fit the logits"),
    Refusal("route", "rule_of", shorter, "rules must be [R, 6], with one of them for each of 5 tokens, got"),
    Refusal("route", "rule_of", set_at(((1,), 5)), "rule 5 is not one of 5"),
    Refusal("route", "rules", Tensor.float, "rules has the wrong dtype, Float"),
    Refusal("route", "rules", set_at(((0, 0), 7)), "a rule of 7 experts does not fit 6"),
    Refusal("route", "allowed", lambda _: torch.ones(1, 6).byte(), "allowed must be [5, N], got [1, 6]"),
    Refusal("route", "allowed", lambda _: torch.ones(5, 7).byte(), "allowed is of 7 experts, not of 6"),
    Refusal("route", "allowed", lambda _: torch.zeros(5, 6).byte(), "a rule lets 0 experts run, but weighs by more"),
    Refusal("route", "logits", lambda x: x[:, :0].contiguous(), "a router needs at least one expert, got 0"),
    Refusal("route", "trained", to(7), "the trained count 7 is not one of 6 experts"),
    Refusal("route", "score", to(3), "score 3 is not known"),
    Refusal("route", "score", to(2), "the sparse mixer's weights are defined for its own rule only"),
    Refusal("route", "groups", to(4), "6 experts cannot be cut into 4 groups, of which 1 are kept"),
    Refusal("route", "kept_groups", to(0), "6 experts cannot be cut into 1 groups, of which 0 are kept"),
    Refusal("route", "selection_bias", to(torch.zeros(5)), "selection bias must have 6 values, got 5"),
    Refusal("topk_block", "shared_pieces", to(-1), "a shared part of -1 pieces"),
    Refusal("topk_block", "shared_pieces", to(1), "packed weights of 5 x [64, 16] must have"),
    Refusal("topk_block", "logit_bias", to(torch.zeros(4)), "logit bias must have 16 values, got 4"),
    Refusal("topk_block", "trained", to(-1), "the trained count -1 is not one of 4 experts"),
    Refusal("topk_block", "repair_scale", to(None), "counts up to 4 are to be repaired, the tables have 0"),
    Refusal("topk_block", "repair_scale", lambda t: t[:, 1:], "repair must be two tables [counts, 16], got"),
    Refusal("topk_block", "repair_shift", shorter, "repair must be two tables [counts, 16], got"),
    Refusal("topk_block", "repair_shift", Tensor.double, "repair shift has the wrong dtype, Double"),
    Refusal("infinity_block", "repair_scale", to(None), "counts up to 8 are to be repaired, the tables have 0"),
    Refusal("infinity_block", "rules", set_at(((1, 0), 0)), "an infinity mixture has no router weights"),
    Refusal("topk_block", "counts", shorter, "counts do not fit"),
    Refusal("topk_block", "k_max", to(5), "counts do not fit"),
    Refusal("topk_block", "experts", to(0), "a matrix must have outputs and inputs, got [0, 16]"),
    Refusal("masks", "scores", shorter, "masks: shapes do not fit"),
    Refusal("masks", "kept", to(0), "masks: shapes do not fit"),
    Refusal("masks", "kept", to(10), "masks: shapes do not fit"),
    Refusal("draw", "seeds", shorter, "draws: shapes do not fit"),
    Refusal("draw", "positions", shorter, "draws: shapes do not fit"),
    Refusal("draw", "quantiles", shorter, "draws: shapes do not fit"),
    Refusal("draw", "gaussian", lambda g: g[:, 1:].contiguous(), "draws: shapes do not fit"),
    Refusal("draw", "seeds", Tensor.int, "seeds has the wrong dtype, Int"),
    Refusal("draw", "positions", Tensor.int, "positions has the wrong dtype, Int"),
    Refusal("draw", "points", to(torch.zeros(9, 5)), "points must be [largest count, 6], got [9, 5]"),
    Refusal("draw", "points", to(torch.zeros(1, 6)), "is higher than the 1 fixed draws"),
    Refusal("infinity_block", "points", to(torch.zeros(1, 6)), "is higher than the 1 fixed draws"),
    Refusal("infinity_block", "counts", shorter, "counts do not fit"),
    Refusal("infinity_block", "seeds", shorter, "counts do not fit"),
    Refusal("infinity_block", "groups", to(0), "0 groups of 48 units do not fit tiles of 48"),
    Refusal("infinity_block", "groups", to(7), "7 groups of 48 units do not fit tiles of 48"),
    Refusal("infinity_block", "units", to(0), "12 groups of 0 units do not fit tiles of 48"),
    Refusal("infinity_block", "tile_units", to(0), "units do not fit tiles of 0"),
    Refusal("infinity_block", "tile_units", to(40), "units do not fit tiles of 40"),
    Refusal("infinity_block", "kept", to(13), "infinity: shapes do not fit"),
    Refusal("infinity_block", "quantiles", shorter, "infinity: shapes do not fit"),
    Refusal("infinity_block", "latent_dim", to(0), "latent_dim must be at least 1, got 0"),
    Refusal("infinity_block", "scores", shorter, "packed weights of 1 x [12, 6] must have"),
    Refusal("infinity_block", "up_rows", shorter, "unit rows: shapes do not fit"),
    Refusal("infinity_block", "down_rows", shorter, "unit rows: shapes do not fit"),
    Refusal("infinity_block", "up_rows", Tensor.bfloat16, "unit rows must be like the panels"),
    # Attention.
    Refusal("write_cache", "k", lambda k: k[0], "k must have 3 dimensions, got 2"),
    Refusal("write_cache", "v", lambda v: v[:, :, :8].contiguous(), "k and v must have one shape"),
    Refusal("write_cache", "cache", lambda c: c[0], "the cache must be [2, slots, 2, 16], got"),
    Refusal("write_cache", "cache", lambda c: c[:, :, :1].contiguous(), "the cache must be [2, slots, 2, 16], got"),
    Refusal("write_cache", "cache", strided, "the cache must be [2, slots, 2, 16], got"),
    Refusal("write_cache", "cache", Tensor.half, "the cache is Half"),
    Refusal("write_cache", "block_size", to(24), "head width and block size must be multiples of 16"),
    Refusal("write_cache", "block_size", to(0), "head width and block size must be multiples of 16"),
    Refusal("write_cache", "block_size", to(32), "is not in the cache"),
    Refusal("write_cache", "spans", lambda spans: spans[:, :2].contiguous(), "spans must be [B, 3], got [2, 2]"),
    Refusal("write_cache", "spans", lambda spans: spans.int(), "spans has the wrong dtype, Int"),
    Refusal("write_cache", "spans", set_at(((0, 0), 1)), "span 0 does not follow"),
    Refusal("write_cache", "spans", set_at(((1, 2), 19)), "span 1 does not follow"),
    Refusal("write_cache", "spans", set_at(((1, 1), 0)), "span 1 does not follow"),
    Refusal("write_cache", "spans", set_at(((1, 2), 33)), "span 1 needs 3 blocks, the table has 2"),
    Refusal("write_cache", "spans", set_at(((1, 1), 19)), "spans cover 22 rows of 23"),
    Refusal("write_cache", "tables", shorter, "tables must be [2, P], got [1, 2]"),
    Refusal("write_cache", "tables", set_at(((1, 1), 99)), "block 99 is not in the cache"),
    Refusal("write_cache", "tables", set_at(((0, 0), -1)), "block -1 is not in the cache"),
    Refusal("attend", "cache", lambda c: c[0], "the cache must have 4 dimensions, got 3"),
    Refusal("attend", "q", lambda q: q[:, :3].contiguous(), "3 heads cannot share 2 key-value heads"),
    Refusal("attend", "q", lambda q: q[:, :0].contiguous(), "0 heads cannot share 2 key-value heads"),
    Refusal("attend", "cache", Tensor.char, "the cache must be [2, slots, 2, 20], got"),
    Refusal("latent_block", "cache", lambda c: pad(c, (0, 4)).char(), "keys whose elements are values have no int8"),
    Refusal("attend", "values", to(32), "values cannot be 32 elements of keys of 16"),
    Refusal("attend", "values", to(-32), "values cannot be -32 elements of keys of 16"),
    Refusal("write_cache", "v", to(None), "values cannot be 32 elements of keys of 16"),
    Refusal("latent_block", "cache", lambda c: c.repeat(2, 1, 1, 1), "the cache must be [1, slots, 1, 48], got"),
    Refusal("latent_block", "rank", to(48), "latents of 48 must be multiples of 32 wide, values of 16"),
    Refusal("latent_block", "value_width", to(24), "latents of 32 must be multiples of 32 wide, values of 24"),
    Refusal("latent_block", "value_width", to(32), "packed weights of 3 x [32, 32] must have"),
    Refusal("latent_block", "plain_width", to(30), "packed weights of 1 x [138, 20] must have"),
    Refusal("latent_block", "heads", to(4), "packed weights of 1 x [112, 20] must have"),
    Refusal("latent_block", "query_rank", to(0), "norm weight must have 0 values, got 20"),
    Refusal("latent_block", "latent_norm_weight", shorter, "norm weight must have 32 values, got 31"),
    Refusal("latent_block", "down_bias", shorter, "down bias must have 80 values, got 79"),
    Refusal("latent_block", "rotary", lambda r: r[:19].contiguous(), "position 20 is beyond the rotary table"),
    Refusal("latent_block", "rotary", lambda r: r[0], "rotary must have 3 dimensions, got 2"),
    Refusal("attend", "sinks", shorter, "sinks must have 4 values, got 3"),
    Refusal("attention_block", "cache", lambda c: c[0], "the cache must have 4 dimensions, got 3"),
    Refusal("attention_block", "kv_heads", to(1), "the cache must be [2, slots, 1, 16], got"),
    Refusal("attention_block", "head_width", to(32), "the cache must be [2, slots, 2, 32], got"),
    Refusal("attention_block", "heads", to(6), "norm weight must have 96 values, got 64"),
    Refusal("attention_block", "qkv_bias", shorter, "qkv bias must have 128 values, got 127"),
    Refusal("attention_block", "out_bias", shorter, "out bias must have 24 values, got 23"),
    Refusal("attention_block", "norm_per_head", to(True), "norm weight must have 16 values, got 64"),
    Refusal("attention_block", "rotary", lambda r: r[:19].contiguous(), "position 20 is beyond the rotary table"),
    Refusal("attention_block", "rotary", lambda r: r[:, :1].contiguous(), "the rotary table must be [positions, 2, at"),
    Refusal("attention_block", "rotary", lambda r: torch.cat([r, r], -1), "the rotary table must be [positions, 2, at"),
    Refusal("attention_block", "query_scale", lambda s: s[None], "query scale must have 1 dimensions, got 2"),
    Refusal("attention_block", "query_scale", shorter, "position 20 is beyond the query scales"),
    Refusal("attention_block", "gated", to(True), "packed weights of 1 x [192, 24] must have"),
    Refusal("attend", "chunk", to(-1), "window and chunk cannot be 0 and -1"),
    # Delta nets.
    Refusal("delta_block", "key_heads", to(3), "4 value heads cannot share 3 key heads"),
    Refusal("delta_block", "key_heads", to(0), "4 value heads cannot share 0 key heads"),
    Refusal("delta_block", "key_width", to(8), "keys and values of a delta net must be multiples of 16 wide, got 8"),
    Refusal("delta_block", "value_width", to(0), "keys and values of a delta net must be multiples of 16 wide, got 16"),
    Refusal("delta_block", "convolution", lambda c: c[:, 1:].contiguous(), "the convolution must be [1 to 16, 192]"),
    Refusal("delta_block", "convolution", lambda c: c.repeat(5, 1), "the convolution must be [1 to 16, 192], got"),
    Refusal("delta_block", "convolution", Tensor.double, "convolution has the wrong dtype, Double"),
    Refusal("delta_block", "rates_bias", shorter, "rates bias must have 32 values, got 31"),
    Refusal("delta_block", "decay", shorter, "decay must have 16 values, got 15"),
    Refusal("delta_block", "head_norm", shorter, "norm weight must have 32 values, got 31"),
    Refusal("delta_block", "rates", shorter, "packed weights of 1 x [32, 24] must have"),
    Refusal("delta_block", "states", lambda s: s[:, 1:].contiguous(), "states must be [slots, 2624], got"),
    Refusal("delta_block", "states", Tensor.double, "states has the wrong dtype, Double"),
    Refusal("delta_block", "slots", shorter, "there are 1 slots for 2 sequences"),
    Refusal("delta_block", "slots", set_at(((1,), 3)), "slot 3 is not one of 3"),
    Refusal("delta_block", "slots", set_at(((0,), -1)), "slot -1 is not one of 3"),
    Refusal("delta_block", "spans", set_at(((1, 1), 19)), "spans cover 22 rows of 23"),
    Refusal("delta_block", "snapshots", to(torch.zeros(1, 3)), "snapshots has the wrong dtype, Float"),
    Refusal("delta_block", "snapshots", to(torch.ones(3).long()), "snapshots must be [N, 3], got [3]"),
    Refusal("delta_block", "snapshots", to(torch.tensor([[2, 1, 0]])), "a snapshot is of sequence 2 of 2"),
    Refusal("delta_block", "snapshots", to(torch.tensor([[1, 21, 0]])), "a snapshot is behind 21 of 20 rows"),
    Refusal("delta_block", "snapshots", to(torch.tensor([[1, 0, 0]])), "a snapshot is behind 0 of 20 rows"),
    Refusal("delta_block", "snapshots", to(torch.tensor([[1, 2, 0], [1, 2, 1]])), "snapshots must be in the order of"),
    Refusal("delta_block", "snapshots", to(torch.tensor([[1, 1, 3]])), "slot 3 of a snapshot is taken, or not one of"),
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: f"{r.op}-{r.argument}-{r.says:.30}")
def test_refusals(refusal: Refusal) -> None:
    assert refusal.says in refusal.message()


def rows_of_units(kind: Kind, width: int) -> str:
    """Unit rows where there can be none: beside int8 panels, or of an odd width."""
    given = arguments("infinity_block", kind)
    given["up_rows"] = given["down_rows"] = torch.zeros(1)
    if width != 16:
        given |= {"x": given["x"][:, :width].contiguous(), "norm_weight": given["norm_weight"][:width].contiguous()}
        given |= {name: torch.zeros(size) for name, size in (("router", 16 * 12), ("up", 48 * 12), ("down", 48 * 16))}
    with pytest.raises(RuntimeError) as error:
        run("infinity_block", given)
    return str(error.value)


def shared_part_alone() -> str:
    """A mixture whose router has a row for the gate of its shared part, and none for an expert."""
    given = arguments("topk_block") | {"experts": 0, "trained": 0, "shared_gate": True, "shared_pieces": 4}
    with pytest.raises(RuntimeError) as error:
        run("topk_block", given)
    return str(error.value)


def a_set_among_groups() -> str:
    """Of experts, where a router chooses among groups of equally many."""
    given = arguments("route") | {"groups": 2, "kept_groups": 2, "allowed": torch.ones(5, 6).byte()}
    with pytest.raises(RuntimeError) as error:
        run("route", given)
    return str(error.value)


def a_mixer(changes: dict[str, Any]) -> str:
    """Of experts, where a sparse mixer is given what only other routers have."""
    given = arguments("route") | {"score": SCORES["sparse_mixer"]} | changes
    with pytest.raises(RuntimeError) as error:
        run("route", given)
    return str(error.value)


OTHERS: list[tuple[Callable[[], str], str]] = [
    (shared_part_alone, "a router needs at least one expert, got 0"),
    (headless, "the program has no head"),
    (lambda: whole_scales(None, 544), "scales of 8 bits need codes of 4 bits, got 8"),
    (lambda: whole_scales(torch.arange(-32, 32, dtype=torch.int8), 416), "need codes of 4 bits, got 6"),
    (a_set_among_groups, "a router of 2 groups chooses among all experts"),
    (lambda: a_mixer({"selection_bias": torch.zeros(6)}), "a sparse mixer has neither groups nor a selection bias"),
    (lambda: a_mixer({"groups": 2}), "a sparse mixer has neither groups nor a selection bias"),
    (lambda: rows_of_units("int8", 16), "int8 units have no rows of their own"),
    (lambda: rows_of_units("float", 12), "unit rows need a width that is a multiple of 16, got 12"),
    (lambda: raised(ops.set_threads, 0), "threads must be between 1 and 1024, got 0"),
    (lambda: raised(ops.set_threads, 1025), "threads must be between 1 and 1024, got 1025"),
    (lambda: raised(ops.set_nodes, [], []), "nodes must be between 1 and 32, got 0"),
    (lambda: raised(ops.set_nodes, [1] * 33, []), "nodes must be between 1 and 32, got 33"),
    (lambda: raised(ops.set_nodes, [2, 0], []), "node 1 has 0 cores"),
    (lambda: raised(ops.set_nodes, [1, 1], [0, 2]), "a processor is on node 2 of 2"),
    (lambda: raised(ops.set_spin_time, -1), "spin time must be between 0 and 100000 microseconds, got -1"),
    (lambda: raised(ops.allocate, 5, 1, 0), "cannot allocate 5 bytes for 1 matrices of 0 outputs"),
    (lambda: raised(lambda _: ops.spread([torch.zeros(3)], [3]), 0), "load has the wrong dtype, Float"),
    (lambda: raised(lambda _: ops.spread([torch.zeros(3).long()], [2]), 0), "loads of 3 experts, not of 2"),
    (lambda: raised(lambda _: ops.spread([torch.zeros(3).long()], [5, -2]), 0), "a mixture has -2 experts"),
    (lambda: raised(ops.allocate, 1 << 60), "out of memory: 1152921504606846976 bytes"),
]


OTHERS += [(partial(refused, argument, change), says) for argument, change, says in PROGRAM_REFUSALS]
OTHERS += [(partial(rule_refused, numbers), says) for numbers, says in RULE_REFUSALS]
OTHERS.append(
    (lambda: rule_refused([0, 0, 0, 0, 0, 0], drawing_program()), "an infinity mixture has no router weights")
)
OTHERS += [(partial(made, argument, change), says) for argument, change, says in MADE]


def whole_scales(table: Tensor | None, size: int) -> str:
    """Of a matrix with other codes, whose groups have a byte for their scale."""
    weight = {"weight": torch.zeros(size, dtype=torch.uint8), "weight_table": table}
    return raised(run, "linear", arguments("linear", "grouped") | weight)


def raised(op: Callable[..., Any], *values: object) -> str:
    with pytest.raises(RuntimeError) as error:
        op(*values)
    return str(error.value)


@pytest.mark.parametrize("provoke, says", OTHERS, ids=[says for _, says in OTHERS])
def test_other_refusals(provoke: Callable[[], str], says: str) -> None:
    assert says in provoke()


def test_every_check_is_met_by_one_of_these() -> None:
    met = "\n".join([*(refusal.message() for refusal in REFUSALS), *(provoke() for provoke, _ in OTHERS)])
    for source in sorted(SOURCES.iterdir()):
        for check in re.findall(r"TORCH_CHECK\((.*?)\);", source.read_text(), re.DOTALL):
            longest = max(re.findall(r'"([^"]*)"', check), key=len)
            assert longest in met, f"{source.name}: {longest}"


@pytest.mark.parametrize("op", OPS)
def test_after_a_refusal_the_op_runs_as_before(op: str) -> None:
    first, again = arguments(op), arguments(op)
    expected = run(op, first)
    for refusal in REFUSALS:
        if refusal.op == op and refusal.kind == "float":
            refusal.message()
    found = run(op, again)
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(again, first, atol=0, rtol=0, equal_nan=True)
