"""Makes untrusted text (of models and servers) harmless to a terminal. It looks at characters, not at their meaning."""

_KEPT = "\n\t"
# An escape is shown as a symbol, not removed, so that its presence is visible, and the rest of "ESC [ 3 1 m" is plain
# text even where chunks cut the sequence in two. A carriage return could overwrite a line, but is mostly a part of a
# line end; it is removed.
_C0 = [code for code in range(0x20) if chr(code) not in _KEPT]
_TABLE: dict[int, str | None] = {}
_TABLE |= {code: chr(0x2400 + code) for code in _C0}
_TABLE |= {ord("\r"): None, 0x7F: "\u2421"}
_TABLE |= {code: f"<{code:02x}>" for code in range(0x80, 0xA0)}  # C1: control characters for some terminals
_TABLE |= {code: "\ufffd" for code in range(0xD800, 0xE000)}  # lone surrogates: no terminal can be sent them

MAX_LINE = 500  # characters of an untrusted message


def plain(text: str) -> str:
    """The text with every control character except newline and tab made visible or removed."""
    return text.translate(_TABLE)


def one_line(text: str) -> str:
    """The same on one line, cut where it is too long."""
    words = " ".join(plain(text).split())
    return words if len(words) <= MAX_LINE else words[:MAX_LINE] + " …"
