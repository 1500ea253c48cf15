"""Expert counts as they are typed, shown and sent: `4`, or `8:2` for eight in the prompt and two in the answer.

It does not depend on a model, so it checks no range.
"""

from typing import Any

Count = int | tuple[int, int]  # for all tokens; or for the prompt's and for generated ones
MAX_DIGITS = 9


def parse_count(word: str) -> Count | None:
    """The count in a text; None where it is none."""
    numbers = [_number(part) for part in word.split(":")]
    match numbers:
        case [int(count)]:
            return count
        case [int(prefill), int(decode)]:
            return prefill, decode
    return None


def _number(word: str) -> int | None:
    digits = word.isascii() and word.isdecimal() and len(word) <= MAX_DIGITS
    return int(word) if digits and int(word) >= 1 else None


def parts_of(count: Count) -> tuple[int, ...]:
    """The one or two numbers of a count."""
    return (count,) if isinstance(count, int) else count


def label(count: Count | None) -> str:
    """The count as it is typed."""
    return "default" if count is None else ":".join(map(str, parts_of(count)))


def request_fields(count: Count | None) -> dict[str, Any]:
    """The fields of a request's body that set the count."""
    if count is None:
        return {}
    if isinstance(count, int):
        return {"num_experts": count}
    prefill, decode = count
    return {"experts": {"prefill": prefill, "decode": decode}}
