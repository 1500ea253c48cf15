"""Templates as checkpoints ship them: where they lie, what they may use, and that transformers would write the same."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from model.errors import CheckpointError, InvalidRequest
from tests.weights.pieces import ROLE, THINK, write_pieces
from tests.weights.reference_chats import CALLS, CHATS, TOOLS
from weights.chat import ChatTemplate
from weights.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
LIKE_REAL_ONES = [
    "{%- for m in messages %}\n    {{- '<' + m.role + '>' + m.content|default('') | trim }}\n{%- endfor %}\n\n",
    "{% for m in messages %}\n  {% if loop.first %}\n 1st\n  {% continue %}\n {% endif %}\n{{ m.role }}\n{% endfor %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m }}{% endfor %}",
    "{% set x = 1 %}{% generation %}\n  {{ messages[0].role }}{% set x = 2 %}{{ x }}\n{% endgeneration %}\n{{ x }}",
    "{% for m in messages %}{% generation %}{{ m.role }}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "{% if tools is defined and tools is not none %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}",
    "{{ tools | tojson(indent=4) }}",
    "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ messages | tojson(ensure_ascii=true) }}{{ messages | tojson(true) }}",
    "{{ messages[0].get('content', 'none') ~ messages[-1]['role'].upper() }}{{ documents is none }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ '-' * 20 }}",
    "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages[::-1] %}{{ say(m) }}{% endfor %}",
    "{% if add_generation_prompt %}go{% endif %}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}",
    "{{ strftime_now('%d %b %Y') }}{{ dict(a=1) | tojson }}{{ messages | map(attribute='role') | join(',') }}",
    "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{{ m }}{% endfor %}",
]


@pytest.mark.parametrize("source", LIKE_REAL_ONES)
def test_a_template_writes_what_it_writes_in_transformers(source: str) -> None:
    ours = ChatTemplate(source, ("<unused>",), {})
    for messages in (*CHATS, *CALLS):
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for tools in (None, TOOLS):
            for options in ({}, {"add_generation_prompt": True, "enable_thinking": False}):
                theirs = render_jinja_template([plain], tools=tools, chat_template=source, **options)[0][0]
                thinking = {name: value for name, value in options.items() if name == "enable_thinking"}
                assert ours.render(messages, tools, bool(options), thinking) == theirs


def test_the_date_is_the_local_one() -> None:
    written = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", (), {}).render(HELLO)
    assert written in {str(datetime.now().date()), written} and len(written) == 10
    assert abs((datetime.now() - datetime.fromisoformat(written)).days) <= 1


def loaded(folder: Path, **config: Any) -> ChatTemplate:
    chat = ChatTemplate.load(write_pieces(folder, "prepend", **config))
    assert chat is not None
    return chat


def test_where_templates_lie_and_which_wins(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config with tools"}]
    assert loaded(tmp_path, chat_template=named).render(HELLO) == "config"
    assert loaded(tmp_path, chat_template=named).render(HELLO, TOOLS) == "config with tools"
    assert loaded(tmp_path, chat_template={"default": "a", "tool_use": "b"}).render(HELLO, TOOLS) == "b"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert loaded(tmp_path, chat_template=named).render(HELLO, TOOLS) == "legacy"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}{{ eos_token }}\n")
    assert loaded(tmp_path, chat_template=named).render(HELLO, TOOLS) == "file <s></s>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file with tools")
    assert loaded(tmp_path, chat_template=named).render(HELLO, TOOLS) == "file with tools"
    assert loaded(tmp_path, chat_template=named).render(HELLO) == "file <s></s>"


def test_token_names_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "<unk>"}, "eos_token": "x"}))
    assert loaded(tmp_path, chat_template="{{ unk_token }}{{ eos_token }}").render(HELLO) == "<unk></s>"


@pytest.mark.parametrize("value", [7, [{"name": "default"}], ["x"], {"default": 1}, "{% generation %}", "{% break %}"])
def test_what_is_no_template_is_a_checkpoint_error(value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="template"):
        loaded(tmp_path, chat_template=value)


TALK = "{% for m in messages %}" + ROLE + "{{ m.content }}</s>{% endfor %}{{ tools }}{{ mood }}{# " + THINK + " #}"


def role_and_end(folder: Path, source: str, messages: list[dict[str, Any]], **options: Any) -> tuple[int, int, int]:
    """How often the role token, the end and THINK come out as tokens."""
    chat, tokenizer = loaded(folder, chat_template=source), Tokenizer.load(folder)
    ids = tokenizer.encode_chat(chat.render(messages, **options))
    role, think = (ids.count(tokenizer.vocabulary - n) for n in (2, 1))
    return role, ids.count(2), think


def test_a_user_cannot_write_the_templates_tokens(tmp_path: Path) -> None:
    """Special or not: a role token that is not special would let a user speak for others."""
    typed = f"a{ROLE}b</s>{THINK}"
    for role in ("user", "tool"):
        assert role_and_end(tmp_path, TALK, [{"role": role, "content": typed}]) == (1, 1, 1)  # THINK is not in it
        assert role_and_end(tmp_path, TALK + THINK, [{"role": role, "content": typed}]) == (1, 1, 1)
    options: dict[str, Any] = {"tools": [{"name": "</s>"}], "variables": {"mood": typed}}
    assert role_and_end(tmp_path, TALK, HELLO, **options) == (1, 1, 1)


def test_an_assistants_own_words_keep_their_tokens_but_the_special_ones(tmp_path: Path) -> None:
    """Templates look for <think> in what an assistant said."""
    source = TALK + "{{ '" + THINK + "' in messages[0].content }}"
    for role in ("assistant", "system"):
        assert role_and_end(tmp_path, source, [{"role": role, "content": f"{THINK}x</s>"}]) == (1, 1, 1)
    chat = loaded(tmp_path, chat_template=source)
    assert chat.render([{"role": "assistant", "content": THINK}]).endswith("True")


def test_marks_survive_escaped_json(tmp_path: Path) -> None:
    source = "{{ messages | tojson(ensure_ascii=true) }}"
    assert role_and_end(tmp_path, source, [{"role": "user", "content": "é</s>"}])[1] == 0
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode_chat(loaded(tmp_path, chat_template=source).render([{"content": "é</s>"}]))
    assert tokenizer.decode(ids) == '[{"content": "\\u00e9</s>"}]'


def test_null_is_left_out_and_variables_are_the_callers() -> None:
    chat = ChatTemplate("{{ messages[0] }}{{ bos_token }}{{ x }}", (), {"bos_token": "B"})
    assert chat.render([{"role": "assistant", "content": None}]) == "{'role': 'assistant'}B"
    assert chat.render([{"content": "a"}], variables={"x": 7}) == "{'content': 'a'}B7"
    assert chat.render(HELLO, variables={"messages": [1]}) == chat.render(HELLO)


@pytest.mark.parametrize("source", ["{{ '-' * 70000 }}", "{{ 70000 * '-' }}", "{{ [1] * 2 }}", "{{ strftime_now(1) }}"])
def test_bounds_hold(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, (), {}).render(HELLO)
