"""Tensors between ranks: what arrives, and how a rank that is gone or silent is named."""

import threading

import pytest
import torch

from model.errors import EngineDown
from model.ranks.transport import CONTENT, RESULT
from tests.model.ranks.threads import transports


def test_sizes_and_contents_arrive_in_order() -> None:
    first, second = transports(2)
    beats = threading.Thread(target=first.beat)
    first.send_sizes(1, [1, 2, 3, 4])
    first.send(1, torch.arange(5.0), CONTENT)
    beats.start()
    content = torch.empty(5)
    wait = second.receive(0, content, CONTENT)
    assert second.receive_sizes(0, 5) == [1, 2, 3, 4]
    wait()
    assert content.tolist() == [0, 1, 2, 3, 4] and second.receive_sizes(0, 5) == [0, 0, 0, 0]
    beats.join(20)
    assert not beats.is_alive()


def test_a_rank_that_does_not_answer_is_named() -> None:
    first, second = transports(2, seconds=0.2)
    with pytest.raises(EngineDown, match=r"rank 1 has not answered in time \(--rank-seconds\)"):
        first.receive(1, torch.empty(3), RESULT)()
    with pytest.raises(EngineDown, match="rank 0 has ended"):
        second.receive_sizes(0, 5)


def test_a_rank_that_has_ended_is_named() -> None:
    first, second, third = transports(3)
    third.close()
    with pytest.raises(EngineDown, match="rank 2 has ended: its connection is closed"):
        first.receive(2, torch.empty(3), RESULT)()
    first.send_sizes(1, [1, 1, 1, 1])
    assert second.receive_sizes(0, 5) == [1, 1, 1, 1]
    with pytest.raises(EngineDown, match="rank 2"):
        first.beat()
