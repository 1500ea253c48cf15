"""Reading a checkpoint's config.json: what the Hugging Face families have in common, and which keys were read.

A key that is set, was not read and is not known to be harmless may change the mathematics: an error names it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from model.shapes.attention import Attention, AttentionShape
from model.shapes.checks import sizes
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense
from model.shapes.rope import Rope

# Keys that say nothing of what a served model computes: names, training, generation, other programs' switches.
_HARMLESS = """model_type architectures torch_dtype dtype transformers_version use_cache initializer_range _name_or_path
name_or_path attention_dropout attn_dropout hidden_dropout embd_pdrop resid_pdrop attn_pdrop hidden_dropout_prob
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id output_router_logits router_aux_loss_coef
aux_loss_alpha router_jitter_noise input_jitter_noise router_z_loss_coef pretraining_tp seq_aux ep_size
attn_implementation _attn_implementation experts_implementation _experts_implementation chunk_size_feed_forward
id2label label2id problem_type return_dict is_encoder_decoder is_decoder add_cross_attention output_attentions
output_hidden_states torchscript tokenizer_class task_specific_params quantization_config num_nextn_predict_layers
summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels mtp_loss_factor"""
HARMLESS = frozenset(_HARMLESS.split())


_UNSET: tuple[object, ...] = (None, False, 0, "", [], {})  # values that say no more than an absent key

MAX_LAYERS = 1024
_LAYERS = ("num_hidden_layers", "n_layer")


def check_numbers(raw: Mapping[str, Any]) -> None:
    """Raise ValueError where a number is none, or where there are more layers than a family could write down."""
    for key, value in raw.items():
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value}")
        if key in _LAYERS:
            sizes(**{key: value})
            if value > MAX_LAYERS:
                raise ValueError(f"{key} must be at most {MAX_LAYERS}, got {value!r:.40}")
        if isinstance(value, Mapping):
            check_numbers(value)


class ConfigReader(Mapping[str, Any]):
    """config.json as a mapping that records which keys were read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw, self._read = raw, set[str]()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._raw[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def mark_read(self, *keys: str) -> None:
        """Count these keys as read: their values do not change what the family computes."""
        self._read.update(keys)

    def either(self, *keys: str, default: Any = None) -> Any:
        """The value of a key that has several names.

        Raises:
            ValueError: two of them disagree.
        """
        given = {key: self[key] for key in keys if self.get(key) is not None}
        if len(set(given.values())) > 1:
            raise ValueError(f"{' and '.join(given)} disagree: {', '.join(map(repr, given.values()))}")
        return next(iter(given.values()), default)

    def expect(self, key: str, *values: object) -> None:
        """Require the key to be absent, null, or one of the values that this family supports.

        Raises:
            ValueError: it is something else.
        """
        if self.get(key) is not None and self[key] not in values:
            known = ", ".join(map(repr, values))
            raise ValueError(f"{key} is {self[key]!r:.60}, but only {known} is supported")

    def check(self) -> None:
        """Raise ValueError if a key that was not read is set to something."""
        unread = (key for key in self._raw if key not in self._read and key not in HARMLESS)
        unknown = sorted(key for key in unread if self._raw[key] not in _UNSET)
        if unknown:
            raise ValueError(
                f"fields that this family does not know, and that may change what it computes: {', '.join(unknown)}"
            )


def head_width(hf_config: ConfigReader) -> int:
    """The width of one head's queries and keys."""
    return int(hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"])


def rope(
    hf_config: ConfigReader, width: int, *, interleaved: bool = False, theta: float = 10000.0, share: float = 1.0
) -> Rope:
    """Rotary positions of heads of `width`, from `rope_parameters` (transformers 5), or `rope_scaling` and
    `rope_theta`.

    `theta` and `share` (of the head that is turned) are the family's defaults.

    Raises:
        ValueError: a kind or a parameter of scaling that is not known.
    """
    given = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    hf_config.mark_read("rope_scaling", "rope_parameters")
    base, turned = hf_config.get("rope_theta"), hf_config.get("partial_rotary_factor")
    original, largest = hf_config.get("original_max_position_embeddings"), hf_config.get("max_position_embeddings")
    kind: Any = given.pop("rope_type", given.pop("type", None)) or "default"
    given.pop("type", None)
    base = given.pop("rope_theta", None) or base or theta
    turned = given.pop("partial_rotary_factor", None) or turned or share
    original = given.pop("original_max_position_embeddings", None) or original or largest
    known = {name: value for name, value in given.items() if value is not None}
    kind = {"su": "longrope", "ntk": "dynamic"}.get(kind, kind)
    if kind == "longrope" and "factor" not in known and original:
        known["factor"] = largest / original
    for name in ("short_factor", "long_factor"):
        if name in known:
            known[name] = tuple(map(float, known[name]))
    if kind != "default":
        known["original"] = original
    try:
        return Rope(int(width * turned), float(base), interleaved, kind, **known)
    except TypeError as error:
        raise ValueError(f"rope_parameters: {error}") from None


def attention(hf_config: ConfigReader, positions: Rope | None, **changes: Any) -> Attention:
    """Grouped-query attention from the usual keys."""
    heads = hf_config["num_attention_heads"]
    kv_heads = hf_config.get("num_key_value_heads") or heads
    width = head_width(hf_config)
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_width": width, "rope": positions}
    return Attention(**shape | changes)


def windows(hf_config: ConfigReader, window: int | None, slides: Callable[[int], bool]) -> list[int]:
    """The sliding window of each layer, 0 for none: from `layer_types`, or else from `slides` if there is a window.

    Raises:
        ValueError: layers of other kinds, or layers that slide without a window.
    """
    count, (full, sliding) = hf_config["num_hidden_layers"], ("full_attention", "sliding_attention")
    usual = [sliding if window and slides(layer) else full for layer in range(count)]
    kinds = layer_kinds(hf_config, usual, full, sliding)
    if sliding in kinds and not window:
        raise ValueError("layer_types has layers that slide, but there is no sliding_window")
    return [window or 0 if kind == sliding else 0 for kind in kinds]


def layer_kinds(hf_config: ConfigReader, usual: Sequence[str], *known: str) -> list[str]:
    """The kind of each layer: `layer_types`, or else `usual`.

    Raises:
        ValueError: a kind that is not known, or too few of them.
    """
    count = hf_config["num_hidden_layers"]
    kinds = list(hf_config.get("layer_types") or usual)[:count]
    if len(kinds) != count or not set(kinds) <= set(known):
        raise ValueError(f"layer_types must say {' or '.join(known)} of each of the {count} layers")
    return kinds


def dense(hf_config: ConfigReader, width: int, *, bias: bool = False) -> Dense:
    """A gated feed-forward layer."""
    return Dense(width, activation(hf_config), bias=bias)


def activation(hf_config: ConfigReader) -> Any:
    """The activation's name in `Activation`; the shape that it is put into refuses an unknown one."""
    name = hf_config.get("hidden_act") or hf_config.get("hidden_activation") or "silu"
    return {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(name, name)


def decoder(
    hf_config: ConfigReader,
    attention: AttentionShape | Sequence[AttentionShape],
    feed_forward: FeedForward | Sequence[FeedForward],
    **changes: Any,
) -> DecoderConfig:
    """The decoder's shape from the usual keys; one attention or feed-forward shape stands for that of every layer.

    Raises:
        KeyError: a size is missing.
        ValueError: a field that the family has not read.
    """
    count = hf_config["num_hidden_layers"]
    shape: dict[str, Any] = {
        "attention": _of_each_layer(attention, count),
        "feed_forward": _of_each_layer(feed_forward, count),
    }
    shape |= {
        "vocabulary": hf_config["vocab_size"],
        "width": hf_config["hidden_size"],
        "context": hf_config["max_position_embeddings"],
    }
    shape |= {
        "norm_eps": hf_config.get("rms_norm_eps", 1e-6),
        "tied": bool(hf_config.get("tie_word_embeddings", False)),
    }
    hf_config.check()
    return DecoderConfig(**shape | changes)


def _of_each_layer(given: Any, count: int) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, Sequence) else (given,) * count


def sparse_layers(hf_config: ConfigReader) -> list[bool]:
    """Which layers are mixtures, in Qwen's words: every `decoder_sparse_step`-th, but those of `mlp_only_layers`."""
    step, plain = hf_config.get("decoder_sparse_step", 1), hf_config.get("mlp_only_layers") or []
    count = hf_config["num_hidden_layers"]
    chosen = [step > 0 and (layer + 1) % step == 0 for layer in range(count)]
    return [sparse and layer not in plain for layer, sparse in enumerate(chosen)]
