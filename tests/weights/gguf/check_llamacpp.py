"""Files that llama.cpp's own converter and quantiser make are read as the models that they were made of: `make
test-gguf`, which needs llama.cpp as `make bench-peers` installs it; LLAMACPP=FOLDER names another place. `make test`
does not collect it.

Converted to float32, every parameter has the checkpoint's bits. Quantised, the logits are those of the float32 file
that llama.cpp makes of the quantised one. How far groups are from the exact values is printed for every type.
"""

import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import LLAMACPP, llamacpp_source, python
from model.backends.cpu.backend import CpuBackend
from model.backends.cpu.refusal import refusal
from model.decoder import Decoder, grouped_parts
from model.options import Options
from tests.model.tiny import PagedRun, whole_logits
from tests.weights.checkpoints import random_decoder
from tests.weights.gguf.architectures import RAW, raw_of
from tests.weights.gguf.test_families import assert_same
from tests.weights.gguf.test_models import PROMPT, counts, matrices
from tests.weights.quantised.test_models import widened
from weights.gguf.blocks import dense, grouped
from weights.gguf.decode import FORMATS
from weights.gguf.reader import GgufFile
from weights.load import load_model
from weights.save import save_model

PEER = Path(os.environ.get("LLAMACPP", LLAMACPP))
CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}
# Blocks of 256 values need such rows; those of 320 have llama.cpp take other types.
LARGE = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 320,
    "moe_intermediate_size": 256,
    "kv_lora_rank": 256,
}
QUANTISED = ("olmoe", "qwen3moe", "llama, mixtral", "gpt-oss", "deepseek2")
TYPES: tuple[str, ...] = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS")
TYPES += ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "MXFP4_MOE")
SEEN: dict[str, list[tuple[float, float]]] = defaultdict(list)  # by type: its own error, and how much groups add


def folder_of(where: Path, name: str) -> Path:
    return where / name.replace(", ", "-").replace(" ", "-")


def convert(where: Path, raws: dict[str, dict[str, Any]]) -> Path:
    """Checkpoints, and files beside them that end in .gguf."""
    pairs = []
    for name, raw in raws.items():
        folder = folder_of(where, name)
        save_model(random_decoder(raw), raw | {"architectures": [CLASSES[raw["model_type"]]]}, folder, torch.float32)
        pairs += [str(folder), f"{folder}.gguf"]
    script = Path(__file__).with_name("convert_llamacpp.py")
    done = subprocess.run([python(PEER), script, llamacpp_source(PEER), *pairs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return where


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every architecture, converted."""
    return convert(tmp_path_factory.mktemp("small"), {name: raw_of(name) for name in RAW})


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Some of a size that every type can quantise, converted. What was seen of types is printed at the end."""
    raws = {name: raw_of(name) for name in QUANTISED}
    for raw in raws.values():
        raw |= {key: size for key, size in LARGE.items() if key in raw}
    yield convert(tmp_path_factory.mktemp("big"), raws)
    for kind, errors in sorted(SEEN.items()):
        own, more = (sum(each) / len(errors) for each in zip(*errors, strict=True))
        print(f"\n{kind}: error of the type {own:.2%} of the weights, in groups {more:.3%} more", end="")


def quantise(path: Path, kind: str, out: Path) -> Path:
    tool = PEER / "build" / "bin" / "llama-quantize"
    done = subprocess.run([tool, "--allow-requantize", path, out, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("name", RAW)
def test_a_converted_file_has_the_checkpoints_bits(name: str, small: Path) -> None:
    folder = folder_of(small, name)
    expected, _ = load_model(folder, "float32")
    found, _ = load_model(Path(f"{folder}.gguf"), "float32")
    assert found.config == expected.config
    parameters = dict(found.named_parameters())
    assert parameters.keys() == dict(expected.named_parameters()).keys()
    for target, parameter in expected.named_parameters():
        assert_same(parameters[target], parameter, name)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_file_has_the_logits_of_its_dequantised_weights(name: str, kind: str, big: Path) -> None:
    source = Path(f"{folder_of(big, name)}.gguf")
    packed = quantise(source, kind, source.with_suffix(f".{kind}.gguf"))
    plain = quantise(packed, "F32", source.with_suffix(f".{kind}.f32.gguf"))
    expected, found = (load_model(path, "float32")[0] for path in (plain, packed))
    kept, _ = load_model(packed, "float32", keep_groups=matrices)
    wanted = whole_logits(expected, PROMPT, counts(expected))
    assert torch.equal(whole_logits(found, PROMPT, counts(expected)), wanted)
    assert list(grouped_parts(kept))
    logits = whole_logits(widened(kept), PROMPT, counts(expected))
    assert float((logits - wanted).norm() / wanted.norm()) < 5e-3
    check_kernels(packed, expected)
    measure(source, packed)
    packed.unlink()
    plain.unlink()


def check_kernels(packed: Path, expected: Decoder) -> None:
    """Where they take the family: as it is stored; inputs are rounded to 8 bits, so every expert is asked for."""
    if refusal(expected.config, Options()) is None:
        backend, every = CpuBackend(), [mixture.num_experts for mixture in expected.config.mixtures]
        native = backend.prepare(load_model(packed, keep_groups=backend.groups)[0], Options())
        logits = PagedRun(native, [PROMPT], [every], block_size=16).step({0: len(PROMPT)})[0]
        wanted = whole_logits(expected, PROMPT, every)
        assert (logits - wanted).square().mean().sqrt() < 0.05 * wanted.std()


def measure(source: Path, packed: Path) -> None:
    """Note the errors of every quantised tensor."""
    with GgufFile(source) as first, GgufFile(packed) as second:
        for name, entry in second.tensors.items():
            if entry.type.name in FORMATS and len(entry.shape) > 1:
                weights = dense(first.tensors[name].type, data(first, name), entry.shape)
                exact = dense(entry.type, data(second, name), entry.shape).float()
                groups = grouped(entry.type, data(second, name), entry.shape)
                assert groups is not None
                own, all_ = (float((each - weights).norm()) for each in (exact, groups.dense()))
                SEEN[entry.type.name].append((own / float(weights.norm()), all_ / own - 1))


def data(file: GgufFile, name: str) -> Tensor:
    data_B = torch.empty(file.tensors[name].nbytes, dtype=torch.uint8)
    target: Any = data_B.numpy()
    file.read_into(name, memoryview(target))
    return data_B
