"""Keys at the start: variables, lists and files that are accepted, refused and warned of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from server.access.keys import read_keys, warn_if_open
from server.access.sites import is_loopback
from server.configuration.variables import OTHER_VARIABLES, BadSetting
from server.settings import Settings
from tests.server.harness import in_memory, key_file

ROOT = Path(__file__).parents[3]
SECRET = "sk-very-secret-éà"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MOEDIAL_API_KEY", "MOEDIAL_API_KEYS"),
        ("moedial_apikeys", "MOEDIAL_API_KEYS"),
        ("MOEDIAL_APIKEYS_FILE", "MOEDIAL_API_KEYS_FILE"),
        ("MOEDIAL_MAX_BODY", "MOEDIAL_MAX_BODY_BYTES"),
        ("MOEDIAL_ZZZZ", "moedial serve --help"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    with pytest.raises(BadSetting) as caught:
        Settings()
    assert name in str(caught.value) and meant in str(caught.value) and SECRET not in str(caught.value)


def test_variables_of_others_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OTHER_VARIABLES, "MOEDIAL_SERVICE_HOST", "MOEDIAL_PORT_8000_TCP_ADDR", "MOEDIAL_SERVICE_PORT_HTTP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OTHER_API_KEY", "1")
    assert Settings().port == 8000


def test_the_list_of_other_variables_is_whole() -> None:
    """Every variable that any source names is a setting or in the list."""
    known = OTHER_VARIABLES | {f"MOEDIAL_{name.upper()}" for name in Settings.model_fields}
    command = [
        "grep",
        "-rhoE",
        r"MOEDIAL_[A-Z_]*[A-Z]",
        "server",
        "engine",
        "weights",
        "model",
        "terminal",
        "Dockerfile",
    ]
    found = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    links = {"MOEDIAL_SERVICE_HOST", "MOEDIAL_SERVICE_PORT", "MOEDIAL"}
    assert found >= OTHER_VARIABLES and found - links <= known


@pytest.mark.parametrize("keys", ["", " ", ",", "sk-one,", ",sk-one", "sk-one, ,sk-two", "sk-one,sk-one", "a\nb"])
def test_empty_double_and_impossible_keys_are_refused(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    with pytest.raises(BadSetting) as flag, in_memory(api_keys=keys):
        pass
    monkeypatch.setenv("MOEDIAL_API_KEYS", keys)
    with pytest.raises(BadSetting) as variable, in_memory():
        pass
    assert "sk-one" not in f"{flag.value} {variable.value}"


def test_an_error_of_settings_shows_no_key() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(api_keys=[[SECRET]])
    assert "api_keys" in str(caught.value) and SECRET not in str(caught.value)


def test_a_blank_file_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAL_API_KEYS_FILE", "")
    with pytest.raises(BadSetting, match="MOEDIAL_API_KEYS_FILE is set, but holds nothing"):
        Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("alice", "is not TOML"),
        ('alice = "sk-secret"', "expected a table"),
        ('["al ice"]\nkey = "sk-secret"', "a name is"),
        ("[alice]\nrequests_per_minute = 3", "key: Field required"),
        ("[alice]\nkey = 7", "key: "),
        ('[alice]\nkey = " "', "the key is empty"),
        ('[alice]\nkey = "sk-secret "', "spaces at its ends"),
        (f'[alice]\nkey = "{"x" * 1025}"', "more than 1024 bytes"),
        ('[alice]\nkey = "sk-secret"\ntokens_per_min = 3', "did you mean tokens_per_minute?"),
        ('[alice]\nkey = "sk-secret"\ntokens_per_minute = 0', "greater than or equal to 1"),
        ('[alice]\nkey = "sk-secret"\ntokens_per_minute = true', "valid integer"),
        ('[alice]\nkey = "sk-secret"\nshare_of_places = 1.5', "less than or equal to 1"),
        ('[alice]\nkey = "sk-secret"\nshare_of_places = nan', "share_of_places: "),
        ('[alice]\nkey = "sk-secret"\n[bob]\nkey = "sk-secret"', "alice and bob are the same key"),
        ('[alice]\nkey = "bob"\n[bob]\nkey = "sk-secret"', "a key is also a name"),
        ("[[[[", "is not TOML"),
        ("a = " + "[" * 5000, "is not"),
        ("#" * (1 << 20) + "#", "more than 1048576 bytes"),
        ("".join(f'[k{i}]\nkey = "{i}-secret"\n' for i in range(1001)), "at most 1000"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadSetting) as caught:
        read_keys((), key_file(tmp_path, text))
    message = str(caught.value)
    assert words in message and "secret" not in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = {"missing": tmp_path / "none", "folder": tmp_path, "pipe": tmp_path / "pipe", "device": Path("/dev/zero")}[
        kind
    ]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(BadSetting, match=r"No such file|[Ii]s (not )?a"):
        read_keys((), str(path))


def test_a_file_that_everybody_can_read_is_warned_of(tmp_path: Path) -> None:
    text = '[alice]\nkey = "sk-secret"'
    for mode, warned in ((0o644, True), (0o640, False), (0o600, False)):
        with capture_logs() as logs:
            read_keys((), key_file(tmp_path, text, mode))
        assert [line["log_level"] for line in logs] == ["warning"] * warned
        assert not warned or "keys.toml" in logs[0]["file"]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")],
        *[(host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "")],
    ],
)
def test_an_open_server_is_warned_of(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    with capture_logs() as logs:
        warn_if_open(host, read_keys((), ""))
    assert [(line["log_level"], line["host"]) for line in logs] == [("warning", host)] * (not loopback)
    with capture_logs() as logs:
        warn_if_open(host, read_keys(Settings(api_keys="k").api_keys, ""))
    assert logs == []


def test_the_server_warns_before_it_serves() -> None:
    code = "import server.serve as s; s.ModelServer.run = lambda *_: None; from server.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--host", "0.0.0.0", "--port", "0", "--log-format", "json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [line for line in ended.stderr.splitlines() if '"level":"warning"' in line and "no API keys" in line]
    assert ended.returncode == 0 and len(lines) == 1, ended.stderr


def test_the_command_refuses_with_one_line_and_forgets_its_keys() -> None:
    code = (
        "import os, sys, server.serve\n"
        "left = lambda: [name for name in os.environ if 'KEY' in name.upper()]\n"
        "server.serve.run = lambda settings: print(len(settings.api_keys), *left())\n"
        "from server.cli import main; main()"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOEDIAL_")}

    def ended(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "serve"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, env=clean | variables)

    refused = ended(MOEDIAL_API_KEY=SECRET)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and SECRET not in refused.stderr
    taken = ended(MOEDIAL_API_KEYS=f"{SECRET},other", MOEDIAL_KEY=SECRET)
    assert (taken.returncode, taken.stdout) == (0, "2\n"), taken.stderr
