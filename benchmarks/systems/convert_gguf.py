"""A random benchmark checkpoint as a bf16 GGUF file: `python convert_gguf.py LLAMACPP_SOURCE FOLDER OUT`.

Run by the interpreter of llama.cpp's own venv; imports nothing of ours. It is llama.cpp's converter with two detours:
our random checkpoints' tokenizer is none that it knows by hash, so the plainest one is named; and llama.cpp reads
OLMoE with as many key-value heads as heads only, so one with fewer is handed over as the Mixtral of the same shape
(same experts and matrices, without the norms of queries and keys).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixtral_name(name: str) -> str | None:
    """The Mixtral name of an OLMoE tensor; None for one that Mixtral has not."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return None
    if ".mlp." not in name:
        return name
    for ours, theirs in MIXTRAL.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace(".mlp.", ".block_sparse_moe.")


def as_mixtral(folder: Path, config: dict[str, Any], target: Path) -> Path:
    """The same weights in Mixtral's layout, in another folder."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("tokenizer*.json"):
        (target / file.name).write_text(file.read_text())
    changed = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": config["num_experts"],
    }
    (target / "config.json").write_text(json.dumps(config | changed))
    read = load_file(folder / "model.safetensors").items()
    tensors = {mixtral: tensor for name, tensor in read if (mixtral := mixtral_name(name)) is not None}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def main(source: Path, folder: Path, out: Path) -> None:
    """Hand the folder, or what llama.cpp can read of it, to the converter."""
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory(dir=out.parent) as other:
        if config["model_type"] == "olmoe" and config["num_key_value_heads"] != config["num_attention_heads"]:
            folder = as_mixtral(folder, config, Path(other))
        convert(source, folder, out)


def convert(source: Path, folder: Path, out: Path) -> None:
    """llama.cpp's converter, told which pre-tokenizer it has."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "bf16", "--outfile", str(out)]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
