"""How an option is declared and parsed: its text to its value, its group, its flag, and its row in the docs.

Not here: the options themselves (see `server/settings.py`).
"""

import re
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+")
MODEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")  # no @ and no :, which begin an alias
RESERVED_VARIABLES = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
)  # of the chat template; requests do not set these by name


def words(value: Any) -> Any:
    """A comma-separated text as a tuple; other values unchanged."""
    if not isinstance(value, str):
        return value
    stripped = (word.strip() for word in value.split(","))
    return tuple(word for word in stripped if word)


def secrets(value: Any) -> Any:
    """Keys as a tuple. Empty ones stay, to be refused: a mistake in a key must not open the server."""
    return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else value


def counts(value: Any) -> Any:
    """`fast=2,strong=8` as a mapping; pydantic then checks the counts."""
    if not isinstance(value, str):
        return value
    pairs = [word.partition("=") for word in words(value)]
    if broken := [name for name, equals, _ in pairs if not equals or not name]:
        raise ValueError(f"expected name=count pairs such as fast=2,strong=8; {broken[0]!r} has no count")
    return {name.strip(): count.strip() for name, _, count in pairs}


MAX_AMOUNT = 1e12  # so that a cost stays a number
Amount = Annotated[float, Field(ge=0, le=MAX_AMOUNT, allow_inf_nan=False)]
COUNT = re.compile(r"0|[1-9][0-9]{0,8}")  # each count has one form: two prices of one are seen


class Price(NamedTuple):
    """Of a million tokens: of prompts, of answers, and of prompts as far as they came out of the prefix cache."""

    prompt: Amount
    completion: Amount
    cached: Amount


def prices(value: Any) -> Any:
    """`1=0.05/0.2,8=0.2/0.8/0.02` as prices by count: of prompt and completion, and of cached prompt tokens, which
    otherwise cost as others. Pydantic then checks the numbers."""
    if not isinstance(value, str):
        return value
    found: dict[str, tuple[str, ...]] = {}
    for word in words(value):
        count, _, price = word.partition("=")
        amounts = tuple(part.strip() for part in price.split("/"))
        if len(amounts) not in (2, 3):
            raise ValueError(f"expected count=prompt/completion or count=prompt/completion/cached, got {word!r}")
        if not COUNT.fullmatch(count.strip()):
            raise ValueError(f"expected a count such as 8 before '=', got {word!r}")
        if count.strip() in found:
            raise ValueError(f"{count.strip()!r} has two prices")
        found[count.strip()] = amounts if len(amounts) == 3 else (*amounts, amounts[0])
    return found


def folders(value: Any) -> Any:
    """`small=FOLDER,large=FOLDER` as a mapping, in this order."""
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for word in words(value):
        name, equals, folder = (part.strip() for part in word.partition("="))
        if not equals or not folder or not MODEL_NAME.fullmatch(name):
            raise ValueError(
                f"expected NAME=FOLDER, got {word!r:.255}; a name has letters, digits and - . _ /, and begins and ends "
                "with a letter or digit"
            )
        if name in found:
            raise ValueError(f"the name {name!r} is there twice")
        found[name] = folder
    return found


def free_names(value: Any) -> Any:
    """Names of template variables that the server does not set itself."""
    names = words(value)
    if taken := [name for name in names if name in RESERVED_VARIABLES]:
        raise ValueError(f"{taken[0]} is set by the server itself")
    return names


def origins(value: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as browsers send them. Raises ValueError for any other text."""
    if wrong := [origin for origin in value if not ORIGIN.fullmatch(origin)]:
        raise ValueError(f"an origin is scheme://host or scheme://host:port in small letters, got {wrong[0]!r}")
    return value


# An option's text is parsed here, not as JSON.
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(words)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(secrets)]
Counts = Annotated[dict[str, int], NoDecode, BeforeValidator(counts)]
FoldersByName = Annotated[dict[str, str], NoDecode, BeforeValidator(folders)]
PricesByCount = Annotated[dict[Annotated[int, Field(ge=0)], Price], NoDecode, BeforeValidator(prices)]
FreeNames = Annotated[tuple[str, ...], NoDecode, BeforeValidator(free_names)]
Origins = Annotated[tuple[str, ...], NoDecode, AfterValidator(origins), BeforeValidator(words)]


def option(default: Any, group: str, description: str, **limits: Any) -> Any:
    """A field of the settings."""
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


def group_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else ""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_of(field: FieldInfo) -> str:
    """The default as a user would type it; empty where there is none."""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"{field.default}" if field.default not in ("", (), {}) else ""
