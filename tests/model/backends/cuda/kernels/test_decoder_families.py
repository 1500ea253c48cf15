"""Every family on the kernels gives the logits of plain torch: at one expert, as trained, at the most, side by side.

One tiny checkpoint of each family: a chunk of a prompt beside a single token, then one token of each sequence.
"""

from pathlib import Path

import pytest
import torch

from model.backends.cuda import places
from model.backends.cuda.kernels import attend
from model.backends.cuda.runnable import CudaRunnable
from model.backends.torch.backend import TorchRunnable
from model.decoder import Decoder
from tests.families import reference
from tests.families.test_parity import EXAMPLES, loaded
from tests.model.tiny import PagedRun

PAGE = 16
FIRST = [(family, number) for family, number in EXAMPLES if number == 0]
# Whose parts no other family of these has: the rest runs in `make test-all`.
DISTINCT = (
    "deepseek_v3",
    "ernie4_5_moe",
    "gpt2",
    "gpt_oss",
    "granitemoeshared",
    "infinity_moe",
    "llama4_text",
    "phimoe",
    "qwen3_next",
)
ROWS = [reference.PROMPT[:3], reference.PROMPT[3:5], reference.PROMPT[5:6]]
STEPS = ({0: 2, 1: 1}, {0: 1, 1: 1, 2: 1})


@pytest.fixture(autouse=True)
def small_pages(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be read that was not written."""
    monkeypatch.setattr(attend, "PAGE", PAGE)
    monkeypatch.setattr(places, "PAGE", PAGE)


def counts(model: Decoder) -> list[list[int]]:
    experts = model.config.experts
    choices = (1, experts.trained, experts.maximum) if experts.layers else (1, 1, 1)
    return [[count] * len(model.config.mixtures) for count in choices]


@pytest.mark.parametrize(
    ("family", "number"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=() if case[0] in DISTINCT else pytest.mark.redundant)
        for case in FIRST
    ],
)
@torch.inference_mode()
def test_a_family_gives_the_logits_of_plain_torch(family: str, number: int, tmp_path: Path) -> None:
    model = loaded(family, number, tmp_path)
    if model.config.encoder is not None:
        pytest.skip("a model with an encoder runs in plain torch")
    runnable = CudaRunnable(model, model.config.context)
    assert runnable.exact, runnable.program.plain
    found = PagedRun(runnable, ROWS, counts(model), PAGE)
    wanted = PagedRun(TorchRunnable(model), ROWS, counts(model), PAGE)
    for lengths in STEPS:
        torch.testing.assert_close(found.step(lengths), wanted.step(lengths), atol=2e-5, rtol=1e-5)
