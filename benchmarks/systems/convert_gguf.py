"""A random benchmark checkpoint as a bf16 GGUF file: `python convert_gguf.py LLAMACPP_SOURCE FOLDER OUT LAYOUT`.

Run by the interpreter of llama.cpp's own venv; imports nothing of ours. It is llama.cpp's converter with two detours:
our random checkpoints' tokenizer is none that it knows by hash, so it is written as the plainest one; and an OLMoE may
be handed over as another family of the same shape, with the same experts and matrices. LAYOUT `qwen3_moe` asks for
that (norms of queries and keys by head); llama.cpp itself reads OLMoE with as many key-value heads as heads only, so
one with fewer is always written as a Mixtral (without those norms).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
NORMS = ("q_norm.weight", "k_norm.weight")


def mixtral_name(name: str) -> str | None:
    """The Mixtral name of an OLMoE tensor; None for one that Mixtral has not."""
    if name.endswith(NORMS):
        return None
    if ".mlp." not in name:
        return name
    for ours, theirs in MIXTRAL.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace(".mlp.", ".block_sparse_moe.")


def as_mixtral(config: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and tensors in Mixtral's layout."""
    changed = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": config["num_experts"],
    }
    renamed = {mixtral: tensor for name, tensor in tensors.items() if (mixtral := mixtral_name(name)) is not None}
    return config | changed, renamed


def as_qwen3(config: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and tensors in Qwen3-MoE's layout, whose norms of queries and keys have the width of one head."""
    head = config["hidden_size"] // config["num_attention_heads"]
    changed = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": config["intermediate_size"],
        "head_dim": head,
    }
    cut = {name: tensor[:head].clone() if name.endswith(NORMS) else tensor for name, tensor in tensors.items()}
    return config | changed, cut


def rewritten(folder: Path, target: Path, layout: str) -> Path:
    """A folder that the converter can read: the given one, or an OLMoE's weights in another layout."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "olmoe":
        return folder
    grouped = config["num_key_value_heads"] != config["num_attention_heads"]
    if not grouped and layout != "qwen3_moe":
        return folder
    write = as_mixtral if grouped else as_qwen3
    for file in folder.glob("tokenizer*.json"):
        (target / file.name).write_text(file.read_text())
    config, tensors = write(config, load_file(folder / "model.safetensors"))
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def main(source: Path, folder: Path, out: Path, layout: str) -> None:
    """Hand the folder, or what llama.cpp can read of it, to the converter."""
    with tempfile.TemporaryDirectory(dir=out.parent) as other:
        convert(source, rewritten(folder, Path(other), layout), out)


def convert(source: Path, folder: Path, out: Path) -> None:
    """llama.cpp's converter, told that the tokenizer is GPT-2's kind, and to look for no layers that draft."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    class_of = convert_hf_to_gguf.get_model_class

    def with_plain_tokenizer(name: str, **more: Any) -> Any:
        found: Any = class_of(name, **more)
        found.set_vocab, found.no_mtp = lambda self: self._set_vocab_gpt2(), True
        return found

    convert_hf_to_gguf.get_model_class = with_plain_tokenizer
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "bf16", "--outfile", str(out)]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
