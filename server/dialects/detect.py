"""Which dialect a checkpoint writes, from its chat template and its special tokens, or by a name that someone chose.

It reads templates as text, for the marks in them; it renders none.
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
from server.dialects.reasoning import Thoughts

# Any of these betrays a family. Llama comes last: fine-tunes of it keep its tokens and write as others do.
_SIGNS = {
    "harmony": (harmony.CHANNEL,),
    "deepseek": (deepseek.CALLS, deepseek.CALL),
    "mistral": (mistral.CALLS,),
    "hermes": (hermes.OPEN,),
    "llama": (*TAGS, '"parameters": dictionary'),
}
_THOUGHTS = (("[THINK]", "[/THINK]"), ("<think>", "</think>"))
NAMES = ("plain", *sorted(_SIGNS))


def detect(template: str | None, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS) -> Dialect:
    """The dialect of a checkpoint. The template's word counts first.

    `specials`: the special tokens and their ids; `added`: the other tokens that stand for a text as a whole.
    """
    family = _family(template or "") or _family("\0".join((*specials, *added)))
    thinks = _pair(template or "", specials) is not None
    return _make(family or ("hermes" if thinks else "plain"), template or "", specials, added, False)


def by_name(
    name: str, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS, template: str | None = None
) -> Dialect:
    """The dialect called `name`. With the template, too, it knows whether this checkpoint thinks.

    Raises:
        ValueError: there is none of that name; lists those there are.
    """
    if name not in NAMES:
        raise ValueError(f"dialect must be one of {', '.join(NAMES)}, got {name!r:.64}")
    return _make(name, template or "", specials, added, template is None and name in ("hermes", "deepseek"))


def _family(text: str) -> str | None:
    return next((name for name, signs in _SIGNS.items() if any(sign in text for sign in signs)), None)


def _pair(template: str, specials: Mapping[str, int]) -> tuple[str, str] | None:
    """Merely added tokens tell nothing: Qwen3's models that do not think have them too."""
    return next((pair for pair in _THOUGHTS if pair[0] in template or pair[0] in specials), None)


def _make(name: str, template: str, specials: Mapping[str, int], added: Mapping[str, int], thinks: bool) -> Dialect:
    """`thinks`: it does so even if neither template nor tokens say it."""
    if name == "plain":
        return Plain(specials, added)
    if name == "harmony":
        return Harmony(specials, added)
    pair = _pair(template, specials)
    opening, closing = pair or _THOUGHTS[0 if name == "mistral" else 1]
    thoughts = Thoughts(opening, closing, thinks or pair is not None, opening in specials)
    if name == "deepseek":
        return DeepSeek(specials, thoughts, added, deepseek.FENCE in template)
    return {"hermes": Hermes, "mistral": Mistral, "llama": Llama}[name](specials, thoughts, added)
