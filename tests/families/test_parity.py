"""Every family in the folder gives the logits of `transformers`: at the trained count, at one, and at the largest.

Every family has tiny configs that differ in what matters (`tests/families/examples`). Prompts are longer
than their windows. Each checkpoint is written by transformers, in several files, and must come back out bit for bit.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.decoder import Decoder
from tests.families import reference
from tests.model.tiny import PagedRun, whole_logits
from weights.config import families
from weights.load import load_model
from weights.save import tensors

EXAMPLES = list(reference.examples())
LOOSE = {  # families whose logits may differ by more than 1e-4, each with its reason
    # Its logits reach 15, and its states are sums over the whole past: on some processors float32 is 2e-4 off float64.
    "qwen3_next": 3e-4,
}
PICTURES = ("vision_model.", "multi_modal_projector.")  # nobody can send any
each = pytest.mark.parametrize(
    ("family", "number"), EXAMPLES, ids=[f"{family}-{number}" for family, number in EXAMPLES]
)


def loaded(family: str, number: int, folder: Path) -> Decoder:
    """Ours, from transformers' files; every count that is defined at all is allowed."""
    reference.save(reference.build(family, number), folder, family)
    model, _ = load_model(folder)
    model.config = replace(model.config, extrapolates=True)
    return model


def counts(model: Decoder) -> list[int | None]:
    """One, as trained, the most; None for a dense model."""
    experts = model.config.experts
    return sorted({1, experts.trained, experts.maximum}) if experts.layers else [None]  # type: ignore[list-item]


@each
def test_prefill_and_sixteen_greedy_steps(family: str, number: int, tmp_path: Path) -> None:
    model = loaded(family, number, tmp_path)
    layers = len(model.config.mixtures)
    trained, prompt = model.config.experts.trained if layers else None, len(reference.PROMPT)
    ids, logits = reference.continued(family, number, trained, counts(model))
    for count, expected in zip(counts(model), logits, strict=True):
        assert expected.std() > 0.1
        found = whole_logits(model, ids[:-1], [count or 1] * layers)
        torch.testing.assert_close(found, expected, atol=LOOSE.get(family, 1e-4), rtol=0)
        if count == trained:
            assert found[prompt - 1 :].argmax(-1).tolist() == ids[prompt:]


@each
def test_pages_chunks_and_mixed_counts_equal_one_pass(family: str, number: int, tmp_path: Path) -> None:
    model = loaded(family, number, tmp_path)
    layers, choices = len(model.config.mixtures), counts(model)
    rows = [reference.PROMPT, reference.PROMPT[3:], reference.PROMPT[::-1]]
    chosen = [[choices[row % len(choices)] or 1] * layers for row in range(len(rows))]
    run = PagedRun(model, rows, chosen)
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    for lengths in ({0: 5}, {0: 1, 1: 8}, {0: 3, 1: 1, 2: 9}, {0: 1, 1: 1, 2: 1}, {0: 7, 1: 4, 2: 7}):
        for row, part in run.step(lengths).items():
            parts[row].append(part)
    for row, ids in enumerate(rows):
        assert run.done[row] == len(ids)
        expected = whole_logits(model, ids, chosen[row], seed=row)
        # against the size of logits, which are up to 4 here: other processors sum in another order
        torch.testing.assert_close(torch.cat(parts[row]), expected, atol=2e-5, rtol=1e-5)


@each
def test_counts_matter(family: str, number: int, tmp_path: Path) -> None:
    """Else equality at every count would say nothing."""
    model = loaded(family, number, tmp_path)
    if len(counts(model)) > 1:
        most = model.config.experts.maximum
        few, many = (whole_logits(model, reference.PROMPT, [k] * len(model.config.mixtures)) for k in (1, most))
        assert (few - many).abs().max() > 1e-2


@each
def test_what_was_loaded_comes_back_bit_for_bit(family: str, number: int, tmp_path: Path) -> None:
    model = loaded(family, number, tmp_path)
    written = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    written = {name: tensor for name, tensor in written.items() if not name.startswith(PICTURES)}
    ours = tensors(model, family)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and ours.keys() == written.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in written.items())


@pytest.mark.parametrize("family", families())
def test_every_family_has_examples(family: str) -> None:
    """∞-MoE has its definition in `tests/model/moe/test_infinity.py`."""
    assert family == "infinity_moe" or len(reference.example_list(family)) >= 2
