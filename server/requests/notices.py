"""What a request asked for and did not get, as headers of its answer: tools left out, and fields that nothing reads.

It depends on names, not on bodies.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SKIPPED_TOOLS, IGNORED_FIELDS = "x-skipped-tools", "x-ignored-fields"
MAX_NAMES = 16  # in one header; the number of further ones follows
MAX_NAME = 128  # characters
UNSAFE = re.compile(r"[^A-Za-z0-9_.:@\[\]-]")


@dataclass(frozen=True, slots=True)
class Notices:
    """The names of both kinds."""

    skipped_tools: Sequence[str] = ()
    ignored_fields: Sequence[str] = ()

    @property
    def headers(self) -> dict[str, str]:
        """The headers; none where everything was read."""
        named = {SKIPPED_TOOLS: self.skipped_tools, IGNORED_FIELDS: self.ignored_fields}
        return {header: _in_header(names) for header, names in named.items() if names}


def _in_header(names: Iterable[str]) -> str:
    """Names as the value of a header, each once. What a header may not hold, or what divides names, becomes `_`, and so
    does an empty name."""
    unique = list(dict.fromkeys(UNSAFE.sub("_", name[:MAX_NAME]) or "_" for name in names))
    rest = len(unique) - MAX_NAMES
    return ", ".join(unique[:MAX_NAMES] + ([f"+{rest}"] if rest > 0 else []))
