"""`--model` more than once, as the command reads it."""

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.settings import Settings

BYTES = ["--kv-cache-bytes", "9"]


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Settings | BaseException | None:
    """The settings with which the server would run, or what ended the command."""
    given: list[Settings] = []
    monkeypatch.setattr("server.serve.run", given.append)
    ended = CliRunner().invoke(app, ["serve", *arguments])
    return given[0] if given else ended.exception


def test_one_model_is_a_folder_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--model", "a=b"], ["a=b"], ["a=b", "--model", "a=b"]):
        settings = served(monkeypatch, *arguments)
        assert isinstance(settings, Settings) and settings.model == "a=b" and not settings.models


def test_several_models_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["--model", "a=x", "--model", "org/b=y z"]
    for arguments in (several, ["--models", "a=x,org/b=y z"]):
        settings = served(monkeypatch, *arguments, *BYTES)
        assert isinstance(settings, Settings) and settings.models == {"a": "x", "org/b": "y z"}
    for wrong, words in (
        ([*several, "--model", "z"], "'z' has no name; say NAME=FOLDER"),
        (["z", *several], "--model is there 2 times, and there is 'z'"),
        ([*several, "--models", "c=z"], "and there is 'c=z'"),
        (["z", "--models", "c=z"], "there is one model, 'z'"),
    ):
        assert words in str(served(monkeypatch, *wrong, *BYTES))
