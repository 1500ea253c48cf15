"""Metadata of a tokenizer that is damaged, hostile or not known is refused, and the way out is named."""

from collections.abc import Callable
from typing import Any

import pytest

from model.errors import CheckpointError
from tests.weights.gguf.vocabularies import byte_level, sentencepiece
from weights.gguf.tokenizer import generation_config, tokenizer_config, tokenizer_json
from weights.gguf.vocabulary import MAX_TOKEN, TokenType, Vocabulary

Change = Callable[[dict[str, Any]], None]


def put(name: str, value: Any) -> Change:
    return lambda metadata: metadata.__setitem__(f"tokenizer.{name}", value)


def at(name: str, index: int, value: Any) -> Change:
    return lambda metadata: metadata[f"tokenizer.ggml.{name}"].__setitem__(index, value)


HOSTILE: dict[str, tuple[Change, str]] = {
    "an unknown pre-tokenizer": (put("ggml.pre", "qwen9"), "pre is 'qwen9', which is not known; known are chatglm-bpe"),
    "no pre-tokenizer": (put("ggml.pre", None), "pre is None, no text"),
    "an unknown model": (put("ggml.model", "t5"), "model is 't5'; known are gpt2 and llama"),
    "a model that is no text": (put("ggml.model", 3), "model is 3, no text"),
    "tokens that are numbers": (put("ggml.tokens", [1, 2]), "no array of str"),
    "no tokens": (put("ggml.tokens", []), "tokens has 0 tokens"),
    "one token that is a number": (at("tokens", 7, 1.5), "no array of str"),
    "a token twice": (at("tokens", 9, "!"), "token '!' has the ids 1 and 9"),
    "an empty token": (at("tokens", 9, ""), "token 9 has 0 characters; 1 to 4096"),
    "a giant token": (at("tokens", 9, "x" * (MAX_TOKEN + 1)), "token 9 has 4097 characters"),
    "too few types": (put("ggml.token_type", [1, 1]), "token_type 2 types"),
    "no types": (put("ggml.token_type", None), "token_type is None"),
    "an unknown type": (at("token_type", 3, 9), "has the type 9; known are 1 to 6"),
    "a type that is a bool": (at("token_type", 3, True), "no array of int"),
    "an id outside": (put("ggml.eos_token_id", 440), "eos_token_id is 440; ids are 0 to 439"),
    "a negative id": (put("ggml.bos_token_id", -1), "bos_token_id is -1"),
    "an id that is no number": (put("ggml.padding_token_id", "0"), "padding_token_id is '0'"),
    "a flag that is a number": (put("ggml.add_bos_token", 1), "add_bos_token is 1, neither true nor false"),
    "no merges": (put("ggml.merges", None), "merges is None, no array of str"),
    "a merge of an unknown token": (at("merges", 5, "zzz y"), "item 5, 'zzz y', is not of two tokens"),
    "a merge to an unknown token": (at("merges", 5, "! !"), "item 5, '! !', is not of two tokens"),
    "a merge of one token": (at("merges", 5, "!"), "item 5, '!', is not of two tokens"),
    "a template that is a list": (put("chat_template", ["x"]), "no text"),
    "a named template that is a number": (put("chat_template.rag", 1), "'rag'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_metadata_is_refused(case: str) -> None:
    metadata = byte_level()
    change, reason = HOSTILE[case]
    change(metadata)
    with pytest.raises(CheckpointError) as caught:
        vocabulary = Vocabulary.read(metadata)
        tokenizer_json(vocabulary), tokenizer_config(vocabulary), generation_config(vocabulary)
    assert reason in str(caught.value)
    assert "template" in case or "--tokenizer DIR takes" in str(caught.value)


def test_a_bos_that_is_asked_for_must_be_there() -> None:
    metadata = byte_level() | {"tokenizer.ggml.add_bos_token": True}
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(CheckpointError, match="add_bos_token is true, but there is no"):
        tokenizer_config(Vocabulary.read(metadata))
    del metadata["tokenizer.ggml.add_bos_token"]
    assert not tokenizer_config(Vocabulary.read(metadata))["add_bos_token"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("scores", [1.0], "tokens and tokenizer.ggml.scores 1 scores"),
        ("scores", None, "scores is None"),
        ("scores", "same", "are all the same"),
        ("scores", "nan", "is not a number"),
        ("tokens", "bytes", "has no token <0x41>"),
        ("add_space_prefix", 0, "neither true nor false"),
    ],
)
def test_damaged_sentencepiece_metadata_is_refused(name: str, value: Any, reason: str) -> None:
    metadata = sentencepiece()
    count = len(metadata["tokenizer.ggml.tokens"])
    made: dict[Any, Any] = {"same": [-1.0] * count, "nan": [float("nan")] * count}
    made["bytes"] = [token.replace("<0x41>", "no byte") for token in metadata["tokenizer.ggml.tokens"]]
    metadata[f"tokenizer.ggml.{name}"] = made.get(value, value) if isinstance(value, str) else value
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_json(Vocabulary.read(metadata))


def test_merges_that_follow_from_scores_are_bounded() -> None:
    """Every way to cut 700 tokens of up to 700 characters in two has 114 million characters."""
    metadata = sentencepiece()
    tokens = [token for count in range(2, 701) if (token := "a" * count) not in metadata["tokenizer.ggml.tokens"]]
    metadata["tokenizer.ggml.tokens"] += tokens
    metadata["tokenizer.ggml.token_type"] += [int(TokenType.NORMAL)] * len(tokens)
    metadata["tokenizer.ggml.scores"] += [-float(1000 + at) for at in range(len(tokens))]
    with pytest.raises(CheckpointError, match=r"in two have 114\d{6} characters; at most 67108864 are"):
        tokenizer_json(Vocabulary.read(metadata))
