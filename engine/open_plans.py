"""The plans that are made and not committed yet: where they end in their sequences, and which sequences were
aborted meanwhile.

One is open while a step runs; two while the next step is launched ahead. It does not depend on blocks or queues.
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
        """Open a plan behind the others."""
        self._ends.append(_ends(plan))

    def replace_last(self, plan: Plan) -> None:
        """Let the last plan be another one."""
        self._ends[-1] = _ends(plan)

    def drop_last(self) -> None:
        """Take back the last plan."""
        self._ends.pop()

    def close_first(self) -> None:
        """Close the first plan, if one is open: it is committed, or has failed. What was aborted has ended with it."""
        del self._ends[:1]
        self._aborting.clear()

    def clear(self) -> None:
        """Close all plans. What was aborted is still to be ended."""
        self._ends.clear()

    def __contains__(self, sequence_id: str) -> bool:
        return any(sequence_id in ends for ends in self._ends)

    def end_of(self, sequence_id: str) -> int:
        """The position up to which a sequence is being computed; 0 if it is in no plan."""
        return max((ends.get(sequence_id, 0) for ends in self._ends), default=0)

    def abort(self, sequence_id: str) -> None:
        """Note that a sequence of a plan is to end when the first one is closed."""
        self._aborting.add(sequence_id)

    def is_aborting(self, sequence_id: str) -> bool:
        """Whether a sequence is to end when the first plan is closed."""
        return sequence_id in self._aborting


def _ends(plan: Plan) -> dict[str, int]:
    return {chunk.sequence.id: chunk.start + chunk.length for chunk in plan}
