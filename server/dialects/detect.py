"""Finds the dialect of a checkpoint from its chat template and its special tokens, or by the name in a setting.

It searches templates for delimiters; it renders none.
"""

from collections.abc import Mapping

from server.dialects import deepseek, harmony, hermes, mistral
from server.dialects.base import Dialect
from server.dialects.deepseek import DeepSeek
from server.dialects.grammar import NO_TOKENS
from server.dialects.harmony import Harmony
from server.dialects.hermes import Hermes
from server.dialects.llama import TAGS, Llama
from server.dialects.mistral import Mistral
from server.dialects.plain import Plain
from server.dialects.reasoning import ReasoningTags

# Any of these tells a family. Llama comes last: its fine-tunes keep its tokens and may write as other families do.
_FAMILY_DELIMITERS = {
    "harmony": (harmony.CHANNEL,),
    "deepseek": (deepseek.CALLS, deepseek.CALL),
    "mistral": (mistral.CALLS,),
    "hermes": (hermes.OPEN,),
    "llama": (*TAGS, '"parameters": dictionary'),
}
_REASONING_TAGS = (("[THINK]", "[/THINK]"), ("<think>", "</think>"))
DIALECTS = ("plain", *sorted(_FAMILY_DELIMITERS))


def detect(template: str | None, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS) -> Dialect:
    """The dialect of a checkpoint; the template decides before the tokens.

    `specials`: the special tokens and their ids; `added`: the other tokens that stand for a text as a whole.
    """
    family = _family(template or "") or _family("\0".join((*specials, *added)))
    reasons = _reasoning_tags(template or "", specials) is not None
    return _make(family or ("hermes" if reasons else "plain"), template or "", specials, added, False)


def dialect_named(
    name: str, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS, template: str | None = None
) -> Dialect:
    """The dialect called `name`; the template says whether this checkpoint reasons.

    Raises:
        ValueError: there is none of that name; the message lists all.
    """
    if name not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}, got {name!r:.64}")
    return _make(name, template or "", specials, added, template is None and name in ("hermes", "deepseek"))


def _family(text: str) -> str | None:
    for name, delimiters in _FAMILY_DELIMITERS.items():
        if any(delimiter in text for delimiter in delimiters):
            return name
    return None


def _reasoning_tags(template: str, specials: Mapping[str, int]) -> tuple[str, str] | None:
    """The reasoning tags of a checkpoint. Added tokens do not count: Qwen3's models without reasoning have them too."""
    for opening, closing in _REASONING_TAGS:
        if opening in template or opening in specials:
            return opening, closing
    return None


def _make(name: str, template: str, specials: Mapping[str, int], added: Mapping[str, int], reasons: bool) -> Dialect:
    """`reasons`: the checkpoint does so even if neither template nor tokens tell."""
    if name == "plain":
        return Plain(specials, added)
    if name == "harmony":
        return Harmony(specials, added)
    pair = _reasoning_tags(template, specials)
    opening, closing = pair or _REASONING_TAGS[0 if name == "mistral" else 1]
    reasoning = ReasoningTags(opening, closing, reasons or pair is not None, opening in specials)
    if name == "deepseek":
        return DeepSeek(specials, reasoning, added, deepseek.FENCE in template)
    return {"hermes": Hermes, "mistral": Mistral, "llama": Llama}[name](specials, reasoning, added)
