"""Checkpoints that lie: pipes instead of files, absurd numbers, ids that are none, names that move a cursor."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from engine import build
from engine.build import build_engine
from engine.types import EngineSettings
from model.errors import CheckpointError, printable
from tests.weights.checkpoints import INFINITY, OLMOE, write, write_config
from tests.weights.words import END, write_tokenizer
from weights.chat import ChatTemplate
from weights.config import read_config
from weights.files import TensorFiles
from weights.folder import INDEX, SINGLE, read_card
from weights.generation import read_eos_ids, sampling_defaults
from weights.load import load_model
from weights.small_files import MAX_TEMPLATE, small_files
from weights.tokenizer import Tokenizer

VOCABULARY = 315  # of the tokenizer below


@pytest.fixture(autouse=True)
def seconds() -> Iterator[None]:
    """A reader that waits for ever fails its test."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def tensors(folder: Path) -> None:
    with TensorFiles(folder):
        pass


def end_ids(folder: Path) -> tuple[int, ...]:
    return read_eos_ids(small_files(folder))


def defaults(folder: Path) -> dict[str, Any]:
    return sampling_defaults(small_files(folder))


READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("config.json", read_config),
    ("config.json", end_ids),
    ("generation_config.json", defaults),
    ("card.json", read_card),
    ("tokenizer.json", Tokenizer.load),
    ("tokenizer_config.json", Tokenizer.load),
    ("tokenizer_config.json", ChatTemplate.load),
    ("special_tokens_map.json", ChatTemplate.load),
    ("tokenizer.json", ChatTemplate.load),
    ("chat_template.json", ChatTemplate.load),
    ("chat_template.jinja", ChatTemplate.load),
    ("additional_chat_templates/tool_use.jinja", ChatTemplate.load),
    (SINGLE, tensors),
    (INDEX, tensors),
]


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "folder"])
@pytest.mark.parametrize(("name", "read"), READERS, ids=[f"{name} {read.__qualname__}" for name, read in READERS])
def test_only_regular_files_are_read(name: str, read: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="x")
    path = tmp_path / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        target = path if kind == "pipe" else tmp_path / "elsewhere"
        os.mkfifo(target)
        if target != path:
            path.symlink_to(target)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read(tmp_path)


def test_a_template_file_is_bounded(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (MAX_TEMPLATE + 1))
    with pytest.raises(CheckpointError, match=f"larger than {MAX_TEMPLATE} bytes"):
        ChatTemplate.load(tmp_path)


NUMBERS: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**40},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 2.5},
    {"num_hidden_layers": True},
    {"vocab_size": 2**62},
    {"vocab_size": 0},
    {"vocab_size": float("nan")},
    {"hidden_size": 2**40},
    {"hidden_size": -16},
    {"num_experts": 2**31},
    {"num_experts": 0},
    {"num_experts": 65536},
    {"num_attention_heads": 0},
    {"intermediate_size": 2**24, "hidden_size": 2**24, "num_experts": 2**24},
    {"max_position_embeddings": 2**40},
    {"rope_theta": float("nan")},
    {"rope_theta": float("inf")},
    {"rope_theta": -1.0},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": -1.0},
    {"rms_norm_eps": "small"},
    {"rope_scaling": {"rope_type": "linear", "factor": float("-inf")}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x", "original_max_position_embeddings": 8}},
]


@pytest.mark.parametrize("change", NUMBERS, ids=str)
def test_absurd_numbers_are_refused_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, OLMOE)
    write_config(tmp_path, OLMOE | change)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("change", [{"sigma_min": float("nan")}, {"kept_share": float("nan")}, {"norm_eps": 1e999}])
def test_so_are_those_of_an_infinity_moe(change: dict[str, Any], tmp_path: Path) -> None:
    write_config(tmp_path, INFINITY | change)
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} must be a finite number"):
        read_config(tmp_path)


def test_a_context_that_the_memory_cannot_hold_is_refused_before_loading(tmp_path: Path) -> None:
    write_config(tmp_path, OLMOE | {"max_position_embeddings": 2**24})
    with pytest.raises(CheckpointError, match="lower max_model_len or raise kv_cache_bytes"):
        build_engine(EngineSettings(str(tmp_path), kv_cache_bytes=1 << 20))


def test_shapes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    write(tmp_path, OLMOE)
    write_config(tmp_path, OLMOE | {"intermediate_size": 1 << 20})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="1048576"):
        load_model(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; the weights are 2 GB


def engine_of(folder: Path, **changes: Any) -> EngineSettings:
    """A model with exactly the tokenizer's ids."""
    write_tokenizer(folder)
    write(folder, OLMOE | {"vocab_size": VOCABULARY} | changes)
    return EngineSettings(str(folder), kv_cache_bytes=1 << 20, max_running=2, step_ms=0)


def retokenised(folder: Path, *added: AddedToken) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(list(added))
    backend.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_beyond_the_embedding_is_refused_with_both_numbers(tmp_path: Path) -> None:
    settings = engine_of(tmp_path)
    build_engine(settings)
    retokenised(tmp_path, AddedToken("<think>", special=False))
    with pytest.raises(CheckpointError, match=rf"ids up to {VOCABULARY}, but the model's vocab_size is {VOCABULARY}"):
        build_engine(settings)
    settings = engine_of(tmp_path, vocab_size=200)
    with pytest.raises(CheckpointError, match=rf"ids up to {VOCABULARY - 1}, but the model's vocab_size is 200"):
        build_engine(settings)


@pytest.mark.parametrize(
    "part",
    [
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}},
        {"model": {"type": "BPE"}},
        {"decoder": {"type": "x"}},
        {"added_tokens": {}},
        {"added_tokens": None},
        {"normalizer": 1},
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_encode_is_refused(part: dict[str, Any], tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    data = json.loads(path.read_text())
    name, value = next(iter(part.items()))
    whole = data[name] | value if name == "post_processor" else value
    path.write_text(json.dumps(data | {name: whole}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_padding_beyond_the_embedding_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = engine_of(tmp_path)
    retokenised(tmp_path, AddedToken("<pad>", special=True))
    build_engine(settings)
    assert "1 special tokens have no embedding" in caplog.text


@pytest.mark.parametrize("end", [VOCABULARY, -1, 2**62, [0, 4000]])
def test_an_end_that_can_never_come_is_refused(end: Any, tmp_path: Path) -> None:
    settings = engine_of(tmp_path, eos_token_id=end)
    with pytest.raises(CheckpointError, match=f"eos_token_id .*( has 0 to {VOCABULARY - 1}|neither an id)"):
        build_engine(settings)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    build_engine(settings)


def test_grammars_end_with_the_tokens_that_the_server_ends_answers_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(build, "GrammarCompiler", lambda path, vocabulary, ends: made.append(tuple(ends)))
    settings = engine_of(tmp_path, eos_token_id=3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    for choice, ends in (("auto", (5, 0)), ("none", (3, 0))):
        build_engine(EngineSettings(**{**_fields(settings), "generation_config": choice}))
        assert made.pop() == ends == Tokenizer.load(tmp_path, choice == "auto").eos_ids


def _fields(settings: EngineSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in EngineSettings.__slots__}


def test_too_many_ends_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, {"eos_token_id": list(range(300))})
    with pytest.raises(CheckpointError, match="has 300 ids; at most 256"):
        read_eos_ids(small_files(tmp_path))


@pytest.mark.parametrize("step_ms", [0, 50])
def test_a_model_that_computes_no_number_is_refused(step_ms: int, tmp_path: Path) -> None:
    settings = engine_of(tmp_path)
    found = load_file(tmp_path / SINGLE)
    found["lm_head.weight"].fill_(3e38)
    save_file(found, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="the model cannot compute a token: "):
        build_engine(EngineSettings(**{**_fields(settings), "step_ms": step_ms}))


def test_names_from_files_neither_move_a_cursor_nor_begin_a_line(tmp_path: Path) -> None:
    evil = "x\x1b[2J\n\u202egpj\x00é"
    write(tmp_path, OLMOE)
    found = load_file(tmp_path / SINGLE)
    save_file(found | {evil: found["model.norm.weight"].clone()}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert str(caught.value).isprintable() and r"x\x1b[2J\n\u202egpj\x00é" in str(caught.value)
    write_config(tmp_path, OLMOE | {evil: 1})
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(caught.value).isprintable() and r"\x1b[2J" in str(caught.value)
    assert printable(printable(evil)) == printable(evil) and len(str(CheckpointError("x" * 10**6))) < 10_000
    assert END.isprintable()
