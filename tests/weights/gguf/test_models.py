"""Whole models from GGUF files: a float file has the checkpoint's logits, a quantised one those of what its blocks
mean, widened and in groups."""

from pathlib import Path

import pytest
import torch

from model.backends.cpu.backend import CpuBackend
from model.backends.cpu.kernels.library import load
from model.decoder import Decoder, grouped_parts
from model.errors import CheckpointError
from model.options import Options
from tests.model.tiny import PagedRun, whole_logits
from tests.weights.checkpoints import random_decoder
from tests.weights.gguf.architectures import converted, metadata_of, raw_of
from tests.weights.gguf.quantisers import floats, mixed
from tests.weights.gguf.writer import CODES, Blob, blob, write_gguf
from tests.weights.quantised.test_models import widened
from tests.weights.test_groups import bytes_of, only_free
from weights.gguf.blocks import dense
from weights.gguf.types import TYPES
from weights.groups import kept_as
from weights.load import load_model

NAMES = ("olmoe", "qwen3moe", "llama, mixtral", "gpt-oss")
PROMPT = [5, 1, 30, 8, 8, 2, 36, 0, 17, 11, 3, 3]


def written(folder: Path, name: str, tensors: dict[str, Blob]) -> Path:
    return write_gguf(folder / "x.gguf", metadata_of(name), tensors)


def counts(model: Decoder) -> list[int]:
    return [2] * len(model.config.mixtures)


def meant(stored: Blob) -> Blob:
    """The same tensor as float32."""
    data = torch.frombuffer(bytearray(stored.data), dtype=torch.uint8)
    values = dense(TYPES[CODES[str(stored.type)]], data, stored.shape).float()
    return blob("F32", stored.shape, values.numpy().tobytes())


def matrices(model: Decoder) -> list[str]:
    ends = ("attention.qkv.weight", "attention.out.weight", "ffn.gate_up", "ffn.down", "head.weight")
    return [name for name, _ in model.named_parameters() if name.endswith(ends)]


@pytest.mark.parametrize("name", NAMES)
def test_a_float_file_has_the_checkpoints_logits(name: str, tmp_path: Path) -> None:
    model = random_decoder(raw_of(name))
    found, raw = load_model(written(tmp_path, name, converted(name, model, floats)))
    expected = whole_logits(model, PROMPT, counts(model))
    assert raw["dtype"] == "float32" and expected.std() > 0.1
    assert torch.equal(whole_logits(found, PROMPT, counts(model)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_quantised_file_has_the_logits_of_what_it_means(name: str, tmp_path: Path) -> None:
    tensors = converted(name, random_decoder(raw_of(name)), mixed)
    plain, _ = load_model(written(tmp_path, name, {each: meant(stored) for each, stored in tensors.items()}))
    path = written(tmp_path, name, tensors)
    found, raw = load_model(path, "float32")
    kept, _ = load_model(path, "float32", keep_groups=matrices)
    expected = whole_logits(plain, PROMPT, counts(plain))
    assert raw["dtype"] == "bfloat16"
    assert torch.equal(whole_logits(found, PROMPT, counts(plain)), expected)
    assert len(list(grouped_parts(kept))) == len(matrices(found))
    torch.testing.assert_close(whole_logits(widened(kept), PROMPT, counts(plain)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_parts_in_their_common_form(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values, as gates and values, have different types, and are joined."""
    path = written(tmp_path, name, converted(name, random_decoder(raw_of(name)), mixed))
    needed = bytes_of(load_model(path, keep_groups=matrices)[0])
    only_free(monkeypatch, needed)
    load_model(path, keep_groups=matrices)
    only_free(monkeypatch, needed - 1)
    with pytest.raises(CheckpointError, match="the weights need"):
        load_model(path, keep_groups=matrices)


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
@pytest.mark.parametrize("name", ["olmoe", "qwen3moe"])
def test_the_kernels_multiply_what_is_stored(name: str, tmp_path: Path) -> None:
    """Inputs are rounded to 8 bits, so every expert is asked for: none is chosen otherwise."""
    path = written(tmp_path, name, converted(name, random_decoder(raw_of(name)), mixed))
    plain, _ = load_model(path, "float32")
    backend, every = CpuBackend(), [5, 5]
    kept, _ = load_model(path, keep_groups=backend.groups)
    assert "int4 g32 with minimum" in kept_as(kept)
    found = PagedRun(backend.prepare(kept, Options()), [PROMPT], [every], block_size=16).step({0: len(PROMPT)})[0]
    expected = whole_logits(plain, PROMPT, every)
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_a_file_in_parts_is_the_same_model(tmp_path: Path) -> None:
    model = random_decoder(raw_of("olmoe"))
    tensors = list(converted("olmoe", model, floats).items())
    for part in range(2):
        said = {"split.no": part, "split.count": 2, "split.tensors.count": len(tensors)}
        said |= metadata_of("olmoe") if part == 0 else {}
        write_gguf(tmp_path / f"x-0000{part + 1}-of-00002.gguf", said, dict(tensors[part::2]))
    found, _ = load_model(tmp_path / "x-00001-of-00002.gguf")
    parameters = dict(found.named_parameters())
    assert all(torch.equal(parameters[name], each) for name, each in model.named_parameters())


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = converted("olmoe", random_decoder(raw_of("olmoe")), floats)
    tensors["blk.0.attn_k.weight"] = blob("F32", (64, 32))
    tensors["blk.1.attn_rot_embd.weight"] = blob("F32", (4,))
    del tensors["blk.1.ffn_down_exps.weight"]
    with pytest.raises(CheckpointError) as error:
        load_model(written(tmp_path, "olmoe", tensors))
    for part in (
        "missing model.layers.1.mlp.experts.0.down_proj.weight",
        "extra model.layers.1.attn_rot_embd.weight",
        "model.layers.0.self_attn.k_proj.weight has shape (64, 32), not (32, 64)",
    ):
        assert part in str(error.value)
