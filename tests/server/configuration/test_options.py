"""How the text of an option becomes a value, and how a value is written for a person."""

from typing import Any

import pytest

from server.configuration.options import counts, default_of, flag_of, group_of, option, origins, prices, secrets, words


@pytest.mark.parametrize(
    ("text", "found"),
    [("", ()), ("a", ("a",)), (" a , b,", ("a", "b")), (("as", "is"), ("as", "is"))],
)
def test_words(text: Any, found: Any) -> None:
    assert words(text) == found


def test_an_empty_key_stays_to_be_refused() -> None:
    assert secrets("a,,b") == ("a", "", "b") and secrets("") == ("",)


def test_pairs() -> None:
    assert counts(" fast = 2 ,strong=8") == {"fast": "2", "strong": "8"}
    assert counts({"fast": 2}) == {"fast": 2}
    for broken in ("fast", "fast=2,=8"):
        with pytest.raises(ValueError, match="has no count"):
            counts(broken)


def test_prices_by_count() -> None:
    assert prices("1=0.05/0.2, 8 = 0.2 / 0.8 / 0.02") == {"1": ("0.05", "0.2", "0.05"), "8": ("0.2", "0.8", "0.02")}
    assert prices({4: (1, 2, 3)}) == {4: (1, 2, 3)}
    for broken in ("1", "1=2", "1=1/2/3/4"):
        with pytest.raises(ValueError, match="count=prompt/completion"):
            prices(broken)
    with pytest.raises(ValueError, match="two prices"):
        prices("1=1/2,1=2/3")


def test_origins() -> None:
    assert origins(("*", "https://a.example:8443", "null")) == ("*", "https://a.example:8443", "null")
    for wrong in ("a.example", "https://A.example", "https://a.example/path"):
        with pytest.raises(ValueError, match="an origin is scheme://host"):
            origins((wrong,))


def test_a_field_knows_its_group_flag_and_default() -> None:
    field = option(False, "Model", "What it is.")
    assert group_of(field) == "Model" and flag_of("max_model_len") == "--max-model-len"
    shown = [default_of(option(value, "", "")) for value in (False, True, 3, "", (), 0.5)]
    assert shown == ["off", "on", "3", "", "", "0.5"]
