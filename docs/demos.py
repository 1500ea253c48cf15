"""The tables of docs/mixtures.md about the demo models, from the cards beside them. Nothing is measured here."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.demos.recipes import RECIPES
from weights.folder import BUNDLED, bundled_models, read_card

Row = Mapping[str, Any]


def section() -> str:
    """A table for each demo model that is there, in the recipes' order."""
    cards = [read_card(BUNDLED / name) for name in RECIPES if name in bundled_models()]
    if not cards:
        return ""
    machines = sorted({card["machine"] for card in cards})
    return f"Speed: {'; '.join(machines)}.\n\n" + "\n".join(map(_demo, cards))


def _demo(card: Mapping[str, Any]) -> str:
    """What each count and each further wish costs and gives."""
    trained = card["trained"]
    best = next(row for row in card["quality"] if row["num_experts"] == trained)
    size = f"{card['parameters'] / 1e6:.2f} M parameters, trained at K = {trained}"
    head = f"**`{card['name']}`** (`{card['family']}`): {size}; {card['held_out_tokens']:,} held-out tokens.\n\n"
    others = {row["num_experts"]: row for row in card["restrictions"]}
    columns = ["asked", "loss", "bits per byte", "best guesses", "of those at the trained count", "experts that ran"]
    columns += [f"loss, `{name}`" for name in sorted({row["restriction"] for row in others.values()})]
    columns += ["tokens/s, 1 stream", "16 streams"]
    rows = [_cells(row, best, others) for row in [*card["quality"], *card["rules"]]]
    return head + _table(columns, rows)


def _cells(row: Row, best: Row, others: Mapping[int, Row]) -> list[str]:
    own = [name for name in ("gate_offset", "free_bias") if name in row]
    asked = f"`{own[0]}` {row[own[0]]:+g}" if own else f"K = {row['num_experts']}"
    cells = [asked, f"{row['loss']:.3f}", f"{row['bits_per_byte']:.3f}", f"{row['accuracy']:.1%}"]
    cells += [f"{row['accuracy'] / best['accuracy']:.1%}", f"{row['mean_experts']:.2f}"]
    if others:
        cells.append(f"{others[row['num_experts']]['loss']:.3f}")
    speeds = row["tokens_per_second"]
    return [*cells, *(f"{speeds[batch]:,}" for batch in ("1", "16"))]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
