"""Whatever a grammar lets a model write, the parser finds the calls in it: drawn at random, token by token."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import server.dialects.grammar as grammar
from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Dialect, Reasoning, ToolSpec
from server.dialects.detect import detect, dialect_named
from tests.server.dialects.families import FAMILIES, SPECIALS, read

BUNDLED = Path("weights/bundled/infinity-stories/tokenizer.json")
EOS, FIRST = 0, 300  # ids: the end, and the first of the tokens that a test adds
DRAWS = 24
TOOLS = (
    ToolSpec("now"),
    ToolSpec("any", {}),
    ToolSpec(
        'w/eird "näme" #\'{}%json',
        {"properties": {"on": {"type": "boolean"}, "of": {"enum": ["C", 'F"']}}, "required": ["on"]},
    ),
    ToolSpec(
        "tree",
        {
            "type": "object",
            "$defs": {"node": {"type": "object", "properties": {"leaf": {"type": "integer"}}, "required": ["leaf"]}},
            "properties": {"root": {"$ref": "#/$defs/node"}, "tags": {"type": "array", "items": {"type": "string"}}},
            "required": ["root", "tags"],
            "additionalProperties": False,
        },
    ),
)
DELIMITERS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "</")


@dataclass(frozen=True)
class Case:
    """A dialect, a prompt, and the tokens that the checkpoint has beside bytes: special ones and merely added ones."""

    dialect: Dialect
    prompt: str = ""
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def of(name: str, prompt: str = "", template: str | None = None, tokens: tuple[str, ...] | None = None) -> Case:
    tokens = SPECIALS.get(name, ()) if tokens is None else tokens
    return Case(dialect_named(name, ids(tokens), {}, template), prompt, tokens)


def ids(tokens: tuple[str, ...]) -> dict[str, int]:
    return {token: FIRST + i for i, token in enumerate(tokens)}


BEGUN = "<|start|>assistant"
CASES = {
    "plain": of("plain"),
    "hermes": of("hermes"),
    "hermes-added": Case(dialect_named("hermes", {}, ids(DELIMITERS)), added=DELIMITERS),
    "hermes-special": of("hermes", tokens=DELIMITERS),
    "hermes-opened": of("hermes", "<think>\n"),
    "hermes-closed": of("hermes", "<think>\n\n</think>\n\n"),
    "hermes-thoughtless": Case(detect("<tool_call>", {})),
    "mistral-array": of("mistral", "", "<think>", ("[TOOL_CALLS]",)),
    "mistral-named": of("mistral"),
    "mistral-opened": of("mistral", "[THINK]"),
    "llama": of("llama"),
    "deepseek-v3": Case(detect("<｜tool▁calls▁begin｜> ```json <think>", {}), "<think>\n"),
    "deepseek-added": Case(dialect_named("deepseek", {}, ids(DELIMITERS)), added=DELIMITERS),
    "deepseek-v3.1": of("deepseek", "</think>"),
    "harmony": of("harmony", BEGUN),
    "harmony-opened": of("harmony", f"{BEGUN}<|channel|>analysis<|message|>"),
    "harmony-text": of("harmony", BEGUN, None, ()),
}
cases = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.usefixtures("short_reasoning")


@pytest.fixture
def short_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_REASONING", 30)


@cache
def tokenizer(special: tuple[str, ...], added: tuple[str, ...]) -> tuple[Tokenizer, LLTokenizer, frozenset[int]]:
    """Bytes and these tokens, or the bundled one where there are none; last, its tokens that tend to end JSON."""
    made = made_of(special, added) if special or added else Tokenizer.from_file(str(BUNDLED))
    closing = frozenset(i for i in range(made.get_vocab_size()) if set(made.decode([i])) & set('"}]'))
    return made, LLTokenizer(made.to_str(), n_vocab=made.get_vocab_size(), eos_token=EOS), closing


def made_of(special: tuple[str, ...], added: tuple[str, ...]) -> Tokenizer:
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    vocabulary = {"<eos>": EOS, **letters} | {f"<unused{i}>": i for i in range(257, FIRST)}
    made = Tokenizer(models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<eos>", *special)])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    assert [made.token_to_id(token) for token in (*special, *added)] == list(range(FIRST, made.get_vocab_size()))
    return made


def matcher(text: str, case: Case) -> LLMatcher:
    made = LLMatcher(tokenizer(case.special, case.added)[1], LLMatcher.grammar_from_lark(text))
    assert not made.get_error(), made.get_error()
    return made


def draw(text: str, case: Case, seed: int, longest: int = 3000) -> str:
    """One answer that the grammar allows. It leans to what closes strings, lists and answers, so that it ends."""
    backend, _, closing = tokenizer(case.special, case.added)
    m, rng, out = matcher(text, case), random.Random(seed), list[int]()
    while len(out) < longest:
        bits = np.unpackbits(np.frombuffer(m.compute_bitmask(), np.uint8), bitorder="little")
        choices = np.flatnonzero(bits).tolist()
        if choices == [EOS] or (EOS in choices and rng.random() < 0.4):
            return backend.decode(out, skip_special_tokens=False)
        choices = [token for token in choices if token != EOS]
        if rng.random() < 0.5:
            choices = [token for token in choices if token in closing] or choices
        if rng.random() < 0.3:  # tokens that are delimiters, where there are any
            choices = [token for token in choices if token >= FIRST] or choices
        out.append(rng.choice(choices))
        assert m.consume_token(out[-1]), m.get_error()
    raise AssertionError("the answer does not end: " + backend.decode(out))


def accepts(text: str, case: Case, answer: str) -> bool:
    m = matcher(text, case)
    ids = tokenizer(case.special, case.added)[0].encode(answer, add_special_tokens=False).ids
    return m.try_consume_tokens(ids) == len(ids) and m.is_accepting()


def tools_of(case: Case) -> tuple[ToolSpec, ...]:
    """Where a name stands bare it has no spaces."""
    quoted = case.dialect.name in ("plain", "hermes", "llama") or case is CASES["mistral-array"]
    return TOOLS if quoted else tuple(tool for tool in TOOLS if " " not in tool.name)


def calls_in(parts: list[DeltaPart]) -> Iterator[tuple[str, str]]:
    for i, part in enumerate(parts):
        if isinstance(part, CallStart):
            following = parts[i + 1]
            assert isinstance(following, CallArguments)
            yield part.name, following.text


def check(calls: list[tuple[str, str]], tools: Mapping[str, ToolSpec]) -> None:
    for name, arguments in calls:
        value = json.loads(arguments)
        assert isinstance(value, dict)
        jsonschema_rs.validate(dict(tools[name].parameters), value)


@cases
@pytest.mark.parametrize("parallel", [True, False])
def test_what_the_grammar_allows_is_read_as_calls(name: str, parallel: bool) -> None:
    case, counts, called = CASES[name], set(), set()
    dialect, tools = case.dialect, {tool.name: tool for tool in tools_of(case)}
    text = dialect.call_grammar(case.prompt, tuple(tools.values()), parallel)
    for seed in range(DRAWS):
        answer = draw(text, case, seed)
        parts = read(dialect, answer, case.prompt, tuple(tools.values()), size=1 + seed % 9)
        assert not [part for part in parts if isinstance(part, Content)], answer
        calls = list(calls_in(parts))
        check(calls, tools)
        counts.add(len(calls))
        called |= {name for name, _arguments in calls}
    assert called == set(tools)
    assert counts == {1} if not parallel or dialect.name == "harmony" else counts > {1} and 0 not in counts


@cases
def test_reasoning_come_first_where_the_family_thinks(name: str) -> None:
    case = CASES[name]
    text = case.dialect.answer_grammar(case.prompt, 'answer: "Yes"')
    reasoning = set()
    for seed in range(DRAWS):
        parts = read(case.dialect, draw(text, case, seed), case.prompt, ())
        assert parts[-1] == Content("Yes")
        assert all(isinstance(part, Reasoning) for part in parts[:-1])
        reasoning.add(len(parts) > 1)
    never = name in ("plain", "hermes-closed", "hermes-thoughtless", "llama", "deepseek-v3.1")
    assert (True in reasoning) is not never


def test_rules_of_answers_keep_their_names() -> None:
    rules = f'answer: less | LESS\nless: %json {json.dumps({"enum": [1]})}\nLESS: "2" | GAP\nGAP: "3"'
    for case in CASES.values():
        text = case.dialect.answer_grammar(case.prompt, rules)
        answers = [read(case.dialect, draw(text, case, seed), case.prompt, ())[-1] for seed in range(DRAWS)]
        assert set(answers) == {Content("1"), Content("2"), Content("3")}


def test_plain_answers_are_the_rules_only() -> None:
    text = dialect_named("plain", {}).answer_grammar("<think>", 'answer: "a"')
    assert text.split() == ["start:", "answer", "answer:", '"a"']


@cases
def test_free_text_holds_no_call(name: str) -> None:
    """Any text but one with the beginning of a call; what is drawn is read as content."""
    case = CASES[name]
    grammar = case.dialect.answer_grammar(case.prompt, case.dialect.free_text_rules())
    written = next(w for w in FAMILIES if w.id.startswith(case.dialect.name))
    called = f"Oh {'<|python_tag|>' if case.dialect.name == 'llama' else written.calls([('add', '{}')])}"
    if not case.prompt:
        assert accepts(grammar, case, written.content("Hello <b>, [1] and\n\nmore."))
    assert not accepts(grammar, case, called)
    for seed in range(8):
        parts = read(case.dialect, draw(grammar, case, seed, 20_000), case.prompt, TOOLS)
        assert not list(calls_in(parts))


def test_a_harmony_answer_that_the_prompt_began() -> None:
    text = CASES["harmony"].dialect.answer_grammar("<|start|>assistant<|channel|>final<|message|>", 'answer: "a"')
    assert accepts(text, CASES["harmony"], "a") and accepts(text, CASES["harmony"], "a<|return|>")


def test_json_is_compact_or_usual_and_nothing_else() -> None:
    tool = ToolSpec("t", {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]})
    text = dialect_named("hermes", {}).call_grammar("", [tool], False)
    for arguments in ('{"a": 1, "b": [1, 2]}', '{"a":1,"b":[1,2]}'):
        assert accepts(text, CASES["hermes"], f'<tool_call>\n{{"name": "t", "arguments": {arguments}}}\n</tool_call>')
    for arguments in ('{"a":  1,"b":2}', '{ "a": 1,"b":2}', '{"a": 1,\n"b":2}', '{"a": 1, "b": 2, "c": 3}', '{"a": 1}'):
        assert not accepts(
            text, CASES["hermes"], f'<tool_call>\n{{"name": "t", "arguments": {arguments}}}\n</tool_call>'
        )


def test_reasoning_is_bounded_and_ends_at_its_delimiter() -> None:
    text = dialect_named("hermes", {}).call_grammar("", [ToolSpec("t")], False)
    call = '<tool_call>\n{"name": "t", "arguments": {}}\n</tool_call>'
    for reasoning in ("", "a < b", "x" * 30):
        assert accepts(text, CASES["hermes"], f"<think>{reasoning}</think>\n\n{call}")
    for reasoning in ("x" * 31, "a</think>b"):
        assert not accepts(text, CASES["hermes"], f"<think>{reasoning}</think>\n\n{call}")
    assert accepts(text, CASES["hermes"], call)


def test_schemas_cannot_write_grammar() -> None:
    name = 'x" | "y\nstart: "z"'
    schema = {
        "properties": {'"}\nstart: "q"': {"const": '"}\nmoe_calls: "q"'}},
        "x-guidance": {"whitespace_flexible": True},
    }
    text = dialect_named("hermes", {}).call_grammar("", [ToolSpec(name, schema)], False)
    arguments = json.dumps({'"}\nstart: "q"': '"}\nmoe_calls: "q"'})
    assert accepts(
        text, CASES["hermes"], f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
    )
    assert not accepts(text, CASES["hermes"], "z") and not accepts(text, CASES["hermes"], "q")


def test_keywords_that_cannot_be_enforced_do_not_stop_a_call() -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}, "format": "colour"}}, "oneOf": [{}, {}]}
    assert matcher(dialect_named("plain", {}).call_grammar("", [ToolSpec("t", schema)], True), CASES["plain"])


@pytest.mark.parametrize("name", ["hermes", "harmony"])
def test_a_call_needs_a_tool(name: str) -> None:
    with pytest.raises(ValueError, match="at least one tool"):
        dialect_named(name, {}).call_grammar("", (), True)
