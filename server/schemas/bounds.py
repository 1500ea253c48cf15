"""Bounds that hold before pydantic looks at what is in a list, an object or a text: each wrong entry becomes an error
object, and a million of them stop the server.

It knows settings by their names, no field.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import with_info_before_validator_function

from server.depth import JsonLimits, JsonTooLarge, parse
from server.settings import Settings

TOO_MANY, BAD_JSON = "too_many", "bad_json"  # kinds of errors
INNER = ("nullable", "default", "function-before", "function-after", "function-wrap")


@dataclass(frozen=True, slots=True)
class AtMost:
    """How many entries a list or an object may have. `limit` is a number, or the name of a setting. Of a list, one
    wrong entry is enough."""

    limit: int | str
    unit: str = "entries"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return with_info_before_validator_function(self._check, schema)

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        limit = self.limit if isinstance(self.limit, int) else limit_of(info, self.limit)
        if isinstance(value, list | dict) and len(value) > limit:
            raise PydanticCustomError(
                TOO_MANY,
                "at most {limit} {unit}, got {count}",
                {"limit": limit, "unit": self.unit, "count": len(value)},
            )
        return value


def _fail_fast(schema: Any) -> None:
    if schema["type"] == "list":
        schema["fail_fast"] = True
    elif schema["type"] in INNER:
        _fail_fast(schema["schema"])
    elif schema["type"] == "tagged-union":
        for branch in schema["choices"].values():
            _fail_fast(branch)
    elif schema["type"] == "union":
        for branch in schema["choices"]:
            _fail_fast(branch[0] if isinstance(branch, tuple) else branch)


def limit_of(info: ValidationInfo, name: str) -> Any:
    """The operator's limit, or the default where a body is read without settings."""
    settings = info.context
    return getattr(settings, name) if isinstance(settings, Settings) else Settings.model_fields[name].default


def json_limits_of(info: ValidationInfo) -> JsonLimits:
    names = ("max_json_depth", "max_json_values", "max_json_objects")
    return JsonLimits(*(limit_of(info, name) for name in names))


def _check_json(value: Any, info: ValidationInfo) -> Any:
    """What is no JSON passes: whether it may be none, others decide."""
    limits = json_limits_of(info)
    if not isinstance(value, str) or _harmless(value, limits):
        return value
    try:
        parse(value.encode("utf-8", "replace"), limits)
    except JsonTooLarge as error:
        raise bad_json(f"is no JSON of {error}") from None
    except ValueError:
        pass
    return value


def bad_json(message: str) -> PydanticCustomError:
    return PydanticCustomError(BAD_JSON, "{message}", {"message": message})


def _harmless(text: str, limits: JsonLimits) -> bool:
    """Seen without parsing: most texts are short, and shallow."""
    return len(text) <= limits.values and text.count("{") + text.count("[") <= limits.depth


JsonText = AfterValidator(_check_json)  # for texts that are parsed later on: no deeper and no larger than a body
# an object that is passed on as it is: what is in it is held to the limits of the whole body
KEYS = AtMost("max_json_objects", "keys")
FreeObject = Annotated[dict[str, Any], KEYS]
