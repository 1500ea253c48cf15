"""Tokenizers from GGUF metadata: the ids of the tokenizer.json that the metadata was made of."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tests.weights.gguf.vocabularies import (
    CORPUS,
    END,
    SPACES,
    THINK,
    USER,
    byte_level,
    sentencepiece,
    sentencepiece_json,
    trained,
)
from weights.gguf.pre_tokenizers import PRE_TOKENIZERS
from weights.gguf.tokenizer import generation_config, tokenizer_config, tokenizer_json
from weights.gguf.vocabulary import TokenType, Vocabulary


def texts() -> Iterator[str]:
    """Pieces of the corpus and tokens' own strings, in any order."""
    draw = random.Random(3)
    yield from CORPUS[:5]
    names = [END, USER, THINK, SPACES, "<|", "\u2581", "<0x41>", "[PAD7]"]
    for _ in range(300):
        line = draw.choice(CORPUS)
        start = draw.randrange(len(line))
        parts = [line[start : start + draw.randint(1, 12)], draw.choice(names) * draw.randint(0, 1), draw.choice(line)]
        yield "".join(draw.sample(parts, 3))


def backend(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(Vocabulary.read(metadata))))


def check_equal(ours: Tokenizer, theirs: Tokenizer) -> None:
    for text in texts():
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2", "smollm", "olmo", "deepseek-v3"])
def test_a_byte_level_vocabulary_gives_the_ids_of_its_tokenizer_json(pre: str) -> None:
    check_equal(backend(byte_level(pre)), Tokenizer.from_str(trained(pre)))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_its_tokenizer_json(prefix: bool) -> None:
    metadata = sentencepiece(prefix)
    assert "tokenizer.ggml.merges" not in metadata
    check_equal(backend(metadata), Tokenizer.from_str(sentencepiece_json(prefix)))


SPLITS = {
    "kimi-k2": ("中文abc カタ12345 isn't", ["中文", "abc", "Ġカタ", "123", "45", "Ġisn't"]),
    "glm4": ("we'LL 12345\n\nx", ["we", "'LL", "Ġ", "123", "45", "ĊĊ", "x"]),
    "deepseek-coder": ("a b\n12 中文!?", ["a", "Ġb", "Ċ", "1", "2", "Ġ", "中文", "!?"]),
    "deepseek-llm": ("Ab ქ12 中文 !?  ", ["Ab", "Ġ", "ქ", "1", "2", "Ġ", "中文", "Ġ!?", "ĠĠ"]),
    "command-r": ("it's 12 ok", ["it", "'s", "Ġ", "1", "2", "Ġok"]),
    "refact": ("x12", ["x", "1", "2"]),
    "qwen35": ("हिन्दी 12", ["हिन्दी", "Ġ", "1", "2"]),
    "qwen2": ("हिन्दी", ["ह", "िन", "्द", "ी"]),
}


@pytest.mark.parametrize("pre", SPLITS)
def test_texts_are_cut_as_the_models_tokenizers_cut_them(pre: str) -> None:
    text, wanted = SPLITS[pre]
    found = Tokenizer.from_str(trained(pre)).pre_tokenizer
    assert found is not None
    words = [decoders.ByteLevel().decode([word]) for word, _ in found.pre_tokenize_str(text)]
    assert words == [word.replace("Ġ", " ").replace("Ċ", "\n") for word in wanted]


def test_expressions_are_those_that_transformers_has_for_the_same_names() -> None:
    """Where it has one; it differs in nothing else that its table says."""
    both = PRE_TOKENIZERS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert len(both) >= 9
    for name in both:
        assert PRE_TOKENIZERS[name].splits == (GGUF_PRE_TOKENIZER_SPLITS[name],), name


def test_types_of_tokens_say_which_are_special_and_which_are_text() -> None:
    added = {token["content"]: token for token in tokenizer_json(Vocabulary.read(byte_level()))["added_tokens"]}
    assert [token for token, said in added.items() if said["special"]] == [END, USER]
    assert [token for token, said in added.items() if not said["special"]] == [THINK, SPACES]
    assert not any(said["rstrip"] for said in added.values())
    vocab = tokenizer_json(Vocabulary.read(byte_level()))["model"]["vocab"]
    assert not any(token.startswith("[PAD") for token in vocab)


def test_special_tokens_of_phi_take_the_white_space_behind_them() -> None:
    made = backend(byte_level() | {"general.architecture": "phimoe"})
    assert made.encode(f"{USER}\n\n hi").ids == made.encode(f"{USER}hi").ids
    assert made.encode(f"{END}\nhi").ids != made.encode(f"{END}hi").ids


def config(metadata: dict[str, Any]) -> dict[str, Any]:
    return tokenizer_config(Vocabulary.read(metadata))


def test_what_goes_around_a_text() -> None:
    said = config(byte_level())
    assert (said["bos_token"], said["eos_token"]) == (END, END)
    assert (said["add_bos_token"], said["add_eos_token"]) == (False, False)
    assert config(byte_level("llama-bpe"))["add_bos_token"]  # as llama.cpp has it
    assert config(sentencepiece())["add_bos_token"] and not config(sentencepiece())["add_eos_token"]
    own = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    said = config(sentencepiece() | own)
    assert (said["add_bos_token"], said["add_eos_token"]) == (False, True)


def test_sentencepiece_has_ids_of_its_own() -> None:
    metadata = {key: value for key, value in sentencepiece().items() if not key.endswith("_id")}
    said = config(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert (said["unk_token"], said["bos_token"], said["eos_token"]) == ("<unk>", "<s>", "</s>")
    metadata["tokenizer.ggml.token_type"][2] = int(TokenType.NORMAL)
    assert "eos_token" not in config(metadata)


def test_chat_templates_have_names() -> None:
    own = {"tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.tool_use": "{{ 2 }}"}
    named = {one["name"]: one["template"] for one in config(byte_level() | own)["chat_template"]}
    assert named == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    assert "chat_template" not in config(byte_level())


def ends(*tokens: str, **named: int) -> list[str]:
    """What ends an answer of a model whose control tokens are these."""
    types = [int(TokenType.CONTROL)] * len(tokens)
    metadata = {"tokenizer.ggml.tokens": list(tokens), "tokenizer.ggml.token_type": types}
    vocabulary = Vocabulary.read(metadata | {f"tokenizer.ggml.{name}_token_id": id for name, id in named.items()})
    return [vocabulary.tokens[id] for id in generation_config(vocabulary)["eos_token_id"]]


def test_what_ends_an_answer() -> None:
    assert ends("a", "b", "c", eos=2, eot=0, eom=2) == ["c", "a"]
    assert ends("<|endoftext|>", "<|im_start|>", "<|im_end|>", eos=2) == ["<|im_end|>", "<|endoftext|>"]
    assert ends("<|start|>", "<|end|>", "<|user|>") == ["<|end|>"]
    assert ends("<|return|>", "<|end|>", "<|call|>", eos=0) == [
        "<|return|>",
        "<|call|>",
    ]  # gpt-oss


def test_sampling_defaults_are_numbers_as_they_were_written() -> None:
    own = {"general.sampling.temp": 0.699999988079071, "general.sampling.top_k": 20, "general.sampling.top_p": 1.0}
    found = generation_config(Vocabulary.read(byte_level() | own))
    assert {name: found[name] for name in found if name != "eos_token_id"} == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 1.0,
    }


def test_merges_in_a_sentencepiece_file_are_used() -> None:
    given = tokenizer_json(Vocabulary.read(sentencepiece()))["model"]["merges"][5:7]
    metadata = sentencepiece() | {"tokenizer.ggml.merges": [" ".join(pair) for pair in given]}
    assert tokenizer_json(Vocabulary.read(metadata))["model"]["merges"] == given


@pytest.mark.parametrize(("pre", "composes"), [("qwen2", True), ("olmo", True), ("command-r", True), ("gpt-2", False)])
def test_some_bring_a_text_to_nfc(pre: str, composes: bool) -> None:
    made = backend(byte_level(pre))
    assert (made.encode("cafe\u0301").ids == made.encode("café").ids) == composes
