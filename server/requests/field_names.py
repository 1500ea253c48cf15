"""The names in an error of the chat that a body was turned into, turned back into those of the body's own API."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from model.errors import InvalidRequest


class FieldNames:
    """Names of chat fields, and what an API calls them."""

    def __init__(self, anywhere: Mapping[str, str], at_start: Mapping[str, str]) -> None:
        """`anywhere` are replaced in all of a message; these and `at_start` where it begins with them, as paths do."""
        self._names = {**anywhere, **at_start}
        # not within quotes, which enclose values of the request, nor as a part of another name
        self._anywhere = re.compile(rf"(?<![\w.'\"])({'|'.join(anywhere)})(?![\w'\"])")
        self._at_start = re.compile(rf"({'|'.join(self._names)})(?=[\[.:]|$)")

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The same error with the API's names."""
        start = self._rename_start(error.message)
        message = self._anywhere.sub(lambda found: self._names[found[0]], start)
        return type(error)(message, None if error.param is None else self._rename_start(error.param), error.code)

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Renames what the errors name that are raised inside."""
        try:
            yield
        except InvalidRequest as error:
            raise self.renamed(error) from None

    def _rename_start(self, text: str) -> str:
        """`text` with the name that it begins with replaced."""
        found = self._at_start.match(text)
        return self._names[found[0]] + text[found.end() :] if found else text
