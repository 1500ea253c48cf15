"""What names the layout of packed folders changes with everything that they hold."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.backends.cpu import calls
from model.backends.cpu.calls import ORDER, OpCall, calls_of, layout
from model.backends.cpu.kernels.library import load
from model.backends.cpu.kernels.pack import Packed, pack_grouped
from model.backends.cpu.weights import Precision
from model.decoder import Decoder
from model.grouped import Grouped
from tests.model.backends.cpu.test_decoder import LAYOUTS
from tests.model.tiny import decoder

pytestmark = pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
NAMES = ("gates", "llama4", "latents", "delta", "biases", "shared", "blocks-of-32", "units-of-width-32", "olmoe")
DIGEST = "88cca842adcfc9e3"


def counted(model: Decoder) -> Decoder:
    """With the numbers 0, 1, 2 … in every parameter, over 64 so that no sum or product of two is rounded."""
    for parameter in model.parameters():
        parameter.data = (torch.arange(parameter.numel()) % 251 / 64).view(parameter.shape)
    return model


def digest_of(call: OpCall) -> bytes:
    """Of its tensors, but not of rotary tables, whose last bits depend on the machine."""
    digest = hashlib.sha256()
    for name, value in call.values.items():
        if isinstance(value, Tensor) and name != "rotary":
            digest.update(str(tuple(value.shape)).encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def test_the_order_of_what_calls_hold_has_a_number() -> None:
    """Where this fails, folders that were packed before would be read wrongly: raise ORDER, and write both here."""
    digest = hashlib.sha256()
    for name in NAMES:
        for call in calls_of(counted(decoder(LAYOUTS[name])), 8, Precision("float")):
            digest.update(digest_of(call))
    assert (ORDER, digest.hexdigest()[:16]) == (1, DIGEST)


@pytest.mark.parametrize("values", ["bytes", "signed6", "signed"])
@pytest.mark.parametrize("minima", [False, True])
def test_every_form_of_groups_is_part_of_the_layout(monkeypatch: pytest.MonkeyPatch, values: str, minima: bool) -> None:
    before, packs = layout(), pack_grouped

    def other(weight: Grouped) -> Packed:
        packed = packs(weight)
        if weight.values == values and (weight.minima is not None) == minima:
            packed.packed.view(torch.uint8)[-1] ^= 1
        return packed

    monkeypatch.setattr(calls, "pack_grouped", other)
    again: Callable[[], str] = layout.__wrapped__
    assert again() != before
    monkeypatch.undo()
    assert again() == before
