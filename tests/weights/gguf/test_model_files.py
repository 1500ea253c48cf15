"""A model in a GGUF file is found, described and read as the same model in a folder."""

import shutil
from pathlib import Path

import pytest
import torch

from model.errors import CheckpointError
from server.requests.templates import SandboxedTemplate
from server.settings import Settings
from tests.weights.gguf.twins import SIZE, write_twins
from tests.weights.gguf.writer import blob, write_gguf
from weights.calibration import checkpoint_hash, find
from weights.chat import ChatTemplate
from weights.config import read_config
from weights.expert_sets import ExpertSet, Loss, every
from weights.extract import extract
from weights.folder import beside, model_name, read_card, resolve_model
from weights.generation import read_eos_ids, sampling_defaults
from weights.gguf import header, reader
from weights.gguf.reader import GgufFile
from weights.load import load_model
from weights.sizes import weight_size
from weights.small_files import CONFIG, GENERATION, TOKENIZER, small_files
from weights.tokenizer import Tokenizer

Twins = tuple[Path, Path]
MESSAGES = [{"role": "user", "content": "a <think> dog <|user|>"}]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return write_twins(tmp_path_factory.mktemp("twins"))


def test_both_are_the_same_model(twins: Twins) -> None:
    folder, file = twins
    (config, raw), (own, own_raw) = read_config(folder), read_config(file)
    assert own == config and own_raw["model_type"] == raw["model_type"]
    theirs, ours = load_model(folder)[0].state_dict(), load_model(file)[0].state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert weight_size(file, "auto") == weight_size(folder, "auto")


def test_both_have_the_same_tokenizer_and_template(twins: Twins) -> None:
    theirs, ours = map(Tokenizer.load, twins)
    for text in ("Once upon a time", "    <think> 12 日本 😀 <|user|>\n"):
        assert ours.encode(text) == theirs.encode(text) and ours.encode(text)[0] == 0
        assert ours.decode(ours.encode(text)) == text
        assert ours.least_tokens(text) == theirs.least_tokens(text) > 0
    assert (ours.eos_ids, ours.specials, ours.added) == (theirs.eos_ids, theirs.specials, theirs.added)
    assert ours.check_ids(SIZE) == ()
    written = []
    for path in twins:
        chat = ChatTemplate.load(path)
        assert chat is not None
        written.append(chat.render(MESSAGES))
    assert written[0] == written[1] and ours.encode_chat(written[1]) == theirs.encode_chat(written[0])


def test_the_process_that_renders_templates_reads_the_file(twins: Twins) -> None:
    made = [SandboxedTemplate.load(path) for path in twins]
    texts = [chat.render(MESSAGES) for chat in made if chat is not None]
    assert len(texts) == 2 and texts[0] == texts[1]


def test_both_have_the_same_generation_settings(twins: Twins) -> None:
    theirs, ours = map(small_files, twins)
    assert read_eos_ids(ours) == read_eos_ids(theirs) == (0,)
    assert sampling_defaults(ours) == sampling_defaults(theirs) == {"temperature": 0.5, "top_k": 7}


def test_a_file_is_found_by_its_path_or_in_its_folder(twins: Twins, tmp_path: Path) -> None:
    folder, file = twins
    assert resolve_model(str(file)) == file and resolve_model(str(folder)) == folder
    shutil.copy(file, tmp_path / "a-00001-of-00002.gguf")
    (tmp_path / "a-00002-of-00002.gguf").touch()
    assert resolve_model(str(tmp_path)) == tmp_path / "a-00001-of-00002.gguf"
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files \(a-00001-of-00002.gguf, b.gguf\); name the one"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"nor a \.gguf file"):
        resolve_model(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/Tiny-Q4_0.gguf", "Tiny-Q4_0"), ("x/Tiny-00001-of-00003.gguf", "Tiny"), ("x/v1.5", "v1.5")],
)
def test_a_file_is_called_by_its_name_alone(path: str, name: str, tmp_path: Path) -> None:
    assert model_name(Path(path)) == name
    whole = tmp_path / path
    whole.parent.mkdir()
    whole.touch()
    assert Settings(model=str(whole)).name == name


def test_what_is_measured_lies_in_a_folder_of_the_files_name(twins: Twins, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    shutil.copy(twins[1], file)
    assert read_card(file) == {} and find(file) is None and every(file) == {}
    assert beside(file) == tmp_path / "tiny.moedial"
    (beside(file) / "expert-sets").mkdir(parents=True)
    (beside(file) / "card.json").write_text('{"a": 1}')
    (beside(file) / "calibration.json").touch()
    (beside(file) / "expert-sets" / "code.json").touch()
    assert read_card(file) == {"a": 1} and find(file) == tmp_path / "tiny.moedial" / "calibration.json"
    assert list(every(file)) == ["code"]


def test_the_hash_is_of_the_whole_file(twins: Twins, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    shutil.copy(twins[1], file)
    before = checkpoint_hash(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert checkpoint_hash(file) != before


def test_a_tokenizer_of_a_folder_stands_in_for_one_that_is_not_known(twins: Twins, tmp_path: Path) -> None:
    folder, _ = twins
    file = write_gguf(tmp_path / "x.gguf", {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "own"}, {})
    with pytest.raises(CheckpointError, match=r"^x.gguf: .*; --tokenizer DIR takes the tokenizer"):
        Tokenizer.load(file)
    found = Tokenizer.load(file, tokenizer=folder)
    assert found.encode("a dog") == Tokenizer.load(folder).encode("a dog") and found.eos_ids == (0,)
    assert sampling_defaults(small_files(file, folder)) == {"temperature": 0.5, "top_k": 7}


def test_the_model_keeps_its_own_config_beside_another_tokenizer(twins: Twins, tmp_path: Path) -> None:
    folder, file = twins
    for name in (TOKENIZER, "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    files = small_files(file, tmp_path)
    assert files.json(CONFIG) == small_files(file).json(CONFIG)
    assert files.json(GENERATION) == small_files(file).json(GENERATION)
    assert files.templates == {} and files.has(TOKENIZER) and not files.has("chat_template.json")


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"general.architecture": "olmoe"}, {})
    assert not small_files(file).has(TOKENIZER)
    with pytest.raises(
        CheckpointError, match=r"no tokenizer\.json follows from .*has no tokenizer\.ggml\.model; --tok"
    ):
        Tokenizer.load(file)
    assert ChatTemplate.load(file) is None


def test_no_more_of_a_file_is_mapped_than_a_header_may_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that reads small files alone has less address space than a model has bytes."""
    file = write_gguf(tmp_path / "x.gguf", {"general.architecture": "olmoe"}, {"a": blob("F32", (64, 64))})
    for module in (header, reader):
        monkeypatch.setattr(module, "MAX_HEADER", 256)
    assert GgufFile(file).tensors["a"].nbytes == 64 * 64 * 4
    for module in (header, reader):
        monkeypatch.setattr(module, "MAX_HEADER", 64)
    with pytest.raises(CheckpointError, match="a header may have 64"):
        GgufFile(file)


def test_fewer_experts_are_extracted_from_a_file_as_from_a_folder(twins: Twins, tmp_path: Path) -> None:
    kept = ExpertSet(1, "t", "", "", 1, 5, ((0, 1, 3), (1, 2, 4)), (1.0, 1.0), Loss(1.0, 1.0))
    made = []
    for number, path in enumerate(twins):
        extract(path, kept, tmp_path / str(number))
        made.append(load_model(tmp_path / str(number))[0].state_dict())
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    texts = [Tokenizer.load(tmp_path / str(number)).encode("a <think> dog") for number in range(2)]
    assert texts[0] == texts[1] == Tokenizer.load(twins[0]).encode("a <think> dog")
