"""`quantization_config`s as the programs that quantise write them."""

from typing import Any


def gptq(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "true_sequential": True,
        "meta": {"quantizer": ["gptqmodel:2.2.0"]},
    }
    return fields | changes


def awq(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return fields | {"modules_to_not_convert": ["gate"]} | changes


def compressed(format: str, changes: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """`weights` of the one group; `changes` of the whole."""
    scheme: dict[str, Any] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": scheme | weights, "input_activations": None, "output_activations": None}
    fields: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }
    return fields | (changes or {})


def modelopt(**changes: Any) -> dict[str, Any]:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    fields: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"input_activations": weights, "weights": weights, "targets": ["Linear"]}},
        "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.39.0"},
    }
    return fields | changes


FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
