"""Checkpoints load and save bit for bit; one that does not fit its config is refused in one clear sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from tests.weights.checkpoints import INFINITY, OLMOE, same, write, write_config
from weights.config import families, read_config
from weights.files import TensorFiles
from weights.load import load_model, run_dtype
from weights.save import save_model, tensors

BOTH = pytest.mark.parametrize("raw", [INFINITY, OLMOE, INFINITY | {"dtype": "bfloat16", "norm": "rms"}], ids=str)


@BOTH
def test_what_is_saved_loads_bit_for_bit_and_saves_again(raw: dict[str, Any], tmp_path: Path) -> None:
    written = write(tmp_path / "a", raw)
    loaded, read_raw = load_model(tmp_path / "a")
    assert read_raw == raw
    dtype = getattr(torch, raw["dtype"])
    assert same(dict(loaded.state_dict()), {name: value.to(dtype) for name, value in written.state_dict().items()})
    save_model(loaded, read_raw, tmp_path / "b", dtype)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@BOTH
def test_every_parameter_is_saved_under_a_name_of_its_own(raw: dict[str, Any], tmp_path: Path) -> None:
    model = write(tmp_path, raw)
    assert sum(part.numel() for part in tensors(model, raw["model_type"]).values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_the_run_time_dtype() -> None:
    assert run_dtype({"dtype": "float16"}, "auto") is torch.bfloat16
    assert run_dtype({"torch_dtype": "torch.bfloat16"}, "auto") is torch.bfloat16
    assert run_dtype({}, "auto") is torch.float32
    assert run_dtype({"dtype": "float32"}, "bfloat16") is torch.bfloat16


def test_a_tied_model_is_loaded_once(tmp_path: Path) -> None:
    write(tmp_path, OLMOE | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert not hasattr(load_model(tmp_path)[0], "head")


def test_a_tied_head_that_is_stored_all_the_same_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path, OLMOE | {"tie_word_embeddings": True})
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert not hasattr(load_model(tmp_path)[0], "head")


def damaged(folder: Path, change: Any) -> str:
    """What is said of an OLMoE checkpoint whose tensors were changed."""
    write(folder, OLMOE)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    return str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state["model.layers.1.mlp.experts.3.up_proj.weight"]
        state["model.layers.9.mlp.gate.weight"] = torch.zeros(2)
        state["model.norm.weight"] = torch.zeros(17)

    said = damaged(tmp_path, change)
    assert "missing model.layers.1.mlp.experts.3.up_proj.weight" in said
    assert "extra model.layers.9.mlp.gate.weight" in said
    assert "model.norm.weight has shape (17,), not (16,)" in said


def test_many_faults_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    said = damaged(tmp_path, lambda state: [state.pop(name) for name in list(state) if "experts" in name])
    assert "more" in said and len(said) < 4000


def test_a_scalar_does_not_fill_a_matrix(tmp_path: Path) -> None:
    said = damaged(tmp_path, lambda state: state.update({"model.embed_tokens.weight": torch.zeros(1)}))
    assert "model.embed_tokens.weight has shape (1,), not (37, 16)" in said


def test_zeros_that_are_no_bias_of_a_matrix_are_extra(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    assert f"extra {name}" in damaged(tmp_path, lambda state: state.update({name: torch.zeros(17)}))


def test_a_bias_is_read_only_beside_a_matrix_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFiles, "read", lambda files, name: pytest.fail(f"{name} is read"))
    name = "model.layers.0.self_attn.q_proj."
    given = {name + "weight": torch.zeros(90, 0), name + "bias": torch.zeros(90)}
    assert f"{name}weight has shape (90, 0)" in damaged(tmp_path, lambda state: state.update(given))


def test_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, OLMOE)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    load_model(tmp_path)


def without(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != name}


BAD_CONFIGS: dict[str, tuple[object, str]] = {
    "not an object": ([OLMOE], "must hold a JSON object"),
    "remote code": (OLMOE | {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "unknown family": (OLMOE | {"model_type": "gpt_unknown"}, "'gpt_unknown' is not supported; known: "),
    "path": (OLMOE | {"model_type": "../../etc/passwd"}, "not the name of a family"),
    "dotted": (OLMOE | {"model_type": "olmoe.os"}, "not the name of a family"),
    "dunder": (OLMOE | {"model_type": "__init__"}, "not supported"),
    "no family": (without(OLMOE, "model_type"), "model_type"),
    "family of another type": (OLMOE | {"model_type": ["olmoe"]}, "model_type"),
    "missing size": (without(OLMOE, "hidden_size"), "'hidden_size' is missing"),
    "missing choice": (without(INFINITY, "sigma_link"), "'sigma_link' is missing"),
    "unknown rotary": (OLMOE | {"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not known"),
    "rotary of another type": (OLMOE | {"rope_parameters": [1]}, "config.json"),
    "size of another type": (OLMOE | {"num_hidden_layers": "2"}, "config.json"),
    "width of another type": (OLMOE | {"intermediate_size": "12"}, "width must be a whole number"),
    "no heads": (OLMOE | {"num_attention_heads": 0}, "config.json"),
    "negative": (OLMOE | {"hidden_size": -16}, "width must be"),
    "heads do not divide": (OLMOE | {"num_key_value_heads": 3}, "4 heads"),
    "unknown activation": (OLMOE | {"hidden_act": "swish_2"}, "activation"),
    "unknown link": (INFINITY | {"sigma_link": "square"}, "sigma_link"),
    "unknown draws": (INFINITY | {"draws": "sobol"}, "draws"),
    "unknown norm": (INFINITY | {"norm": "batch"}, "norm"),
    "unknown positions": (INFINITY | {"positions": "alibi"}, "positions"),
    "unknown query norm": (INFINITY | {"qk_norm": "tail"}, "qk_norm"),
    "unknown field": (OLMOE | {"logits_warp": 3, "sparkle": False}, "may change what it computes: logits_warp"),
    "rotary pairs that no code reads": (
        OLMOE | {"rope_interleave": True},
        "may change what it computes: rope_interleave",
    ),
    "unknown part of rotary": (OLMOE | {"rope_parameters": {"rope_type": "linear", "twist": 2}}, "'twist'"),
    "groups do not divide": (INFINITY | {"mask_block": 5}, "24 units cannot be cut into groups of 5 (mask_block)"),
    "no group": (INFINITY | {"mask_block": 0}, "mask_block must be a whole number of at least 1, got 0"),
    "expert space of another type": (INFINITY | {"gate_dim": "4"}, "gate_dim must be a whole number"),
    "share above one": (INFINITY | {"kept_share": 1.5}, "kept_share must be above 0 and at most 1, got 1.5"),
    "trained above all": (OLMOE | {"num_experts_per_tok": 6}, "trained expert count 6"),
    "trained none": (INFINITY | {"num_experts_per_tok": 0}, "trained must be"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_one_clear_error(name: str, tmp_path: Path) -> None:
    raw, words = BAD_CONFIGS[name]
    write_config(tmp_path, raw)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["", "{", "\x80", "[" * 100_000, '{"a": 1} x'])
def test_a_config_that_is_not_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_model(tmp_path)


def test_the_families_are_the_files() -> None:
    assert {"infinity_moe", "olmoe"} <= set(families())


def test_what_a_config_adds_is_kept(tmp_path: Path) -> None:
    write(tmp_path, OLMOE | {"_name_or_path": "kept"})
    assert json.loads((tmp_path / "config.json").read_text())["_name_or_path"] == "kept"
    assert load_model(tmp_path)[1]["_name_or_path"] == "kept"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    write(tmp_path, OLMOE)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not finite"):
        load_model(tmp_path)


def test_a_model_larger_than_memory_names_the_shortfall(tmp_path: Path) -> None:
    """Before anything is read: the folder has no tensors at all."""
    write_config(tmp_path, OLMOE | {"hidden_size": 1 << 16, "intermediate_size": 1 << 20, "num_experts": 1 << 12})
    with pytest.raises(CheckpointError, match=r"the weights need \d+.* GB too little"):
        load_model(tmp_path)


def test_progress_is_told_by_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = write(tmp_path, OLMOE)
    load_model(tmp_path, progress=lambda *bytes: seen.append(bytes))
    total = sum(p.numel() * 4 for p in model.parameters())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
