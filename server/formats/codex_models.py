"""The models as Codex reads them: it looks for `models` in the answer of /v1/models, with fields of its own.

Without an entry Codex assumes a context of its own, and tools that a model may not know. The fields are those of Codex
0.9x to 0.15x; an entry that a version cannot read makes it fall back to the same assumptions.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# In place of the long text that Codex would send: contexts are short here. `model_instructions_file` replaces it.
INSTRUCTIONS = (
    "You are a coding agent in a user's terminal. Read the files that a task is about before you change them, use the "
    "tools to run commands and to edit files, keep changes small, and check them. When the task is done, say in a few "
    "sentences what was changed."
)
MAX_OUTPUT_BYTES = 10_000  # of a tool's output, which Codex cuts beyond


def codex_models(cards: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each card of /v1/models, in the same order."""
    return [_entry(place, card) for place, card in enumerate(cards)]


def _entry(place: int, card: Mapping[str, Any]) -> dict[str, Any]:
    moe, length = card["meta"]["moe"], card["max_model_len"]
    return {
        "slug": card["id"],
        "display_name": card["id"],
        "description": f"{moe['default']} experts per token, of {moe['num_experts_total']}",
        "default_reasoning_level": None,
        "supported_reasoning_levels": [],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": place,
        "availability_nux": None,
        "upgrade": None,
        "base_instructions": INSTRUCTIONS,
        "supports_reasoning_summaries": False,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": None,  # its free form is a tool of a kind that is left out
        "truncation_policy": {"mode": "bytes", "limit": MAX_OUTPUT_BYTES},
        "supports_parallel_tool_calls": True,
        "context_window": length,
        "max_context_window": length,
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
    }
