"""The JSON schema of the fields `num_experts` and `experts`, for /openapi.json.

It describes only: `server/experts/experts_object.py` reads the field, and what a model can run is known once it is
loaded.
"""

from typing import Any

Schema = dict[str, Any]
COUNT_SCHEMA: Schema = {"type": "integer", "minimum": 1}
COUNTS_SCHEMA: Schema = {"anyOf": [COUNT_SCHEMA, {"type": "array", "items": COUNT_SCHEMA}]}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
MOVED: Schema = {"type": "number", "minimum": -100, "maximum": 100}
RULE: dict[str, Schema] = {
    "normaliser": {
        "type": "string",
        "pattern": "^(trained|raw|kept|k2=[1-9][0-9]{0,3})$",
        "description": "How the weights of fewer experts than trained are scaled: the family's own way, not at all, to "
        "the share that the trained count would have, or by the share of the N best",
    },
    "threshold": SHARE | {"description": "An expert runs only if its score is at least this part of the best one's"},
    "top_p": SHARE | {"description": "Experts run up to the one that brings their share of all scores to this"},
    "repair": {"type": "boolean", "description": "Outputs of layers are brought to their spread at the trained count"},
    "reuse": {
        "type": "integer",
        "minimum": 0,
        "maximum": 4096,
        "description": "Up to so many further experts per token where the batch runs them anyway: the one rule with "
        "which an answer depends on the other requests of its batch",
    },
    "gate_offset": MOVED
    | {"description": "Added to the logit of every expert's gate; models whose experts have gates"},
    "free_bias": MOVED
    | {"description": "Added to the logits of experts that compute nothing, for choosing; models that have them"},
    "contrast": {
        "type": "object",
        "description": "Self-contrast decoding: every token is computed a second time, with the expert of one rank "
        "alone, and sampled from (1 + beta) · z - beta · z_weak of the two logits",
        "properties": {
            "beta": {"type": "number", "minimum": 0, "maximum": 10, "default": 0.5},
            "alpha": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": 1,
                "default": 0.1,
                "description": "Tokens below this part of the best one's probability are left out",
            },
            "weak_rank": {"type": "integer", "minimum": 1, "default": 2, "description": "1 is the best expert"},
        },
        "additionalProperties": False,
    },
}
SET: dict[str, Schema] = {
    "set": {"type": "string", "description": "The experts that may run: an expert set of the model, by its name"}
}
PHASES: dict[str, Schema] = {
    "prefill": COUNTS_SCHEMA | {"description": "Of the prompt's tokens; absent: the server's default"},
    "decode": COUNTS_SCHEMA | {"description": "Of generated tokens; absent: the server's default"},
}
PROFILE: Schema = {"type": "string", "description": "An option or a profile of the model's calibration, by its name"}
CASCADE: Schema = {
    "type": "object",
    "description": "The answer is generated at `low`, and generated again at `high` where the model was unsure of it",
    "properties": {
        "low": COUNTS_SCHEMA | {"description": "Experts of the first run"},
        "high": COUNTS_SCHEMA | {"description": "Experts of the second run; no layer may have fewer than at `low`"},
        "by": {
            "type": "string",
            "enum": ["entropy", "margin"],
            "default": "entropy",
            "description": "What is measured at each generated token of the model's own distribution, before "
            "temperature: its entropy in nats, or the difference of its two largest probabilities",
        },
        "threshold": {
            "type": "number",
            "minimum": 0,
            "maximum": 100,
            "description": "The second run takes place where the mean entropy is above it, or the mean margin (at most "
            "1) below it",
        },
    },
    "required": ["low", "high", "threshold"],
    "additionalProperties": False,
}
AUTO: Schema = {
    "type": "object",
    "description": "The server chooses among the options of the model's calibration",
    "properties": {
        "min_quality": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "The cheapest option with this relative quality; with max_itl_ms: none below it",
        },
        "max_itl_ms": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "The best option whose tokens come this fast at the present load",
        },
        "adapt": {"type": "boolean", "description": "Whether that is decided again while the answer is generated"},
    },
    "anyOf": [{"required": ["min_quality"]}, {"required": ["max_itl_ms"]}],
    "additionalProperties": False,
}


def _object(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


EXPERTS_SCHEMA: Schema = {
    "anyOf": [
        COUNT_SCHEMA,
        _object({"count": COUNTS_SCHEMA} | SET | RULE),
        _object(PHASES | SET | RULE),
        _object({"profile": PROFILE} | SET | RULE),
        _object({"cascade": CASCADE} | SET | RULE) | {"required": ["cascade"]},
        _object({"auto": AUTO}) | {"required": ["auto"]},
    ]
}
