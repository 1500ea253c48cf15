"""`OpenPlans`: the plans that are made and not committed yet, how far they compute each sequence, and which of these
sequences were aborted since.

One plan is open while a step runs; two are open while the next step is launched ahead. It does not depend on blocks or
queues.
"""

from engine.plan import Plan


class OpenPlans:
    """Plans in the order in which they are committed."""

    def __init__(self) -> None:
        self._ends: list[dict[str, int]] = []  # of each plan: by sequence, where its chunk ends
        self._aborting: set[str] = set()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, plan: Plan) -> None:
        """Open a plan after the others."""
        self._ends.append(_ends(plan))

    def replace_last(self, plan: Plan) -> None:
        """Replace the last plan."""
        self._ends[-1] = _ends(plan)

    def drop_last(self) -> None:
        """Remove the last plan."""
        self._ends.pop()

    def close_first(self) -> None:
        """Close the first plan, if one is open: it is committed, or has failed. Aborted sequences have ended with
        it."""
        del self._ends[:1]
        self._aborting.clear()

    def clear(self) -> None:
        """Close all plans. Aborted sequences are still to be ended."""
        self._ends.clear()

    def __contains__(self, sequence_id: str) -> bool:
        return any(sequence_id in ends for ends in self._ends)

    def end_of(self, sequence_id: str) -> int:
        """The position up to which a sequence is being computed; 0 if it is in no plan."""
        return max((ends.get(sequence_id, 0) for ends in self._ends), default=0)

    def abort(self, sequence_id: str) -> None:
        """Mark a sequence to end when the first plan is closed."""
        self._aborting.add(sequence_id)

    def is_aborting(self, sequence_id: str) -> bool:
        """Whether a sequence is to end when the first plan is closed."""
        return sequence_id in self._aborting


def _ends(plan: Plan) -> dict[str, int]:
    return {chunk.sequence.id: chunk.start + chunk.length for chunk in plan}
