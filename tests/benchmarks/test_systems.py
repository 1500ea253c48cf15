"""The benchmark's own logic, without any peer installed: who is skipped and why, how a peer's output is read."""

from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import FAMILIES, MIXTRAL_500M, OLMOE_900M
from benchmarks.systems import ik_llamacpp, llamacpp, vllm_cpu
from benchmarks.systems.convert_gguf import as_qwen3, mixtral_name
from benchmarks.systems.hugging_face import Transformers
from benchmarks.systems.ik_llamacpp import IkLlamaCpp
from benchmarks.systems.llamacpp import LlamaCpp, architecture, measured, parse
from benchmarks.systems.ours import OurEngine, OurFile
from benchmarks.systems.system import PeerFailed
from benchmarks.systems.vllm_cpu import Vllm

TIED = OLMOE_900M | {"tie_word_embeddings": True}
INFINITY = OLMOE_900M | {"model_type": "infinity_moe"}


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ik_llamacpp, llamacpp, vllm_cpu):
        monkeypatch.setattr(module, "installed", lambda folder: "version")


def test_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ik_llamacpp, llamacpp, vllm_cpu):
        monkeypatch.setattr(module, "installed", lambda folder: None)
    for peer in (IkLlamaCpp("bf16"), LlamaCpp("bf16"), Vllm()):
        assert "make bench-peers" in (peer.refuses(OLMOE_900M) or "")


@pytest.mark.usefixtures("everything_installed")
def test_peers_refuse_what_they_cannot_run() -> None:
    for peer in (IkLlamaCpp("iq4_ks"), LlamaCpp("q8_0"), Vllm()):
        assert peer.refuses(OLMOE_900M) is None
        assert peer.refuses(MIXTRAL_500M) is None
        assert "tied" in (peer.refuses(TIED) or "")
    for peer in (IkLlamaCpp("bf16"), LlamaCpp("q8_0"), Vllm(), Transformers()):
        assert "infinity_moe" in (peer.refuses(INFINITY) or "")


@pytest.mark.usefixtures("everything_installed")
def test_other_families_have_llamacpp_beside_them() -> None:
    for raw in FAMILIES.values():
        assert LlamaCpp("q4_0").refuses(raw) is None
        assert OurFile("q4_0").refuses(raw) is None


def test_ours_runs_everything() -> None:
    assert OurEngine().refuses(INFINITY) is None


def test_ours_says_how_it_stores_weights() -> None:
    names = ("none", "int8", "all:int8", "int4", "all:int4")
    stored = ["bf16", "8 bit experts", "8 bit", "4 bit experts", "4 bit"]
    assert [OurEngine(name).weights for name in names] == stored
    assert [OurEngine(name).name for name in names] == ["moedial", *(f"moedial {name}" for name in names[1:])]
    assert OurFile("q4_k_m").weights == LlamaCpp("q4_k_m").weights == "4 bit"


def test_only_measured_rows_are_read() -> None:
    row = '{"n_kv_max": 6144, "pl": 4, "speed_pp": 800.5, "speed_tg": 188.25}'
    rows = parse(f"load_model: {{}}\n\n{row}\nllama_perf: ...\n")
    assert [(one["pl"], one["speed_pp"], one["speed_tg"]) for one in rows] == [(4, 800.5, 188.25)]


def test_a_batch_that_was_not_measured_is_a_failed_peer() -> None:
    rows = [{"pl": batch, "speed_pp": 2.0, "speed_tg": 1.0} for batch in (1, 1, 4)]
    assert list(measured(rows, [1, 4], "tool")) == [1, 4]
    with pytest.raises(PeerFailed, match=r"tool measured batches \[1, 1, 4\]"):
        measured(rows, [1, 4, 8], "tool")


def test_failing_tool_is_a_failed_peer() -> None:
    with pytest.raises(PeerFailed, match="ended with 3: why"):
        llamacpp.call(["/bin/sh", "-c", "echo why >&2; exit 3"])


def test_architecture_is_read_from_the_header(tmp_path: Path) -> None:
    key, value = b"general.architecture", b"olmoe"
    entry = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + len(value).to_bytes(8, "little") + value
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + entry + bytes(100))
    assert architecture(file) == "olmoe"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("model.layers.1.mlp.experts.7.gate_proj.weight", "model.layers.1.block_sparse_moe.experts.7.w1.weight"),
        ("model.layers.1.mlp.experts.7.down_proj.weight", "model.layers.1.block_sparse_moe.experts.7.w2.weight"),
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.layers.1.self_attn.q_norm.weight", None),
    ],
)
def test_names_in_mixtrals_layout(ours: str, theirs: str | None) -> None:
    assert mixtral_name(ours) == theirs


def test_qwen3s_layout_has_norms_of_one_head() -> None:
    norm = "model.layers.0.self_attn.q_norm.weight"
    config, tensors = as_qwen3(OLMOE_900M, {norm: torch.arange(1024.0), "other": torch.ones(3)})
    assert (config["model_type"], config["head_dim"], config["moe_intermediate_size"]) == ("qwen3_moe", 64, 512)
    assert torch.equal(tensors[norm], torch.arange(64.0))
    assert torch.equal(tensors["other"], torch.ones(3))
