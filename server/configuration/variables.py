"""Checks the environment variables with the server's prefix: with an unknown one the server does not start.

A misspelled variable must not open what it was meant to close. Not here: values (see `server/settings.py`).
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping

from engine.environment import HANDED_ON, PREFIX
from model.errors import MoedialError

OTHER_VARIABLES = frozenset(
    {"MOEDIAL_URL", "MOEDIAL_KEY", *HANDED_ON}
)  # of the command-line clients and of the native kernels
KEYS = frozenset({"MOEDIAL_API_KEYS", "MOEDIAL_ADMIN_KEY", "MOEDIAL_KEY"})
# Kubernetes and Docker set these for a service or container of this name.
CONTAINER_LINKS = re.compile(r"MOEDIAL_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)")


class BadSetting(MoedialError):
    """An option or variable with which the server does not start."""


def refuse_unknown(environment: Mapping[str, str], settings: Collection[str], filled: Collection[str]) -> None:
    """Check the names of all variables with the prefix, in any case, and that those of `filled` are not blank.

    Raises:
        BadSetting: names every unknown variable, and what it may have been meant to be.
    """
    known = {PREFIX + name.upper() for name in settings}
    if unknown := list(_unknown(environment, known | OTHER_VARIABLES)):
        raise BadSetting("; ".join(f"{name!r:.80} is no setting{_meant(name, known)}" for name in unknown))
    for name, value in environment.items():
        if name.upper() in {PREFIX + field.upper() for field in filled} and not value.strip():
            raise BadSetting(f"{name} is set, but holds nothing; unset it to serve without")


def forget_keys(environment: MutableMapping[str, str]) -> None:
    """Remove all keys from the environment, so that no process which is started later gets them."""
    for name in [name for name in environment if name.upper() in KEYS]:
        del environment[name]


def nearest(word: str, known: Collection[str]) -> str:
    """`; did you mean …?` with the known word that is closest to `word`; empty if none is close."""
    close = difflib.get_close_matches(word.lower(), known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(environment: Mapping[str, str], known: Collection[str]) -> Iterator[str]:
    for name in environment:
        upper = name.upper()
        if upper.startswith(PREFIX) and upper not in known and not CONTAINER_LINKS.fullmatch(upper):
            yield name


def _meant(name: str, known: Collection[str]) -> str:
    """A hint at the closest known variable. The prefix, which all share, is left out of the comparison."""
    suffixes = [word.removeprefix(PREFIX) for word in known]
    close = difflib.get_close_matches(name.upper().removeprefix(PREFIX), suffixes, 1)
    return f"; did you mean {PREFIX}{close[0]}?" if close else "; `moedial serve --help` lists them"
