"""Self-contrast decoding of encoder–decoders and of segments: each row reads the prompt with experts of its own."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from engine.build import build_engine
from engine.sampling.contrast import contrasted
from engine.types import EngineSettings, Request, Sampling
from model.backends.torch.attend import WholeAttend
from model.backends.torch.backend import TorchRunnable
from model.budget import ExpertBudget, RoutingRule
from model.contrast import Contrast
from model.decoder import Decoder
from tests.engine.random_workload import Served, bench
from tests.families import seq2seq
from tests.families.test_encoder_decoders import TOKENS, requests, trained
from tests.families.test_engine import generate
from tests.families.test_soft_and_deep import made
from tests.model.tiny import whole_batch, whole_logits

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


def test_both_rows_of_a_soft_mixture_over_segments() -> None:
    """Each row has the state of its own segments; the weak one runs the second expert of each."""
    model, prompt, contrast = made("soft_moe", 0), (3, 1, 4, 1, 5, 9, 2, 6, 5), Contrast(3.0, 0.01, weak_rank=2)
    layers, most = len(model.config.mixtures), model.config.experts.maximum
    budget = ExpertBudget((most,) * layers, contrast=contrast)
    asked = Request("a", prompt, budget, Sampling(max_tokens=8, seed=1, temperature=0.0))
    served = Served(model.config, block=4, few=16, requests=1)
    crowd = bench(served, blocks=2 * served.few, step_tokens=6, running=4, model=TorchRunnable(model))
    for each in (asked, replace(asked, id="b", budget=replace(budget, contrast=None))):
        crowd.engine.add(each)
    crowd.finish()
    for position, logits_V in crowd.logits["a"].items():
        batch = whole_batch([*prompt, *crowd.tokens["a"]][:position], [1] * layers)
        weak = replace(batch.budget, rules=(RoutingRule(skip=1),), rule_T=torch.zeros(position, dtype=torch.int64))
        strong_PV = whole_logits(model, batch.ids_T.tolist(), [most] * layers)[-1:]
        weak_PV = model(replace(batch, budget=weak), WholeAttend(position))[-1:]
        beta, log_alpha = torch.tensor([contrast.beta]), torch.tensor([math.log(contrast.alpha)])
        expected_V = contrasted(strong_PV, weak_PV, beta, log_alpha)[0]
        torch.testing.assert_close(logits_V, expected_V, atol=1e-4, rtol=2e-7)
    assert crowd.chunks > 0 and crowd.tokens["a"] != crowd.tokens["b"]
