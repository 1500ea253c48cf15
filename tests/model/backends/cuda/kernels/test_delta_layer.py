"""A gated delta net from kernels: the torch module's output, states that move on, and the same bits in any cut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention.gated_delta_net import GatedDeltaNetAttention
from model.backends.cuda.delta import delta_layer, delta_refusal
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.quantise import AS_LOADED, Precision
from model.backends.torch.attend import WholeAttend
from model.shapes.attention import GatedDeltaNet
from tests.model.tiny import llama_like, randomise, topk, use

WIDTH, SLOTS = 16, 4
SHAPES = {
    "qwen3_next": GatedDeltaNet(key_heads=2, value_heads=4, key_width=6, value_width=10, kernel=4),
    "two taps": GatedDeltaNet(key_heads=3, value_heads=3, key_width=8, value_width=8, kernel=2),
}
Sequences = list[tuple[int, Tensor, int]]  # slot, new tokens, tokens before them


@pytest.fixture(autouse=True)
def poisoned(poison: None) -> None:
    """Nothing may be read that was not written."""


def net(shape: GatedDeltaNet) -> GatedDeltaNetAttention:
    module = GatedDeltaNetAttention(shape, llama_like(topk(), width=WIDTH))
    randomise(module)
    return module.requires_grad_(False)


def tokens(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


class Running:
    """A layer, and the states of its sequences, which others left behind."""

    def __init__(
        self, module: GatedDeltaNetAttention, dtype: torch.dtype = torch.float32, precision: Precision = AS_LOADED
    ) -> None:
        self.layer, self.dtype = delta_layer(module.to(dtype), precision), dtype
        self.state_SX = torch.full((SLOTS, module.shape.memory.size), torch.nan)

    def run(self, sequences: Sequences) -> Tensor:
        """What the layer adds to a residual of zeros for the new tokens of several sequences."""
        spans, first = [], 0
        for _, new, before in sequences:
            spans.append((first, len(new), before + len(new)))
            first += len(new)
        x_TD = torch.cat([new for _, new, _ in sequences]).to(self.dtype)
        slots_B, residual_TD = torch.tensor([slot for slot, *_ in sequences]), torch.zeros(first, WIDTH)
        norm, out_TD, again_TD = Norm(torch.ones(WIDTH), 1e-5), torch.empty_like(x_TD), torch.empty_like(x_TD)
        self.layer(x_TD, torch.tensor(spans), slots_B, self.state_SX, residual_TD, norm, out_TD, 0.5)
        residual_norm(residual_TD, norm, again_TD)
        assert torch.equal(out_TD, again_TD)
        return residual_TD


def expected(module: GatedDeltaNetAttention, x_TD: Tensor) -> Tensor:
    """The same of one whole sequence by the torch module."""
    return 0.5 * module(x_TD, replace(use([1] * len(x_TD)), past=WholeAttend(len(x_TD))))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_is_that_of_the_torch_module(shape: GatedDeltaNet) -> None:
    """Three sequences side by side, one of a single token; a sequence without new tokens keeps its state."""
    module, parts = net(shape), [tokens(9), tokens(1, seed=4), tokens(0), tokens(3, seed=5)]
    running = Running(module)
    running.state_SX[3] = 7.0
    found_TD = running.run([(slot, part, 5 * (len(part) == 0)) for slot, part in zip((2, 0, 3, 1), parts, strict=True)])
    wanted_TD = torch.cat([expected(module, part) for part in parts if len(part)])
    torch.testing.assert_close(found_TD, wanted_TD, atol=2e-5, rtol=2e-5)
    assert (running.state_SX[3] == 7).all() and not running.state_SX.isnan().any()


def test_half_precision() -> None:
    module = net(SHAPES["qwen3_next"])
    wanted_TD = expected(module, tokens(5))
    found_TD = Running(module, torch.float16).run([(0, tokens(5), 0)])
    torch.testing.assert_close(found_TD, wanted_TD, atol=4e-3, rtol=4e-3)


def test_matrices_of_8_bits() -> None:
    """As the torch module with their values."""
    module, precision = net(SHAPES["qwen3_next"]), Precision("int8-weights", experts_only=False)
    running = Running(module, precision=precision)
    for name in ("project", "out"):
        weight = getattr(running.layer, name)
        assert weight.packed == "int8"
        getattr(module, name).weight.copy_((weight.values_EOD * weight.scale_EO[..., None])[0])
    found_TD = running.run([(0, tokens(3), 0)])
    torch.testing.assert_close(found_TD, expected(module, tokens(3)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bits_and_states_do_not_depend_on_chunks_or_neighbours(shape: GatedDeltaNet, chains: None) -> None:
    """Nine tokens at once; then four, two beside another sequence, and three one by one."""
    module, x_TD = net(shape), tokens(9)
    whole, cut = Running(module), Running(module)
    whole_TD = whole.run([(1, x_TD, 0)])
    parts = [cut.run([(2, x_TD[:4], 0)])]
    parts.append(cut.run([(0, tokens(3, seed=4), 0), (2, x_TD[4:6], 4)])[3:])
    parts.extend(cut.run([(2, x_TD[at : at + 1], at)]) for at in (6, 7, 8))
    assert torch.equal(torch.cat(parts), whole_TD)
    assert torch.equal(cut.state_SX[2], whole.state_SX[1])


def test_no_shape_is_refused_that_the_kernels_know() -> None:
    assert delta_refusal(SHAPES["qwen3_next"]) is None
    wide = replace(SHAPES["qwen3_next"], key_width=257)
    assert "keys of more than 256 elements have no GPU kernel, these have 257" in delta_refusal(wide)
    with pytest.raises(ValueError, match="these have 257"):
        delta_layer(net(wide))
