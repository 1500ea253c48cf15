"""A chat template may cost its own process's time and memory, and nothing of the server's."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from model.errors import CheckpointError, InvalidRequest
from server.requests import templates
from server.requests.templates import SandboxedTemplate
from tests.weights.reference_chats import CALLS, CHATS, TOOLS
from tests.weights.words import USER, write_tokenizer
from weights.chat import ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]
BOMB = [{"role": "user", "content": "bomb"}]
CALM = "{% if messages[0].content == 'bomb' %}BOMB{% else %}calm{% endif %}"
SHORT = 0.5


def loaded(folder: Path, source: str) -> SandboxedTemplate:
    made = SandboxedTemplate.load(write_tokenizer(folder, chat_template=source))
    assert made is not None
    return made


def test_it_renders_what_the_template_renders(tmp_path: Path) -> None:
    source = "{{ messages | tojson }}{{ tools }}{{ add_generation_prompt }}{{ mood }}{{ eos_token }}"
    template, plain = loaded(tmp_path, source), ChatTemplate.load(tmp_path)
    assert plain is not None and template.source == plain.source and template.knows_tools
    for messages in (*CHATS, *CALLS, [{"content": f"a{USER}é😀\x00"}], [{"content": [10**40, 0.1, None, True]}]):
        for tools in (None, TOOLS):
            for variables in ({}, {"mood": 0.5}, {"mood": None}):
                asked: tuple[Any, ...] = (messages, tools, False, variables)
                assert template.render(*asked) == plain.render(*asked)
    assert not loaded(tmp_path, "x").knows_tools and not loaded(tmp_path, "x").knows_thinking
    assert loaded(tmp_path, "{{ enable_thinking }}").knows_thinking
    assert SandboxedTemplate.load(write_tokenizer(tmp_path, chat_template=[{"name": "tools", "template": "x"}])) is None


TIME = ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"]
MEMORY = [
    "{{ messages[0].content.ljust(4000000000) | length }}",
    "{{ messages[0].content | center(4000000000) | length }}",
    "{% set n = namespace(s='a') %}{% for a in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
    "{% set n = namespace(s=['a']) %}{% for a in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s | length }}",
    "{{ (('a' * 60000) | list | join('b' * 60000)) | length }}",
    "{{ '{:>4000000000}'.format(messages[0].content) | length }}",
]


@pytest.mark.parametrize("bomb", TIME + MEMORY)
def test_a_bomb_ends_as_its_requests_refusal(bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", SHORT if bomb in TIME else 20.0)
    template = loaded(tmp_path, CALM.replace("BOMB", bomb))
    with pytest.raises(
        InvalidRequest, match=r"longer than 0\.5 s" if bomb in TIME else "1024 MB|refuses|ended"
    ) as caught:
        template.render(BOMB)
    assert caught.value.param == "messages"
    assert template.render(HELLO) == "calm"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3_000_000  # kB: none of it was here


def test_a_template_is_tried_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as logged:
        refusing = loaded(tmp_path, "{{ raise_exception('a system message comes first') }}")
    assert "a system message comes first" in logged[0]["reason"] and logged[0]["log_level"] == "warning"
    with pytest.raises(InvalidRequest, match="a system message comes first"):
        refusing.render(HELLO)
    monkeypatch.setattr(templates, "CPU_SECONDS", SHORT)
    with pytest.raises(CheckpointError, match=r"cannot render one message: it took longer than 0\.5 s"):
        loaded(tmp_path, TIME[0])


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{{ x | nofilter }}", 7])
def test_what_cannot_be_parsed_is_a_checkpoint_error(source: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the chat template cannot be parsed"):
        loaded(tmp_path, source)


def test_a_process_that_died_is_replaced(tmp_path: Path) -> None:
    template = loaded(tmp_path, "{{ messages[0].content }}")
    for status in (signal.SIGKILL, signal.SIGSEGV):
        process = template._idle[0]._process
        os.kill(process.pid, status)
        process.wait(10)
        assert template.render(HELLO) == "Hello"


def test_a_process_that_stands_still_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 0.1)
    template = loaded(tmp_path, "{{ messages[0].content }}")
    os.kill(template._idle[0]._process.pid, signal.SIGSTOP)
    with pytest.raises(InvalidRequest, match="longer than"):
        template.render(HELLO)
    monkeypatch.setattr(templates, "CPU_SECONDS", 5.0)
    assert template.render(HELLO) == "Hello"


def test_nesting_is_refused_and_not_survived_by_chance(tmp_path: Path) -> None:
    template = loaded(tmp_path, "{{ messages[0].content }}")
    for depth in (900, 5_000, 200_000):
        nested: Any = "x"
        for _ in range(depth):
            nested = [nested]
        with pytest.raises(InvalidRequest, match=r"nested too deeply|recursion"):
            template.render([{"role": "user", "content": nested}])
        assert template.render(HELLO) == "Hello"


def test_it_ends_with_the_server(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="x")
    code = """
import os, signal, sys
from pathlib import Path
from server.requests.templates import SandboxedTemplate
print(SandboxedTemplate.load(Path(sys.argv[1]))._idle[0]._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(done.stdout)}/cmdline").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{int(done.stdout)}/stat").read_text().rpartition(")")[2].split()[0]:
            return
        time.sleep(0.02)
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_it_is_light(tmp_path: Path) -> None:
    """Neither torch nor the web framework is in it."""
    template = loaded(tmp_path, "x")
    maps = Path(f"/proc/{template._idle[0]._process.pid}/maps").read_text()
    assert "torch" not in maps and "uvloop" not in maps
