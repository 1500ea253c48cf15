"""Self-contrast decoding of encoder–decoders: each row reads the prompt with its own experts, and answers from it."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from engine.build import build_engine
from engine.sampling.contrast import contrasted
from engine.types import EngineSettings, Request
from model.contrast import Contrast
from model.decoder import Decoder
from tests.families import seq2seq
from tests.families.test_encoder_decoders import TOKENS, requests, trained
from tests.families.test_engine import generate
from tests.model.tiny import whole_logits

CONTRAST = Contrast(5.0, 0.01, weak_rank=1)  # the weak row is then what a count of 1 runs


def expected(model: Decoder, request: Request) -> list[int]:
    """Greedy, with every row's logits computed in one pass over all tokens so far."""
    ids, mixtures = list(request.prompt), len(model.config.mixtures)
    beta, log_alpha = torch.tensor([CONTRAST.beta]), torch.tensor([math.log(CONTRAST.alpha)])
    while len(ids) < len(request.prompt) + TOKENS:
        strong, weak = (whole_logits(model, ids, counts)[-1:] for counts in (trained(model), [1] * mixtures))
        ids.append(int(contrasted(strong, weak, beta, log_alpha).argmax()))
        if ids[-1] in request.sampling.stop_token_ids:
            break
    return ids[len(request.prompt) :]


def test_both_rows_of_an_encoder_decoder(tmp_path: Path) -> None:
    """NLLB runs two experts of each token. Blocks are too few for all: pairs are preempted and computed again."""
    family, blocks = "nllb_moe", 20
    model = seq2seq.loaded(seq2seq.build(family, 0), tmp_path)
    per_block = sum(memory.per_token for memory in model.config.memory) * 4 * 4
    settings = EngineSettings(
        model=str(tmp_path),
        kv_cache_bytes=blocks * per_block + 64 * 4,
        block_size=4,
        max_running=4,
        max_step_tokens=16,
        max_model_len=40,
        step_ms=0,
        threads=1,
        device="cpu",
    )
    engine, _ = build_engine(settings)
    plain = requests(model, family)
    asked = [replace(each, budget=replace(each.budget, contrast=CONTRAST)) for each in plain[:3]]
    found = generate(engine, [*asked, *plain[3:]])
    for each in asked:
        assert found[each.id] == expected(model, each)
    assert any(found[each.id] != found[str(3 + row)] for row, each in enumerate(asked)), "the contrast changes answers"
    assert engine.scheduler.blocks.used == 0
    engine.scheduler.check()
