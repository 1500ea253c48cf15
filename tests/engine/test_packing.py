"""Packed models: the bits of the checkpoint that they were made from, and a damaged or foreign folder is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replaced
from typer.testing import CliRunner

from engine.build import build_engine
from engine.engine import Engine
from engine.packing import pack_model
from engine.types import EngineInfo, EngineSettings, Request, Sampling
from model.backends.cpu.kernels.library import load
from model.budget import FAMILY_RULE, ExpertBudget, RoutingRule
from model.errors import CheckpointError
from server.cli import app
from server.experts.calibration import load_calibration
from server.experts.sets import load_sets
from tests.server.calibrations import calibration
from tests.weights.checkpoints import INFINITY, OLMOE, raw_safetensors, write
from tests.weights.gguf.architectures import Encode
from tests.weights.gguf.quantisers import floats, mixed
from tests.weights.gguf.twins import write_twins
from weights import expert_sets
from weights.calibration import REPAIR_FILE, checkpoint_hash
from weights.calibration import write as write_calibration
from weights.expert_sets import ExpertSet
from weights.folder import read_card
from weights.load import load_model
from weights.packed import mapped, write_tensors
from weights.repair import write_tables
from weights.sizes import WeightFiles, weight_size
from weights.small_files import FolderFiles
from weights.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
SETTINGS = EngineSettings(model="", kv_cache_bytes=1 << 20, max_running=2, step_ms=0)
MODELS = {"olmoe": OLMOE | {"hidden_size": 64}, "infinity": INFINITY | {"hidden_size": 64, "mask_block": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and what it becomes packed."""
    made = tmp_path_factory.mktemp("models")
    for name, raw in MODELS.items():
        write(made / name, raw)
    pack_model(str(made / "olmoe"), made / "packed")
    return made


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(folder / "packed", tmp_path / "packed")


def engine_of(folder: Path, **changes: Any) -> tuple[Engine, EngineInfo]:
    return build_engine(replace(SETTINGS, model=str(folder), **changes))


def answer(started: tuple[Engine, EngineInfo], count: int = 0, rule: RoutingRule = FAMILY_RULE) -> list[Any]:
    """Tokens and their log-probabilities, to the last bit."""
    engine, info = started
    budget = ExpertBudget((count or info.experts.trained,) * info.experts.layers, rule=rule)
    engine.add(Request("a", tuple(range(20)), budget, Sampling(max_tokens=8, seed=3, temperature=0.0, logprobs=3)))
    events = []
    while engine.has_work:
        events += [(event.token, event.logprob) for event in engine.step().events]
    return events


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("olmoe", {}),
        ("olmoe", {"quantize": "int8", "quantize_layers": "all"}),
        ("olmoe", {"quantize": "int4"}),
        ("infinity", {"dtype": "bfloat16"}),
    ],
)
def test_a_packed_model_has_the_bits_of_its_checkpoint(
    folder: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    pack_model(str(folder / name), tmp_path / "out", **options)
    expected = answer(engine_of(folder / name, **options))
    assert len(expected) == 8 and answer(engine_of(tmp_path / "out", **options)) == expected


def test_what_is_known_of_a_model_is_known_of_a_packed_one(folder: Path) -> None:
    """But how many bytes the files have: those of the packed model are the packed tensors'."""
    infos = [engine_of(folder / name)[1] for name in ("olmoe", "packed")]
    files = WeightFiles()
    own, packed = (replace(info, load_seconds=0.0, weight_files=files) for info in infos)
    assert own == packed and infos[1].weight_files.bytes > infos[0].weight_files.bytes
    assert weight_size(folder / "packed", "auto") == (packed.parameters, infos[1].weight_files.bytes)


def test_chat_templates_come_along(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder / "olmoe", tmp_path / "olmoe")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "chat_template.jinja").write_text("none")
    pack_model(str(source), tmp_path / "packed")
    assert FolderFiles(tmp_path / "packed").templates == {"default": "none", "tool_use": "tools"}


def measured(folder: Path) -> None:
    """A card, a calibration by which one expert is repaired, and an expert set."""
    (folder / "card.json").write_text('{"quality": []}')
    tables = torch.rand(2, 3, 64) + 0.5, torch.randn(2, 3, 64)
    tables[0][:, 2], tables[1][:, 2] = 1, 0
    digest, checkpoint = write_tables(folder / REPAIR_FILE, *tables), checkpoint_hash(folder)
    write_calibration(replaced(calibration(checkpoint), repair_hash=digest, repaired=(1,)), folder)
    loss = expert_sets.Loss(1.0, 1.0)
    kept = ((0, 2), (1, 4))
    expert_sets.write(ExpertSet(1, "code", checkpoint, "x.txt", 9, 5, kept, (0.9, 0.9), loss), folder)


def test_what_was_measured_comes_along(folder: Path, tmp_path: Path) -> None:
    source, packed = shutil.copytree(folder / "olmoe", tmp_path / "olmoe"), tmp_path / "packed"
    measured(source)
    pack_model(str(source), packed)
    own = load_calibration(packed, "packed")
    assert own.calibration is not None and own == load_calibration(source, "olmoe")
    assert read_card(packed) == {"quality": []} and load_sets(packed).sets == load_sets(source).sets != {}
    rules = [RoutingRule(), RoutingRule(repair=True), RoutingRule(kept=("10100", "01001"))]
    answers = [[answer(engine_of(path), 1, rule) for rule in rules] for path in (source, packed)]
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1] != answers[0][2]
    infos = [engine_of(path)[1] for path in (source, packed)]
    assert infos[0].experts == infos[1].experts and infos[1].experts.repaired == (1,)


@pytest.mark.parametrize("quantiser", [floats, mixed])
def test_a_gguf_file_is_packed_with_its_tokenizer(tmp_path: Path, quantiser: Encode) -> None:
    _, file = write_twins(tmp_path, quantiser)
    pack_model(str(file), tmp_path / "packed")
    expected = answer(engine_of(file))
    assert len(expected) == 8 and answer(engine_of(tmp_path / "packed")) == expected
    text = "a <think> dog"
    assert Tokenizer.load(tmp_path / "packed").encode(text) == Tokenizer.load(file).encode(text)
    assert FolderFiles(tmp_path / "packed").json("tokenizer_config.json")["chat_template"]
    assert ("as stored" in engine_of(tmp_path / "packed")[1].quantize) == (quantiser is mixed)


def test_another_tokenizer_may_be_packed(folder: Path, tmp_path: Path) -> None:
    other, _ = write_twins(tmp_path)
    pack_model(str(folder / "olmoe"), tmp_path / "packed", tokenizer=other)
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == (other / "tokenizer.json").read_text()
    assert (tmp_path / "packed" / "config.json").read_text() != (other / "config.json").read_text()


def test_a_tokenizer_that_cannot_be_packed_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CheckpointError, match=r"other has no tokenizer\.json"):
        pack_model(str(folder / "olmoe"), tmp_path / "packed", tokenizer=other)
    (other / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        pack_model(str(folder / "olmoe"), tmp_path / "packed", tokenizer=other)
    assert not (tmp_path / "packed").exists()


def test_tables_that_layers_share_are_written_once(folder: Path) -> None:
    calls = json.loads((folder / "packed" / "packed.json").read_text())["calls"]
    places = [call["values"]["rotary"] for call in calls if call["op"] == "add_attention"]
    assert len(places) == 2 and places[0] == places[1] and places[0]["tensor"] == "rotary"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "bfloat16"}, "packed with dtype float32, and bfloat16 is asked for"),
        ({"quantize": "int8"}, "packed with quantize none, and int8 is asked for"),
        ({"block_size": 24}, "a packed model needs the native kernels: the block size 24"),
    ],
)
def test_other_settings_than_it_was_packed_for_are_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        engine_of(folder / "packed", **changes)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Damage of `packed.json`."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / "packed.json").read_text())
        change(index)
        (folder / "packed.json").write_text(json.dumps(index))

    return damage


def value(call: int, name: str, new: object) -> Callable[[Path], None]:
    return values(call, **{name: new})


def values(call: int, **new: object) -> Callable[[Path], None]:
    return edited(lambda index: index["calls"][call]["values"].update(new))


def cut(folder: Path) -> None:
    os.truncate(folder / "part-00003.safetensors", 5000)


def other_shape(folder: Path) -> None:
    tensors = mapped(folder / "part-00003.safetensors")
    written = {name: tensor[:-1].clone() if name == "up" else tensor.clone() for name, tensor in tensors.items()}
    write_tensors(folder / "part-00003.safetensors", written)


def other_dtype(folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in mapped(folder / "part-00003.safetensors").items()}
    write_tensors(folder / "part-00003.safetensors", tensors | {"down": tensors["down"].half()})


def no_index(folder: Path) -> None:
    (folder / "packed.json").write_text("[]")


def two_bytes_in(folder: Path) -> None:
    """The library takes a header of any length: floats need not lie at multiples of four."""
    entry = '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    raw_safetensors(folder / "part-00003.safetensors", entry + " " * (-len(entry) % 4 + 2), bytes(8))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (no_index, "packed.json: Expected `object`"),
    (edited(lambda index: index.update(layout="0")), "written for weights of layout 0, these kernels read"),
    (edited(lambda index: index.update(format=1)), "format 1 is not 2"),
    (edited(lambda index: index.update(more=2)), "unknown field `more`"),
    (edited(lambda index: index.update(calls=[])), "0 calls are too few: a program, its head and two for each of 2"),
    (edited(lambda index: index["calls"].reverse()), "call 0 is 'add_topk', not 'program'"),
    (edited(lambda index: index["calls"].pop(1)), "call 1 is 'add_attention', not 'set_head'"),
    (edited(lambda index: index["calls"].pop()), "5 calls are too few: .* are 6"),
    (edited(lambda index: index["calls"].extend(index["calls"][-1:] * 300)), "call 6, 'add_topk', is one too many"),
    (edited(lambda index: index["calls"].insert(3, index["calls"][1])), "call 3, 'set_head', adds no block"),
    (edited(lambda index: index["calls"][3].update(op="set_threads")), "call 3, 'set_threads', adds no block"),
    (edited(lambda index: index["calls"][3]["values"].pop("units")), "add_topk takes"),
    (value(3, "units", 1 << 27), "'units' is 134217728, more than"),
    (edited(lambda index: index.update(quantize="int3")), r"packed.json: Invalid enum value 'int3' - at `\$.quantize`"),
    (edited(lambda index: index.update(parameters=-1)), r">= 0 - at `\$.parameters`"),
    (value(3, "units", 1 << 26), "call 3, 'add_topk': packed weights of 5 x"),
    (value(3, "experts", 1 << 26), "packed weights of 1 x"),
    (value(3, "experts", -5), "a matrix must have outputs"),
    (values(3, experts=0, trained=0, shared_gate=True, shared_pieces=5), "a router needs at least one expert, got 0"),
    (value(3, "units", 1.5), "Expected a value of type 'int'"),
    (value(3, "up", None), "packed weights cannot be"),
    (value(3, "up", {"part": 9, "tensor": "up"}), "part 9 of 'up' is not one of 6"),
    (value(3, "up", {"part": -1, "tensor": "up"}), "part -1 of 'up' is not one of 6"),
    (value(3, "up", {"part": 3, "tensor": "left"}), "part-00003.safetensors has no tensor 'left'"),
    (value(2, "kv_heads", 2), "norm weight must have 32 values, got 64"),
    (value(1, "outputs", 16), "packed.json has 16 logits, config.json a vocabulary of 37"),
    (cut, "part-00003.safetensors"),
    (other_shape, "packed weights of 5 x"),
    (other_dtype, "packed weights cannot be Half"),
    (two_bytes_in, "cannot be mapped at byte"),
    (lambda folder: (folder / "part-00003.safetensors").unlink(), "part-00003.safetensors does not exist"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES, ids=[says for _, says in DAMAGES])
def test_a_damaged_folder_is_refused(packed: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(packed)
    with pytest.raises(CheckpointError, match=says):
        engine_of(packed)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("vocab_size", 36, "packed.json has 37 logits, config.json a vocabulary of 36"),
        ("num_experts", 4, "the model cannot compute a token"),
        ("num_key_value_heads", 2, "the model cannot compute a token"),
        ("num_hidden_layers", 1, "call 4, 'add_attention', is one too many for 1 layers"),
        ("num_hidden_layers", 3, "6 calls are too few"),
        ("max_position_embeddings", 1, "cannot compute a token: This model's maximum context length is 1"),
        ("dtype", "bfloat16", "packed with dtype float32, and bfloat16 is asked for"),
    ],
)
def test_a_config_of_another_model_is_refused(packed: Path, field: str, value: object, says: str) -> None:
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=says):
        engine_of(packed)


def test_nothing_else_reads_a_packed_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a packed model: only moedial serve reads it"):
        load_model(folder / "packed")
    with pytest.raises(CheckpointError, match="is packed"):
        pack_model(str(folder / "packed"), tmp_path / "again")
    with pytest.raises(CheckpointError, match="exists; pack writes to a new folder"):
        pack_model(str(folder / "olmoe"), folder / "packed")


def test_mapped_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    """Each at a multiple of its size's power of two, up to a cache line."""
    tensors = {
        "few": torch.arange(3.0),
        "none": torch.empty(0, 4),
        "many": torch.arange(640).bfloat16(),
        "bytes": torch.arange(17, dtype=torch.int8),
        "one": torch.tensor([[7]]),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = mapped(tmp_path / "x.safetensors")
    assert list(found) == ["none", "many", "one", "few", "bytes"]
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].data_ptr() % min(64, tensor.nbytes & -tensor.nbytes or 1) == 0


def test_the_command(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["pack", str(folder / "olmoe"), str(tmp_path / "out"), "--quantize", "int8"])
    assert done.exit_code == 0 and "serve it with the same" in done.output
    index = json.loads((tmp_path / "out" / "packed.json").read_text())
    assert index["quantize"] == "int8"
    assert runner.invoke(app, ["pack", str(folder / "olmoe"), str(tmp_path / "x"), "--dtype", "int3"]).exit_code == 2
