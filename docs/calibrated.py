"""Tables of the bundled models' calibrations, for README.md, docs/experts.md and the models' cards.

They say what the files say; nothing is measured here. A model without a calibration has no rows.
"""

from collections.abc import Mapping, Sequence
from math import log

import msgspec

from server.experts.calibration_card import experts_field, is_plain_count
from weights.calibration import FILE, Calibration, Option
from weights.folder import BUNDLED, bundled_models, read_card

PICTURE = "quality.svg"  # in docs/, by `docs/curve.py`
README_COUNTS = (1, 2, 4, 8)
SAMPLES = {  # what the default model wrote at its smallest and largest count: README.md has the request
    1: ", there was a little girl named Lily. She loved playing outside in the sunshine. One day, she went to the park "
    "with her mommy. They played on the swings and the slide. Lily was having so much fun that she didn't notice her "
    "mommy. … The dog started barking and chasing her. Lily ran around, but the dog was too fast. She quickly ran away "
    "quickly,",
    8: ", there was a little girl named Lily. She loved playing outside in the sunshine. One day, she went to the park "
    "with her mommy. They played on the swings and went down the slide. Suddenly, Lily saw a big dog running towards "
    'her. She got scared and started to cry. Her mommy hugged her and said, "It\'s okay to be scared, sweetie. …"',
}
KINDS = {"infinity-stories": "∞-MoE, the default", "topk-stories": "its top-k twin, 32 experts"}
Calibrations = Mapping[str, Calibration]


def bundled_calibrations() -> Calibrations:
    """The calibrations that lie beside the bundled models, by model."""
    files = {name: BUNDLED / name / FILE for name in bundled_models()}
    return {
        name: msgspec.json.decode(file.read_bytes(), type=Calibration) for name, file in files.items() if file.is_file()
    }


def dial_section(calibration: Calibration) -> str:
    """The same request at the smallest and the largest count of the default model: speed, loss and text."""
    few, many = (next(one for one in plain_counts(calibration) if one.counts[0] == count) for count in SAMPLES)
    rows = [
        [str(one.counts[0]), _speed(one, "1"), f"{one.quality.loss:.3f}", SAMPLES[one.counts[0]]] for one in (few, many)
    ]
    time = few.relative_cost / many.relative_cost
    loses = few.quality.loss - many.quality.loss
    said = (
        f"The first takes {100 * time:.0f} % of the second one's time per token, and loses {loses:.2f} nats per token."
    )
    return f"{_table(['K', 'tokens/s', 'loss', 'text'], rows, texts=('text',))}\n{said}\n"


def readme_section(calibrations: Calibrations) -> str:
    """The picture, and loss and speed of each model at some counts: two rows per model."""
    rows = []
    for name, calibration in calibrations.items():
        plain = [option for option in plain_counts(calibration) if option.counts[0] in README_COUNTS]
        rows.append([f"{name} ({KINDS.get(name, 'bundled')}): loss", *(f"{one.quality.loss:.3f}" for one in plain)])
        rows.append(["tokens/s", *(_speed(one, "1") for one in plain)])
    machine = next(iter(calibrations.values())).machine
    table = _table([f"one stream; {machine}", *(f"K = {count}" for count in README_COUNTS)], rows)
    return f"![held-out loss and speed per expert count](docs/{PICTURE})\n\n{table}"


def counts_table(calibration: Calibration) -> str:
    """What each count keeps and costs."""
    head = ["K", "relative quality", "agreement", "KL", "loss", "tokens/s, 1 stream", "16 streams", "time per token"]
    rows = [[str(option.counts[0]), *_quality(option), *_cost(option)] for option in plain_counts(calibration)]
    return f"{_measured(calibration)}\n\n{_table(head, rows)}"


def options_table(calibration: Calibration) -> str:
    """What profiles, normalisers, repairs and thresholds keep and cost."""
    head = ["option", "`experts`", "mean K", "relative quality", "agreement", "KL", "loss"]
    head += ["tokens/s, 1 stream", "16 streams", "time per token"]
    rows = [
        [f"`{option.name}`", _written(option), f"{option.mean_count:.2f}", *_quality(option), *_cost(option)]
        for option in calibration.options
        if not is_plain_count(option)
    ]
    return _table(head, rows, texts=("`experts`",)) if rows else "None of them helps at any count.\n"


def card_section(name: str, calibration: Calibration) -> str:
    """The quality section of a bundled model's card."""
    card = read_card(BUNDLED / name)
    head = ["K", "loss (nats)", "perplexity", "bits per byte", "relative quality", "agreement", "KL"]
    head += ["tokens/s, 1 stream", "16 streams", "time per token"]
    rows = []
    for option in plain_counts(calibration):
        quality = option.quality
        bits = quality.loss / log(2) / card["bytes_per_token"]
        figures = [f"{quality.loss:.4f}", f"{quality.perplexity:.3f}", f"{bits:.4f}", f"{quality.relative:.4f}"]
        figures += [f"{quality.agreement:.1%}", f"{quality.kl:.4f}", *_cost(option)]
        rows.append([str(option.counts[0]), *figures])
    return f"{_measured(calibration)}\n\n{_table(head, rows)}\n{options_table(calibration)}"


def plain_counts(calibration: Calibration) -> list[Option]:
    """The options that are a count and nothing else."""
    return [option for option in calibration.options if is_plain_count(option)]


def _measured(calibration: Calibration) -> str:
    return (
        f"`{calibration.model}`, trained at K = {calibration.trained}; {calibration.text}, "
        f"{calibration.tokens:,} tokens scored; {calibration.dtype}, {calibration.kernels}, {calibration.machine}."
    )


def _quality(option: Option) -> list[str]:
    quality = option.quality
    return [f"{quality.relative:.4f}", f"{quality.agreement:.1%}", f"{quality.kl:.4f}", f"{quality.loss:.4f}"]


def _cost(option: Option) -> list[str]:
    return [_speed(option, "1"), _speed(option, "16"), f"{option.relative_cost:.2f}"]


def _speed(option: Option, batch: str) -> str:
    rate = option.speed and option.speed.tokens_per_second.get(batch)
    return f"{rate:,.0f}" if rate else "–"


def _written(option: Option) -> str:
    return f"`{msgspec.json.encode(experts_field(option)).decode()}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[str] = ()) -> str:
    """A markdown table; figures to the right, the first column and those of `texts` to the left."""
    rule = ["---" if name in (head[0], *texts) else "--:" for name in head]
    lines = [head, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
