"""The options that say which models are served, and how their engines run.

Not here: how clients reach the server, and its limits (see `server/settings.py`).
"""

from typing import Any, Literal

from pydantic import ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.environment import PREFIX
from engine.types import EngineSettings, GenerationConfig
from model.options import DType, KVCacheDType, Quantize, QuantizeLayers
from server.configuration.options import (
    Counts,
    FoldersByName,
    FreeNames,
    PricesByCount,
    Words,
    option,
)
from weights.folder import DEFAULT

ENGINE = EngineSettings(model="")  # the engine's options have its types and, but for `speculate`, its defaults


class ModelSettings(BaseSettings):
    """Models and engines."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # which may be a key
    )

    model: str = option(
        DEFAULT, "Model", "A folder, a GGUF file, the name of a bundled model, or a Hugging Face hub id"
    )
    models: FoldersByName = option(
        {},
        "Model",
        "Several models, as small=FOLDER,large=FOLDER; --model NAME=FOLDER more than once says the same. Each has an "
        "engine process, started when a request names the model; the first one answers requests that name none",
    )
    models_memory: int = option(
        0,
        "Model",
        "Bytes of memory for the weights and KV caches of --models together; for a model that does not fit, idle ones "
        "are unloaded. 0: no limit",
        ge=0,
    )
    preload: Words = option((), "Model", "Which of --models are loaded at start, comma-separated; empty: the first")
    tokenizer: str = option(
        ENGINE.tokenizer,
        "Model",
        "A folder with a tokenizer.json that is used instead of the model's own, with its tokenizer_config.json, chat "
        "template and, where it has one, generation_config.json; for GGUF files whose tokenizer is not known",
    )
    tokenizers: FoldersByName = option(
        {},
        "Model",
        "The same for some of --models, as small=FOLDER,large=FOLDER; --tokenizer NAME=FOLDER, once or more often, "
        "says it too",
    )
    served_name: str = option("", "Model", "The model's name in the API; by default the last part of --model")
    default_num_experts: int = option(
        ENGINE.default_num_experts, "Model", "Experts per token when a request does not say; 0: as trained", ge=0
    )
    aliases: Counts = option(
        {}, "Model", "Further aliases NAME@word, as fast=2,strong=8; NAME@k1, @k2, @k4 … always exist"
    )
    prices: PricesByCount = option(
        {},
        "Model",
        "Price of a million tokens by expert count, as 1=0.05/0.2,8=0.2/0.8: of prompts and of answers, and after a "
        "third / of cached prompt tokens. Answers then say in usage.cost what they cost. Counts in between are priced "
        "on the line; the model's smallest and largest count need a price, or one price is for all",
    )
    currency: str = option("USD", "Model", "What --prices are in, as a word", pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
    dtype: DType = option(ENGINE.dtype, "Model", "Number format; auto: the checkpoint's")
    allow_extrapolated_experts: bool = option(
        ENGINE.allow_extrapolated_experts,
        "Model",
        "Allow other counts than the trained one where a family's router is not made for them",
    )
    generation_config: GenerationConfig = option(
        ENGINE.generation_config,
        "Model",
        "auto: where a request is silent, generation_config.json says temperature, top_p, top_k, min_p and "
        "repetition_penalty, and which tokens end an answer; none: it is not read",
    )
    chat_template_kwargs: FreeNames = option(
        (),
        "Model",
        "What a request's chat_template_kwargs may set, comma-separated, as enable_thinking; empty: none",
    )
    return_routed_experts: bool = option(
        False,
        "Model",
        "Allow requests to have return_routed_experts: the answer then says which experts each token used",
    )
    noise_seed: int = option(
        0,
        "Model",
        "Seed of the noise that an ∞-MoE draws, for requests without a noise_seed. One for all lets them share prompts "
        "that begin alike; a fixed one gives the same answer after a restart and on every replica",
        ge=0,
        le=2**63 - 1,
    )
    dialect: Literal["auto", "plain", "hermes", "mistral", "llama", "deepseek", "harmony"] = option(
        "auto",
        "Model",
        "How the model writes tool calls and reasoning; auto: as its chat template does",
    )
    schema_objects: Literal["closed", "open"] = option(
        "closed",
        "Model",
        "JSON objects of answers and calls whose schema names properties and is silent about others; closed: they have "
        "no others, open: any, as the standard has it",
    )
    strict_tools: bool = option(
        False,
        "Model",
        "Refuse requests with tools of kinds that the server does not know; otherwise these tools are left out, named "
        "in the header x-skipped-tools and counted",
    )
    max_model_len: int = option(
        ENGINE.max_model_len, "Model", "Longest prompt plus answer, in tokens; 0: what the checkpoint says", ge=0
    )

    quantize: Quantize = option(
        ENGINE.quantize,
        "Model",
        "Keep weights in 8 bits, or with int4 in 4; int8 and int4 multiply in 8 bits too, on CPUs only; fp8-weights is "
        "for GPUs only. Needs the native kernels",
    )
    quantize_layers: QuantizeLayers = option(
        ENGINE.quantize_layers,
        "Model",
        "What --quantize covers; all: every matrix but the routers; int4 of experts keeps the others in int8",
    )

    device: str = option(
        ENGINE.device,
        "Engine",
        "Where the model runs: cpu, cuda, or cuda:n for the GPU of that number; auto: a GPU if there is one",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$",
    )
    ranks: int = option(
        ENGINE.ranks,
        "Engine",
        "Processes among which the experts of a top-k mixture are divided, for a model larger than one machine; they "
        "run in plain torch (docs/scaling.md)",
        ge=1,
        le=64,
    )
    rank_address: str = option(
        ENGINE.rank_address,
        "Engine",
        "HOST:PORT of this machine, in a private network, on which `moedial rank` processes of other machines join; "
        "empty: all ranks are started here",
        pattern=r"^$|^[^:\s]+:[0-9]{1,5}$",
    )
    rank_seconds: float = option(
        ENGINE.rank_seconds,
        "Engine",
        "Seconds that a rank may take for its part of one layer; after that the engine is started again",
        gt=0,
    )
    threads: int = option(
        ENGINE.threads,
        "Engine",
        "Compute threads; 0: one per physical core, or per processor up to four, that the container's quota leaves",
        ge=0,
        le=1024,
    )
    block_size: int = option(
        ENGINE.block_size,
        "Engine",
        "Tokens per KV cache block; 0: 16 on the CPU, and on a GPU the 64 that its kernels read",
        ge=0,
        le=1024,
    )
    kv_cache_dtype: KVCacheDType = option(
        ENGINE.kv_cache_dtype,
        "Engine",
        "What keys and values are kept in; auto: the type of the weights; int8: half of bfloat16, a scale for each. "
        "Needs the native kernels",
    )
    kv_cache_bytes: int = option(
        ENGINE.kv_cache_bytes, "Engine", "Size of the KV cache; 0: a fraction of the free memory", ge=0
    )
    kv_cache_fraction: float = option(
        ENGINE.kv_cache_fraction,
        "Engine",
        "Share of the free memory for the KV cache; 0: 0.9 of the GPU's, or 0.3 within the container's limit",
        ge=0,
        lt=1,
    )
    max_running: int = option(ENGINE.max_running, "Engine", "Sequences in one batch", ge=1, le=4096)
    max_step_tokens: int = option(ENGINE.max_step_tokens, "Engine", "Tokens in one engine step", ge=1, le=1_000_000)
    step_ms: int = option(
        ENGINE.step_ms,
        "Engine",
        "Milliseconds a step may take, by estimate, while it both prefills prompts and decodes; 0: no such limit. "
        "At 50 a stream beside long prompts still gets 20 tokens a second, faster than people read",
        ge=0,
        le=60_000,
    )
    stream_interval_ms: int = option(
        ENGINE.stream_interval_ms,
        "Engine",
        "Tokens made faster than this, in milliseconds, travel together, each a chunk of its own still; at 50 a stream "
        "moves 20 times a second. A sequence's first and last are never held, but a stop string is noticed when it "
        "arrives. 0: each leaves when it is made",
        ge=0,
        le=1000,
    )
    speculate: str = option(
        "grammar",
        "Engine",
        "Draft tokens and verify them in one step, with the same answers. grammar: drafts where a schema leaves no "
        "choice; ngram: those, and what followed the same n-gram before; experts=K: grammar drafts, and drafts by the "
        "model with K experts (no n-grams); off: none",
        pattern=r"^(off|grammar|ngram|experts=[1-9][0-9]{0,3})$",
    )
    prefix_cache: bool = option(
        ENGINE.prefix_cache, "Engine", "Reuse KV blocks of equal prompts with equal expert counts"
    )
    prefix_snapshots: int = option(
        ENGINE.prefix_snapshots,
        "Engine",
        "Of models with recurrent layers: how many copies of a sequence's states the prefix cache keeps. A prompt can "
        "only start where there is one; the log says how large one is. 0: an eighth of the cache, at most two for each "
        "of --max-running",
        ge=0,
        le=1 << 20,
    )
    prefix_snapshot_tokens: int = option(
        ENGINE.prefix_snapshot_tokens,
        "Engine",
        "Tokens from one of these copies to the next within a long prompt. Others are taken behind a prompt's last "
        "full block, where prompts part, and as an answer grows, at least a sixteenth of this from the last",
        ge=16,
        le=1 << 24,
    )
    prefix_sharing: Literal["auto", "all", "key"] = option(
        "auto",
        "Engine",
        "Which requests reuse each other's prefixes: all, or those of one API key, so that no key can find out by "
        "timing what another one asked; auto: key where there are several keys",
    )
    load_timeout: float = option(600.0, "Engine", "Seconds that loading the model may take", gt=0)
    hang_seconds: float = option(
        10.0,
        "Engine",
        "Seconds without a message from the engine, or 20 times what its step was expected to take if that is more, "
        "before it is killed and started again; 0: never",
        ge=0,
    )

    @field_validator("models_memory", "preload", "tokenizers")
    @classmethod
    def _belongs_to_several_models(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not info.data.get("models"):
            raise ValueError("needs --models")
        return value

    @field_validator("preload", "tokenizers")
    @classmethod
    def _names_models(cls, value: Any, info: ValidationInfo) -> Any:
        models = info.data.get("models", {})
        if unknown := [name for name in value if name not in models]:
            raise ValueError(f"{unknown[0]!r} is none of --models: {', '.join(models)}")
        return value

    @field_validator("served_name", "tokenizer")
    @classmethod
    def _belongs_to_one_model(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("models"):
            names = " (say --tokenizers NAME=FOLDER)" if info.field_name == "tokenizer" else ""
            raise ValueError(f"is for one model, and there are --models, each of which has its own{names}")
        return value

    @field_validator("kv_cache_bytes")
    @classmethod
    def _is_given_for_several_models(cls, value: int, info: ValidationInfo) -> int:
        """A share of what is free would leave the first model most of it."""
        if not value and info.data.get("models"):
            raise ValueError("is needed with --models: the size of the KV cache of each")
        return value
