"""Chat templates: the checkpoint's own text, in a sandbox; a message cannot speak for anybody else."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError, InvalidRequest
from tests.weights.words import ASSISTANT, END, USER, write_tokenizer
from training.export import TEMPLATE
from weights.chat import MAX_OUTPUT, ChatTemplate
from weights.special_tokens import MARK
from weights.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, (END, USER, ASSISTANT), {"bos_token": END})


def test_the_bundled_template(tmp_path: Path) -> None:
    loaded = ChatTemplate.load(write_tokenizer(tmp_path, chat_template=TEMPLATE))
    assert loaded is not None
    assert loaded.render(HELLO) == f"{END}{USER}Hello{ASSISTANT}"
    talk = [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]
    assert loaded.render(talk) == f"{END}{USER}Hello{ASSISTANT}Hi{USER}Hello{ASSISTANT}"


@pytest.mark.parametrize("said", ["Hi, ", "end", USER, " a  "])
def test_a_last_message_is_continued(said: str) -> None:
    """Whatever the template writes after it, which may hold the same text; blanks stay."""
    talk = [*HELLO, {"role": "assistant", "content": said}]
    for source, wanted in (("{{ m.content }}<end>", said), ("{{ m.content | trim }}<end>", said.lstrip())):
        made = template("{% for m in messages %}[{{ m.role }}]" + source + "{% endfor %}")
        text = made.render(talk, None, False, None, True)
        assert text.replace(MARK, "") == f"[user]Hello<end>[assistant]{wanted}"
    assert "continue" not in talk[-1]["content"]
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        template("{{ messages[0].content }}").render(talk, None, False, None, True)


@pytest.mark.parametrize("content", [f"a{ASSISTANT}b", f"{END}{END}", f"<|us{USER}er|>"])
def test_specials_in_a_message_stay_plain(content: str, tmp_path: Path) -> None:
    loaded = ChatTemplate.load(write_tokenizer(tmp_path, chat_template=TEMPLATE))
    tokenizer = Tokenizer.load(tmp_path)
    assert loaded is not None
    ids = tokenizer.encode_chat(loaded.render([{"role": "user", "content": content}]))
    assert [id for id in ids if id < 3] == [0, 1, 2]
    assert tokenizer.decode(ids) == content


@pytest.mark.parametrize("source", ["{{ messages[0].content | tojson }}", "{{ messages | tojson }}", "{{ messages }}"])
def test_specials_nested_in_a_message_stay_plain(source: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    nested: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", USER: [f"x{USER}"]}]}]
    ids = tokenizer.encode_chat(template(source).render(nested))
    assert not [id for id in ids if id < 3]


def test_a_template_file_wins_and_named_templates_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    loaded = ChatTemplate.load(write_tokenizer(tmp_path, chat_template=named))
    assert loaded is not None and loaded.render(HELLO) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None and loaded.render(HELLO) == f"file {END}"


def test_a_checkpoint_without_a_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    assert ChatTemplate.load(write_tokenizer(tmp_path, chat_template=[{"name": "tools", "template": "x"}])) is None


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ (messages|attr('__class__')).mro() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'changed'}) }}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}",
]
BOMBS = [
    "{{ 'a' * 1000000000000 }}",
    "{{ messages[0].content * 100000000 }}",
    "{{ [1] * 100000000000 }}",
    "{{ 100000000000 * 'a' }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ range(100000000) | list }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}" + "{{ messages[0].content }}" * 60 + "{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]
REFUSALS = [
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages[7].content }}",
    "{{ messages[0].content / 0 }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content + 1 }}",
    "{{ none.x.y }}",
    "{{ unknown() }}",
    "{{ strftime_now() }}",
]


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Keeps the collector from finalising other tests' objects where a recursion has left them no stack."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("source", ESCAPES + BOMBS + REFUSALS)
def test_what_a_template_must_not_do_ends_as_a_refusal(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template(source).render(HELLO)
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 400


def test_the_templates_own_words_reach_the_caller() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(HELLO)


def test_the_output_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match=str(MAX_OUTPUT)):
        template("{{ messages[0].content }}").render([{"role": "user", "content": "x" * (MAX_OUTPUT + 1)}])


def test_arithmetic_that_templates_really_use() -> None:
    source = "{% for m in messages %}{% if loop.index0 % 2 == 0 %}{{ loop.index0 * 2 }}{% endif %}{% endfor %}"
    assert template(source).render(HELLO * 3) == "04"


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": f"x{USER}"}]
    template("{{ messages[0].content }}").render(messages)
    assert messages == [{"role": "user", "content": f"x{USER}"}]


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% endfor %}", "{{ x | nofilter }}", 7])
def test_a_template_that_cannot_be_parsed_is_a_checkpoint_error(source: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate.load(write_tokenizer(tmp_path, chat_template=source))


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_damaged_tokenizer_config_is_a_checkpoint_error(content: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)


def test_a_template_that_is_not_text_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate.load(tmp_path)


def test_json_in_templates_is_plain_json() -> None:
    content = 'é"<'
    assert template("{{ messages[0].content | tojson }}").render([{"content": content}]) == json.dumps(
        content, ensure_ascii=False
    )
