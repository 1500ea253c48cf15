"""Text that the model writes itself at the trained count, for checkpoints that come without any.

On such text the trained count is the best possible by construction: the loss of another count exceeds its own by the
KL divergence. It says what a count changes, not how well the model knows anything.
"""

from collections.abc import Sequence

from calibration.progress import Progress
from engine.engine import Engine
from engine.types import Request, Sampling
from model.budget import ExpertBudget

ROWS = 16  # sequences at a time


def sample_windows(
    engine: Engine, budget: ExpertBudget, start: Sequence[int], length: int, rows: int, progress: Progress
) -> list[list[int]]:
    """So many windows of `length` tokens that begin with `start`, drawn at temperature 1 from the model's distribution.

    The seeds are fixed. An end-of-text token does not end a window: what follows it is another document.
    """
    texts: dict[str, list[int]] = {}
    with progress.stage("writing a text", rows) as stage:
        for first in range(0, rows, ROWS):
            for row in range(first, min(rows, first + ROWS)):
                sampling = Sampling(max_tokens=length - len(start), seed=row)
                engine.add(Request(f"text-{row}", tuple(start), budget, sampling))
                texts[f"text-{row}"] = list(start)
            while engine.has_work:
                for event in engine.step().events:
                    if event.token is not None:
                        texts[event.request_id].append(event.token)
                    if event.finish is not None:
                        stage.advance()
    return list(texts.values())
