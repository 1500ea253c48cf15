"""What models of every family write: an entry each, with dialect, calls and reasoning. It checks nothing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Dialect, Reasoning, ToolSpec
from server.dialects.detect import dialect_named

SPECIALS = {
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
    "llama": ("<|python_tag|>", "<|eom_id|>", "<|eot_id|>"),
    "harmony": ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
}
Call = tuple[str, str]  # name, the JSON text of the arguments
TOOLS = (ToolSpec("get_weather"), ToolSpec("add"))
WEATHER = ("get_weather", '{"city": "Köln", "say": "a \\"}{\\" b", "deep": {"x": [1, {"y": "<"}], "z": null}}')
ADD = ("add", '{"a":1,"b": -2.5e3}')


@dataclass(frozen=True)
class Family:
    """`calls` writes calls, `content` an answer's text, `reasoning` reasoning before either."""

    id: str
    dialect: Dialect
    calls: Callable[[Sequence[Call]], str]
    content: Callable[[str], str] = str
    reasoning: Callable[[str], str] = "<think>\n{}\n</think>\n\n".format
    opened: str = "<think>\n"  # the end of a prompt that opens the reasoning
    reopened: Callable[[str], str] = "{}\n</think>\n\n".format  # reasoning that the prompt opened


def specials(name: str, first: int = 300) -> dict[str, int]:
    return {token: first + i for i, token in enumerate(SPECIALS.get(name, ()))}


def _dialect(name: str) -> Dialect:
    return dialect_named(name, specials(name))


def _object(call: Call, key: str = "arguments") -> str:
    return f'{{"name": {json.dumps(call[0])}, "{key}": {call[1]}}}'


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_object(call)}\n</tool_call>" for call in calls)


def _mistral_array(calls: Sequence[Call]) -> str:
    return f"[TOOL_CALLS] [{', '.join(map(_object, calls))}]"


def _mistral_named(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)


def _mistral_ids(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]aB3456789[ARGS]{arguments}" for name, arguments in calls)


def _llama(calls: Sequence[Call]) -> str:
    return "; ".join(_object(call, "parameters") for call in calls)


def _llama_tagged(calls: Sequence[Call]) -> str:
    return "<|python_tag|>" + "\n".join(_object(call, "parameters") for call in calls)


def _deepseek(bodies: Sequence[str]) -> str:
    calls = "\n".join(f"<｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜>" for body in bodies)
    return f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>"


def _deepseek_fenced(calls: Sequence[Call]) -> str:
    return _deepseek([f"function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```" for name, arguments in calls])


def _deepseek_bare(calls: Sequence[Call]) -> str:
    return _deepseek([f"{name}<｜tool▁sep｜>{arguments}" for name, arguments in calls])


def _harmony(calls: Sequence[Call]) -> str:
    return "<|call|><|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"
        for name, arguments in calls
    )


def _harmony_role_first(calls: Sequence[Call]) -> str:
    return "<|call|><|start|>assistant".join(
        f" to=functions.{name}<|channel|>commentary json<|message|>{arguments}" for name, arguments in calls
    )


_BRACKETS = {"reasoning": "[THINK]{}[/THINK]".format, "opened": "[THINK]", "reopened": "{}[/THINK]".format}
_HARMONY = {
    "content": "<|channel|>final<|message|>{}".format,
    "reasoning": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant".format,
    "opened": "<|start|>assistant<|channel|>analysis<|message|>",
    "reopened": "{}<|end|><|start|>assistant".format,
}
FAMILIES = (
    Family("plain", _dialect("plain"), _hermes),
    Family("hermes", _dialect("hermes"), _hermes),
    Family("mistral-array", _dialect("mistral"), _mistral_array, **_BRACKETS),
    Family("mistral-named", _dialect("mistral"), _mistral_named, **_BRACKETS),
    Family("mistral-ids", _dialect("mistral"), _mistral_ids, **_BRACKETS),
    Family("llama", _dialect("llama"), _llama),
    Family("llama-tagged", _dialect("llama"), _llama_tagged),
    Family("deepseek-v3", _dialect("deepseek"), _deepseek_fenced),
    Family("deepseek-v3.1", _dialect("deepseek"), _deepseek_bare),
    Family("harmony", _dialect("harmony"), _harmony, **_HARMONY),
    Family("harmony-role", _dialect("harmony"), _harmony_role_first, **_HARMONY),
)
THINKING = FAMILIES[1:]
TAGGED = tuple(w for w in FAMILIES if not w.id.startswith(("harmony", "llama")))


def read(
    dialect: Dialect, text: str, prompt: str = "", tools: Sequence[ToolSpec] = TOOLS, size: int = 0
) -> list[DeltaPart]:
    """The parts of `text`, pushed whole or `size` characters at a time, with neighbours of one kind joined."""
    step = size or max(1, len(text))
    return read_chunks(dialect, [text[at : at + step] for at in range(0, len(text), step)], prompt, tools)


def read_chunks(dialect: Dialect, chunks: Sequence[str], prompt: str, tools: Sequence[ToolSpec]) -> list[DeltaPart]:
    parser = dialect.parser(prompt, tools)
    parts = [part for chunk in chunks for part in parser.push(chunk)]
    return joined([*parts, *parser.flush()])


def joined(parts: Sequence[DeltaPart]) -> list[DeltaPart]:
    out: list[DeltaPart] = []
    for part in parts:
        last = out[-1] if out else None
        assert isinstance(part, CallStart) or part.text, "an empty part"
        if isinstance(part, Content) and isinstance(last, Content):
            out[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            out[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and last.index == part.index:
            out[-1] = CallArguments(last.index, last.text + part.text)
        else:
            out.append(part)
    return out


def parts_of(calls: Sequence[Call]) -> list[DeltaPart]:
    return [part for i, (name, text) in enumerate(calls) for part in (CallStart(i, name), CallArguments(i, text))]
