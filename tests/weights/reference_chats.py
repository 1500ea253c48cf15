"""Texts, conversations and tools that tokenizers and chat templates are compared on. It compares nothing."""

from typing import Any

PLAIN = (
    "",
    " ",
    "\n",
    "  \n \t\n\n  x  ",
    "Hello, world! I'm can't WE'LL 123456 3.14",
    " leading and trailing ",
    "a" * 300,
    " " * 300,
    "\r\n\r\n\t\t",
    "日本語のテキスト、한국어 텍스트, русский текст, العربية, हिन्दी, ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🦊 e\u0301 \u00e9 ﬁ ½ Å Ω",
    "def f(x):\n    return x ** 2  # comment\n\tif True:\n\t\tpass",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9\\n"}',
    "\u200b\ufeff\u00a0\u2028\u0085\x00\x1f\x7f",
    "\ufffd \U0010fffe 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \ue000",
    "<think> </think> <tool_call> [INST] <s> </s> <0x41> ▁",
)
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCXYZ0123456789",
    " \n\t\r  ",
    ".,;:!?'\"()[]{}<>|/\\#@*_-",
    "éàüñçßøæœ",
    "日本語中文字漢한국어ไทย",
    "абвгд אבג عرب हिन",
    "👩\u200d🏳️🌈🦊😀\u0301\u200b\ufffd",
    ("the ", " of", "ing", "'s", "'LL", "  ", "\n\n", "1000", " ▁", "<0x0A>"),
)


def _talk(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <b>&"}}}
TOLD = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city, in <°C> & 'mm'.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CHATS: tuple[list[dict[str, Any]], ...] = (
    _talk("Hello"),
    _talk("Hello", system="Be brief."),
    _talk("Hello", "Hi there.", "  How are you?\n\n"),
    _talk("Hallo Zürich 日本 🦊", "é", "x", "y", "z", system="  Two\n lines & <b> 'quotes'\n"),
    _talk("What is 2 + 2?", "<think>\nIt is 4.\n</think>\n\nFour.", "Sure?"),
    _talk("Go on", "I was say"),
)
CALLS: tuple[list[dict[str, Any]], ...] = tuple(
    [
        *_talk("The weather?", system="Be brief."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"celsius": 7}', "name": "weather", "tool_call_id": "1"},
        {"role": "user", "content": "And now?"},
    ]
    for call in (CALL, TOLD)
)
