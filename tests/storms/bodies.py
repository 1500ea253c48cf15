"""A storm of bodies: invalid values, large or malformed bodies, long or unusual texts.

`python -m tests.storms.bodies [WAVE …]`
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tests.storms.base import ANSWERED, CHAT, COMPLETIONS, REFUSED, RESPONSES, SMALL, Attack, Storm, Wave, main

LARGE = 7_800_000  # bytes, within the limit of a body
USER = [{"role": "user", "content": "hi"}]
BAD_COUNTS = (b"0", b"-1", b"1000000000", b'"8"', b"2.5", b"NaN", b"true", b"[]", b"[1, 2]", b"1e400", b"{}")
BAD_FIELDS: Sequence[dict[str, Any]] = (
    {"n": 1_000_000},
    {"logprobs": 1_000_000},
    {"stop": ["x"] * 10_000},
    {"max_tokens": 1_000_000},
    {"max_tokens": -1},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [-1]},
    {"prompt": [2**70]},
    {"seed": 2**64},
    {"temperature": 1e308 * 10},
    {"logit_bias": {str(i): 1 for i in range(10_000)}},
    {"logit_bias": {"1": float("inf")}},
    {"stop_token_ids": [10**12]},
)
TEXTS = (
    "\ud83d\ude00" * 20,
    "e\u0301" * 40,
    "<|endoftext|>" * 10,
    "\u0000\u0001\u007f",
    "a\ud800b",
    "\u202e reversed",
    "\ufeff",
    " " * 100,
    "\n" * 100,
)
RAW = (
    b"",
    b"null",
    b"[1]",
    b'"text"',
    b"{",
    b"\xff\xfe{}",
    b'{"prompt": "\xc3\x28"}',
    b'{"prompt": "a", "prompt": "b", "max_tokens": 1}',
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"prompt": "a\x00b"}',
    b'{"prompt": "' + b"\\ud800" * 10 + b'", "max_tokens": 1}',
)


def _list(path: str, field: str, item: bytes, before: bytes = b"", after: bytes = b"") -> tuple[str, bytes]:
    """A body whose list or object `field` has as many wrong entries as fit."""
    count = LARGE // (len(item) + 1)
    base = b'"prompt": "a", ' if path == COMPLETIONS and field != "prompt" else b""
    base = b'"messages": [{"role": "user", "content": "a"}], ' if path == CHAT and field != "messages" else base
    base = b'"input": "a", ' if path == RESPONSES and field != "input" else base
    return path, b"{" + base + b'"%b": ' % field.encode() + before + b"[" + b",".join(
        [item] * count
    ) + b"]" + after + b"}"


def wrong_items() -> list[tuple[str, bytes]]:
    """One large body for every list that a client can send."""
    keys = b",".join(b'"key%d":0' % i for i in range(600_000))
    biases = b",".join(b'"%d":"x"' % i for i in range(600_000))
    return [
        _list(RESPONSES, "input", b"{}"),
        _list(CHAT, "messages", b"{}"),
        _list(CHAT, "messages", b"{}", b'[{"role":"user","content":', b"}]"),
        _list(CHAT, "tools", b"{}"),
        _list(COMPLETIONS, "stop", b"{}"),
        _list(COMPLETIONS, "guided_choice", b"{}"),
        _list(COMPLETIONS, "prompt", b"{}"),
        _list(COMPLETIONS, "prompt", b"1"),
        _list(COMPLETIONS, "stop_token_ids", b"{}"),
        _list(COMPLETIONS, "allowed_token_ids", b"{}"),
        _list(RESPONSES, "include", b"{}"),
        (COMPLETIONS, b'{"prompt":"a","max_tokens":1,' + keys + b"}"),
        (COMPLETIONS, b'{"prompt":"a","max_tokens":1,"logit_bias":{' + biases + b"}}"),
        (CHAT, b'{"messages":[{"role":"user","content":"a"}],"max_tokens":1,"x":' + b"[" + b"[]," * 2_000_000 + b"0]}"),
    ]


def long_texts() -> list[tuple[str, bytes]]:
    text = b"once upon a time there was a dog " * (LARGE // 33)
    strange = "\u00e9\u4e2d".encode() * (LARGE // 5)
    return [
        (COMPLETIONS, b'{"prompt":"%b","max_tokens":1}' % text),
        (COMPLETIONS, b'{"prompt":"%b","max_tokens":1}' % strange),
        (CHAT, b'{"messages":[{"role":"user","content":"%b"}],"max_tokens":1}' % text),
        (RESPONSES, b'{"input":"%b"}' % text),
    ]


def each(bodies: Callable[[], list[tuple[str, bytes]]]) -> Attack:
    """One body after the other."""
    made: list[tuple[str, bytes]] = []

    async def attack(storm: Storm, number: int) -> str:
        made.extend([] if made else bodies())
        path, body = made[number % len(made)]
        return await storm.post(path, body)

    return attack


async def bad_counts(storm: Storm, number: int) -> str:
    return await storm.post(
        COMPLETIONS, b'{"prompt": "a", "max_tokens": 1, "num_experts": %b}' % BAD_COUNTS[number % len(BAD_COUNTS)]
    )


async def bad_fields(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1} | BAD_FIELDS[number % len(BAD_FIELDS)])


async def raw_bodies(storm: Storm, number: int) -> str:
    return await storm.post((COMPLETIONS, CHAT, RESPONSES)[number % 3], RAW[number // 3 % len(RAW)])


async def texts(storm: Storm, number: int) -> str:
    text = TEXTS[number // 2 % len(TEXTS)]
    if number % 2:
        return await storm.post(COMPLETIONS, SMALL | {"prompt": text, "stream": False})
    return await storm.post(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 4})


async def edges(storm: Storm, number: int) -> str:
    """Prompts of one token, of just the context, of one more."""
    context = 256
    length = (1, context - 1, context, context + 1)[number % 4]
    return await storm.post(COMPLETIONS, {"prompt": [1 + number % 50] * length, "max_tokens": 1, "temperature": 0})


async def scores(storm: Storm, number: int) -> str:
    """Many prompts to be scored at once: a large answer."""
    prompts = [[1 + (i + number) % 100] * 200 for i in range(64)]
    return await storm.post(COMPLETIONS, {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 20})


async def tokenised(storm: Storm, number: int) -> str:
    """The largest text and the longest list of ids that a body holds."""
    if number % 2:
        return await storm.post("/detokenize", b'{"tokens":[' + b",".join([b"7"] * (LARGE // 2)) + b"]}")
    return await storm.post("/tokenize", b'{"prompt":"%b"}' % (b"once upon a time " * (LARGE // 17)))


async def hundred_megabytes(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, b'{"prompt": "' + b"a" * 100_000_000 + b'"}')


BOTH = (ANSWERED, REFUSED)
WAVES = (
    Wave("bad counts", bad_counts, 220, 20, (REFUSED,)),
    Wave("bad fields", bad_fields, 150, 10, (REFUSED,)),
    Wave("raw bodies", raw_bodies, 144, 12, BOTH),
    Wave("texts", texts, 180, 12, BOTH),
    Wave("edges", edges, 80, 8, BOTH),
    Wave("wrong items", each(wrong_items), 28, 2, BOTH),
    Wave("long texts", each(long_texts), 16, 4, (REFUSED,)),
    Wave("100 MB", hundred_megabytes, 4, 2, (REFUSED,)),
    Wave("scores", scores, 3, 3, BOTH, counted=False),
    Wave("tokenised", tokenised, 8, 4, BOTH, counted=False),
)

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", WAVES))
