"""Which device a setting means, what is refused, and where free memory is asked for; with GPUs that are not there."""

import pytest
import torch

from model import devices as devices_file
from model.backends.choose import choose
from model.backends.torch.backend import TorchBackend
from model.devices import Fetched, devices, free_memory, make_current, resolve
from model.errors import CheckpointError
from model.options import Options
from model.resources import available_memory
from tests.model.tiny import llama_like, topk


def has(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")


@pytest.mark.parametrize(
    ("setting", "gpus", "device"),
    [
        ("auto", 0, "cpu"),
        ("cpu", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda:01", 2, "cuda:1"),
    ],
)
def test_what_a_setting_means(setting: str, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, gpus)
    assert resolve(setting) == device
    assert resolve(device) == device


@pytest.mark.parametrize(("setting", "gpus"), [("cuda", 0), ("cuda:2", 2), ("gpu", 2), ("cuda:", 2), ("", 0)])
def test_what_is_not_there_is_refused_with_what_is(setting: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, gpus)
    with pytest.raises(CheckpointError) as caught:
        resolve(setting)
    assert repr(setting) in str(caught.value)
    assert all(name in str(caught.value) for name in devices())


def test_nothing_of_cuda_is_asked_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("asked a GPU"))
    assert resolve("cpu") == "cpu"
    assert free_memory("cpu").source == available_memory().source


def test_free_memory_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ({"cuda:1": 7}[device], 100))
    assert free_memory("cuda:1").value == 7


def test_an_old_gpu_runs_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    backend, reason = choose(llama_like(topk(), head_width=16, context=32), Options(device="cuda:0"))
    assert isinstance(backend, TorchBackend) and reason


def test_a_gpu_that_is_chosen_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    make_current("cuda:1")
    make_current("cpu")
    assert chosen == ["cuda:1"]


def test_what_is_fetched_comes_in_one_copy_for_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors of a device that the host cannot read, of any shape, also none at all; they may change at once."""
    monkeypatch.setattr(devices_file, "readable", lambda x: False)
    columns = torch.arange(12).view(3, 4)
    given = [columns[:, 0], columns[:, 1:], torch.tensor([True, False]), columns[:0], torch.rand(2, 1), columns[0, 0]]
    expected = [tensor.clone() for tensor in given]
    fetched = Fetched(given)
    for tensor in given:
        tensor.zero_()
    found = fetched.wait()
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 3
    assert Fetched([]).wait() == []
