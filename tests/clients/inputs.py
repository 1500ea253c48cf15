"""What the tests of all clients send: one tool, one schema, and questions. It knows no client and no server."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PROMPT = "Once upon a time, there was a little"
QUESTION: Any = [{"role": "user", "content": "Tell me a story."}]
SURE = {"temperature": 0, "seed": 1}


class Animal(StrEnum):
    CAT = "cat"
    DOG = "dog"
    BIRD = "bird"


class Page(BaseModel):
    model_config = ConfigDict(extra="forbid")

    words: int = Field(ge=1, le=99)


class Book(BaseModel):
    """A schema of typical parts: a bounded text, a list of names, a flag, and a nested object."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(max_length=20)
    animals: list[Animal] = Field(min_length=1, max_length=3)
    happy: bool
    page: Page


class DrawAnimal(BaseModel):
    """Draw an animal."""

    model_config = ConfigDict(extra="forbid")

    animal: Animal
    count: Literal[1, 2, 3]


DRAW: Any = {
    "type": "function",
    "function": {
        "name": "draw_animal",
        "description": "Draw an animal.",
        "parameters": {
            "type": "object",
            "properties": {
                "animal": {"type": "string", "enum": ["cat", "dog", "bird"]},
                "count": {"type": "integer", "enum": [1, 2, 3]},
            },
            "required": ["animal", "count"],
            "additionalProperties": False,
        },
    },
}
SLEEP: Any = {"type": "function", "function": {"name": "sleep", "parameters": {"type": "object", "properties": {}}}}


def drawn(arguments: str) -> DrawAnimal:
    """The arguments of a call of `draw_animal`, validated."""
    return DrawAnimal.model_validate_json(arguments)
