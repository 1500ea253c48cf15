"""The command as a process: standard streams that are closed, full or not read, and what is found before loading."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import httpx
import pytest

from server.http.listening import CannotListen, listen
from tests.server.harness import eventually

# The whole command around an engine process without tensors.
SERVE = textwrap.dedent("""
    import functools, os, sys
    from engine.process.client import EngineClient
    import server.serve as serve
    {extra}
    serve.EngineClient = functools.partial(EngineClient, command=(sys.executable, "-m", "tests.engine.fake"))
    from server.cli import main
    sys.argv[0] = "moedial"
    main()
""")
FLOOD = textwrap.dedent("""
    import logging
    from server.service import Service
    def loud(self, of=Service.boot):
        for number in range(5_000):
            logging.getLogger("server").info("%d %s", number, "x" * 1000)
        return of(self)
    Service.boot = loud
""")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(shell: str = "", extra: str = "", **streams: int | None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server behind a shell's redirections, and its address. It may be ready or not."""
    port = free_port()
    command = [sys.executable, "-c", SERVE.format(extra=extra), "serve", "--port", str(port)]
    wrapped = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    process = subprocess.Popen(wrapped, **streams)  # type: ignore[call-overload]
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def ends_well(process: subprocess.Popen[bytes]) -> bool:
    process.send_signal(signal.SIGTERM)
    return process.wait(20) == 0


def test_a_server_without_standard_streams_starts_and_stops() -> None:
    """With the numbers 0 to 2 free, an engine's socket had one of them, and its process ended at once."""
    with serving("<&- >&- 2>&-") as (process, url):
        eventually(lambda: is_ready(url), 60)
        assert ends_well(process)


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe with no room left."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    return reader, writer


def test_readers_of_the_log_and_of_the_ready_text_that_stop_cost_log_lines_and_nothing_else() -> None:
    unread, full = full_pipe()
    with serving(extra=FLOOD, stderr=subprocess.PIPE, stdout=full) as (process, url):
        eventually(lambda: is_ready(url), 60)
        shown = httpx.get(f"{url}/metrics", timeout=10).text
        dropped = re.search(r"log_lines_dropped_total\{[^}]*\} ([\d.e+]+)", shown)
        assert dropped is not None and 1000 < float(dropped[1]) < 5000
        began = time.monotonic()
        assert ends_well(process) and time.monotonic() - began < 10
    os.close(unread)
    os.close(full)


def of_python(code: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], **streams)  # type: ignore[call-overload, no-any-return]


def test_a_log_reader_that_is_late_finds_whole_lines_and_how_many_are_missing() -> None:
    code = """
import os, subprocess, sys, time
from server import standard_streams as streams
streams.END_SECONDS = 30
pump = streams.StderrPump(lambda count: f"{count} missing", capacity=100_000)
for number in range(1_000):
    print("line", number, "x" * 1000, "end", file=sys.stderr)
subprocess.run([sys.executable, "-c", "import sys; print('line of a child end', file=sys.stderr)"])
other = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # has the stream as well
print("written", flush=True)
os.read(0, 1)
print("line last end", file=sys.stderr)
began = time.monotonic()
pump.close()
other.kill()
sys.exit(time.monotonic() - began > 20)
"""
    with of_python(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == b"written\n"
        process.stdin.write(b"!")
        process.stdin.close()
        *lines, last = process.stderr.read().decode().splitlines()
        assert process.wait(20) == 0
    missing = [int(line.split()[0]) for line in lines if line.endswith(" missing")]
    kept = [line for line in lines if line.startswith("line") and line.endswith("end")]
    assert len(kept) + len(missing) == len(lines) and len(kept) + sum(missing) == 1001 and sum(missing) > 500
    assert last == "line last end" or last.endswith(" missing")


def test_a_text_for_a_reader_who_has_gone_or_does_not_read_is_given_up() -> None:
    reader, writer = full_pipe()
    code = "from server.standard_streams import say; say('ready'); say('ready')"
    with of_python(code, stdout=writer, stderr=subprocess.PIPE) as process:
        assert process.wait(20) == 0 and process.stderr is not None and process.stderr.read() == b""
    os.close(reader)
    with of_python(f"{code}; import time; time.sleep(0.1)", stdout=writer, stderr=subprocess.PIPE) as process:
        assert process.wait(20) == 0 and process.stderr is not None and process.stderr.read() == b""
    os.close(writer)


def test_an_address_that_cannot_be_had_is_one_sentence_before_anything_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = f"cannot listen on 127.0.0.1 port {port}: address already in use; another process"
        command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--model", "nowhere"]
        ended = subprocess.run([*command, "--port", port], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.startswith("moedial: ") and words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("nowhere.invalid", "cannot listen on 'nowhere.invalid': no address of that name"),
        ("203.0.113.7", "this machine does not have that address"),
    ],
)
def test_a_host_that_is_not_here_is_refused_by_name(host: str, words: str) -> None:
    with pytest.raises(CannotListen, match=re.escape(words)):
        listen(host, 0)


def test_a_name_with_several_addresses_is_heard_at_all_of_them_on_one_port() -> None:
    sockets = listen("localhost", 0)
    try:
        assert len({opened.getsockname()[1] for opened in sockets}) == 1
        for opened in sockets:
            socket.create_connection(opened.getsockname()[:2], timeout=5).close()
    finally:
        for opened in sockets:
            opened.close()
