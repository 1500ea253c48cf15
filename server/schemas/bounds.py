"""Bounds that are checked before pydantic looks into a list, an object or a text.

pydantic makes an error object of each wrong entry, and a million of them would stop the server. It finds settings by
their names, and does not depend on fields.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import with_info_before_validator_function

from server.json_limits import JsonLimits, JsonTooLarge, parse
from server.settings import Settings

TOO_MANY, BAD_JSON = "too_many", "bad_json"  # kinds of errors
WRAPPER_SCHEMAS = ("nullable", "default", "function-before", "function-after", "function-wrap")


@dataclass(frozen=True, slots=True)
class AtMost:
    """How many entries a list or an object may have; `limit` is a number, or the name of a setting.

    Validation of a list stops at the first wrong entry.
    """

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
    elif schema["type"] in WRAPPER_SCHEMAS:
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
    """Check the limits of a text of JSON. Text that is no JSON passes: other checks decide whether it may."""
    limits = json_limits_of(info)
    if not isinstance(value, str) or _surely_within(value, limits):
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


def _surely_within(text: str, limits: JsonLimits) -> bool:
    """Whether a text is within the limits, as most are, as far as its length and brackets tell."""
    brackets = text.count("{") + text.count("[")
    return len(text) <= limits.values and brackets <= limits.depth


JsonText = AfterValidator(_check_json)  # for texts that are parsed later: they have the limits of a body
# an object that is passed on unchanged; its contents count towards the limits of the body
KEYS = AtMost("max_json_objects", "keys")
FreeObject = Annotated[dict[str, Any], KEYS]
