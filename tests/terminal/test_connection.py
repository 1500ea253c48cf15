"""Addresses, keys and refusals: what is accepted, and how a refusal reads."""

import httpx
import pytest

from terminal.connection import Server, address_of, client_options, refusal
from terminal.errors import BadOption, Unreachable
from terminal.models import CountRange, ModelCard, cards_of, chosen
from tests.terminal.scripted_server import CARDS, closed_port


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_addresses_with_and_without_v1(url: str) -> None:
    assert address_of(url) == "http://h:1"


def test_a_path_in_front_is_kept() -> None:
    assert address_of("https://h/models/a/v1") == "https://h/models/a"


@pytest.mark.parametrize(
    "url", ["", "h:1", "ftp://h", "http://", "http://h:0", "http://h:x", "http://[", "http://a\x00b"]
)
def test_no_address(url: str) -> None:
    with pytest.raises(BadOption, match="--url"):
        address_of(url)


def test_a_password_does_not_belong_into_the_address() -> None:
    with pytest.raises(BadOption, match="--key"):
        address_of("http://user:secret@h:1")


@pytest.mark.parametrize("key", ["schlüssel", "a\nb"])
def test_keys_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(BadOption, match="--key"):
        client_options("http://h", key, 1.0)


@pytest.mark.parametrize(
    ("content", "message", "kind"),
    [
        (b'{"error": {"message": "full", "code": "queue_full"}}', "full (HTTP 503, queue_full)", "HTTP 503 queue_full"),
        (b'{"error": {"message": "full", "type": "busy"}}', "full (HTTP 503, busy)", "HTTP 503 busy"),
        (b'{"error": "full"}', "full (HTTP 503, Service Unavailable)", "HTTP 503 Service Unavailable"),
        (b"<html>", "no OpenAI error in the answer (HTTP 503", "HTTP 503 Service Unavailable"),
        (b"[]", "no OpenAI error in the answer (HTTP 503", "HTTP 503 Service Unavailable"),
        (b'{"error": {"message": "a\\u001b[2J\\nb", "code": 1}}', "a␛[2J b (HTTP 503, 1)", "HTTP 503 1"),
    ],
)
def test_refusals(content: bytes, message: str, kind: str) -> None:
    error = refusal(httpx.Response(503, content=content, headers={"retry-after": "7"}))
    assert str(error).startswith(message) and str(error).endswith("; try again in 7 s")
    assert error.kind == kind


def test_no_server() -> None:
    with pytest.raises(Unreachable, match="cannot connect to http"):
        Server(closed_port(), "").models()


def test_cards() -> None:
    odd, dense = cards_of(CARDS)
    assert odd == ModelCard("odd", False, CountRange(1, 8, 4, 4)) and dense.dense
    assert chosen([odd, dense], "") is odd and chosen([odd, dense], "dense") is dense
    with pytest.raises(BadOption, match="no model other; this server has: odd, dense"):
        chosen([odd, dense], "other")


@pytest.mark.parametrize("word", ["0", "9", "-1", "1.5", "²", "x", "99999999999"])
def test_counts_outside_name_the_range(word: str) -> None:
    with pytest.raises(BadOption, match="odd takes 1 to 8"):
        cards_of(CARDS)[0].check(word)


def test_counts_where_there_is_nothing_to_choose_or_nothing_known() -> None:
    with pytest.raises(BadOption, match="dense has no experts"):
        cards_of(CARDS)[1].check("1")
    unknown = cards_of({"data": [{"id": "plain"}]})[0]
    assert unknown.check("300") == 300
    with pytest.raises(BadOption, match="does not say which counts"):
        unknown.check("0")
