"""Makes text of strangers (models, servers) harmless to a terminal. It knows characters, not what they say."""

_KEPT = "\n\t"
# An escape is shown as a picture, not removed: what is left of "ESC [ 3 1 m" is then plain text, even if a sequence is
# cut in two by chunks, and nobody is kept from seeing that it was there. A carriage return could overwrite a line, but
# is mostly the first half of a line end, so it goes without a trace.
_TABLE: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}
_TABLE |= {ord("\r"): None, 0x7F: "\u2421"}
_TABLE |= {code: f"<{code:02x}>" for code in range(0x80, 0xA0)}  # C1: some terminals obey these too
_TABLE |= {code: "\ufffd" for code in range(0xD800, 0xE000)}  # lone surrogates: no terminal can be sent them

LINE = 500  # characters of a foreign message that are worth reading


def plain(text: str) -> str:
    """The text with every control character but newline and tab made visible, or gone."""
    return text.translate(_TABLE)


def one_line(text: str) -> str:
    """The same on one line, cut where it would fill the screen."""
    words = " ".join(plain(text).split())
    return words if len(words) <= LINE else words[:LINE] + " …"
