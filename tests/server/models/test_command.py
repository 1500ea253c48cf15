"""`--model` and `--tokenizer` more than once, as the command reads them."""

from pathlib import Path

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


def test_tokenizers_of_several_models_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["--models", "a=x,org/b=y"]
    for arguments in (["--tokenizer", "org/b=t"], ["--tokenizers", "org/b=t"]):
        settings = served(monkeypatch, *several, *BYTES, *arguments)
        assert isinstance(settings, Settings) and settings.tokenizers == {"org/b": "t"}
        assert [settings.of_model(name).tokenizer_folder for name in settings.models] == [None, Path("t")]
    two = served(monkeypatch, *several, *BYTES, "--tokenizer", "a=s", "--tokenizer", "org/b=t")
    assert isinstance(two, Settings) and two.tokenizers == {"a": "s", "org/b": "t"}
    one = served(monkeypatch, "x", "--tokenizer", "a=b")
    assert isinstance(one, Settings) and one.tokenizer_folder == Path("a=b")
    for wrong, words in (
        ([*several, "--tokenizer", "t"], "there are several models, and --tokenizer 't' has no name; say NAME=FOLDER"),
        ([*several, "--tokenizer", "c=t"], "'c' is none of --models: a, org/b"),
        ([*several, "--tokenizer", "a=s", "--tokenizer", "a=t"], "the name 'a' is there twice"),
        ([*several, "--tokenizer", "a=s", "--tokenizers", "a=s"], "give one of them"),
        (["x", "--tokenizer", "s", "--tokenizer", "t"], "--tokenizer is there 2 times, and there is one model"),
        (["x", "--tokenizers", "a=s"], "needs --models"),
    ):
        assert words in str(served(monkeypatch, *wrong, *BYTES))
    monkeypatch.setenv("MOEDIAL_MODELS", "a=x,b=y")
    assert "say --tokenizers NAME=FOLDER" in str(served(monkeypatch, "--tokenizer", "a=t", *BYTES))
