"""Every kind of module whose weights the backend takes as `Grouped` computes what its widened weights compute."""

from typing import Any

import pytest
from transformers import AutoConfig

from model.backends.cpu.backend import GROUPED, CpuBackend
from model.backends.cpu.kernels.library import load
from model.backends.cpu.refusal import refusal
from model.decoder import Decoder
from model.options import Options
from tests.families import reference
from tests.families.test_kernels import wide
from tests.model.tiny import PagedRun, decoder, llama_like, topk
from weights.config import decoder_config
from weights.groups import replace_parameter
from weights.quantised.bytes import in_bytes


def plain(family: str) -> Decoder:
    """A family's first example without mixtures, in sizes that the kernels and groups of 16 take."""
    own: dict[str, dict[str, Any]] = {
        "deepseek_v3": {"first_k_dense_replace": 3, "q_lora_rank": 32},
        "qwen3_next": {"mlp_only_layers": [0, 1]},
    }
    changes = wide(family) | own[family] | {"intermediate_size": 48}
    config = AutoConfig.for_model(family, **reference.merged(reference.example_list(family)[0], **changes))
    return decoder(decoder_config(config.to_dict()))


def mixture() -> Decoder:
    return decoder(llama_like(topk(width=48), head_width=16, width=64))


DECODERS = {
    "mixture": mixture,
    "latent attention": lambda: plain("deepseek_v3"),
    "delta nets": lambda: plain("qwen3_next"),
}


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
@pytest.mark.parametrize("name", DECODERS)
def test_grouped_weights_are_multiplied_as_they_are(name: str) -> None:
    widened, kept = DECODERS[name](), DECODERS[name]()
    assert refusal(kept.config, Options()) is None
    names = list(CpuBackend().groups(kept))
    assert len(names) >= 3
    for target in names:
        grouped = in_bytes(kept.get_parameter(target).detach(), 16)
        replace_parameter(kept, target, grouped)
        widened.get_parameter(target).copy_(grouped.dense())
    rows, counts = [reference.PROMPT], [[2] * len(kept.config.mixtures)]
    found, expected = (
        PagedRun(CpuBackend().prepare(model, Options()), rows, counts, block_size=16).step({0: 17})[0]
        for model in (kept, widened)
    )
    assert (found - expected).square().mean().sqrt() < 0.1 * expected.std()


def test_every_kind_is_tested() -> None:
    kinds = {type(module) for make in DECODERS.values() for module in make().modules()}
    assert GROUPED.keys() <= kinds
