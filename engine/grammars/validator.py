"""The grammar validator: a process that tries to compile a grammar, and is killed if it takes too long.

The library limits most of what a grammar may cost, but not all (deciding whether a conjunction of patterns is empty may
take hours), and a thread cannot be stopped. `python -m engine.grammars.validator TOKENIZER VOCABULARY END…` reads
grammars on standard input and answers on standard output.
"""

import resource
import select
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine import parent
from engine.environment import child_environment
from weights.small_files import TOKENIZER, small_files

LIMITS = LLParserLimits(
    max_grammar_size=200_000,
    max_lexer_states=20_000,  # about 10 MB
    step_max_items=10_000,  # an object of 300 optional properties takes 5,000
    verbose_errors=False,
)
SECONDS = 1.0  # for one grammar
START_SECONDS = 60.0  # for the process to start and load the tokenizer
MEMORY = 4 << 30  # bytes of address space
SIZE = struct.Struct("<I")


class ValidationTimeout(Exception):
    """A grammar was not validated in time, or the validator process ended."""


class GrammarValidator:
    """The engine's end of the validator process. Use from one thread, which must live as long as the process does."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: list[int]) -> None:
        self._command = [sys.executable, "-m", "engine.grammars.validator", tokenizer, str(vocabulary), *map(str, ends)]
        self._process: subprocess.Popen[bytes] | None = None

    def validate(self, grammar: str) -> str:
        """What is wrong with a grammar; empty if it is valid.

        Raises:
            ValidationTimeout: there was no answer in time, or the process ended.
        """
        text = grammar.encode("utf-8", "replace")
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            process.stdin.write(SIZE.pack(len(text)) + text)
            process.stdin.flush()
            answer = self._answer(process, SECONDS)
        except (OSError, EOFError) as error:
            self._stop()
            raise ValidationTimeout(str(error) or "compiling it failed, perhaps for lack of memory") from None
        if answer is None:
            self._stop()
            raise ValidationTimeout(f"it was not compiled within {SECONDS:g} s")
        return answer

    def _start(self) -> "subprocess.Popen[bytes]":
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, env=child_environment())
        if self._answer(self._process, START_SECONDS) is None:
            raise EOFError("the compiler did not begin in time")
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _answer(self, process: "subprocess.Popen[bytes]", seconds: float) -> str | None:
        """The process's next answer; None if it does not come in time. Raises EOFError if the process has ended."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            return None
        return _read(process.stdout)


def _read(stream: IO[bytes]) -> str:
    head = stream.read(SIZE.size)
    if len(head) < SIZE.size:
        raise EOFError
    return stream.read(SIZE.unpack(head)[0]).decode()


def _write(text: str) -> None:
    data = text.encode()
    sys.stdout.buffer.write(SIZE.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def main() -> None:
    parent.die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    path, vocabulary, *ends = sys.argv[1:]
    text = small_files(Path(path)).text(TOKENIZER)
    tokenizer = LLTokenizer(text, n_vocab=int(vocabulary), eos_token=[int(end) for end in ends])
    _write("")
    try:
        while True:
            matcher = LLMatcher(tokenizer, _read(sys.stdin.buffer), log_level=0, limits=LIMITS)
            possible = matcher.is_error() or any(matcher.compute_bitmask())
            _write(matcher.get_error() if matcher.is_error() or possible else "nothing can match it")
    except EOFError:
        return


if __name__ == "__main__":
    main()
