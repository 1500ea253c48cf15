"""Collects what the MoE layers of one step report: routed pairs and loads of the step, pairs and routes of each
request.

Not here: how a step is run (`engine/runner.py`).
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.plan import Chunk, Observed, Plan
from engine.routes import Experts, StepRoutes, pack
from model.devices import Fetched
from model.shapes.feed_forward import FeedForward
from model.step import Observer


class ExpertStats(Observer):
    """Observes the passes of one step: those that make drafts, and then the plan's own.

    Reported tensors stay on the device that computed them until they are read. `layers`: how many mixtures there are.
    `uneven`: a token may run more or fewer pairs than its counts say, whatever its rule (`DecoderConfig.uneven`).
    """

    def __init__(self, layers: int = 0, uneven: bool = False) -> None:
        self.pairs = 0
        self.absent = 0  # token by token, the mixtures that it did not run
        self._layers, self._uneven = layers, uneven
        self._allowed_pairs = 0  # of the pass that runs, by its counts
        self.loads: list[Tensor] = []  # tokens per expert, a tensor per mixture or per pass
        self.load_count = 0  # mixtures whose loads these are
        self._used_LT: list[Tensor] = []  # of the pass that runs
        self._expert_LTK: list[Tensor] = []
        self._pairs_of: defaultdict[str, int] = defaultdict(int)  # of each sequence
        self._absent_of: defaultdict[str, int] = defaultdict(int)
        self._fetched: Fetched | None = None

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self._allowed_pairs += pairs
        self.loads.append(load_E)
        self.load_count += 1

    def routed_all(self, pairs_L: Sequence[int], load_N: Tensor, experts: Sequence[int]) -> None:
        self._allowed_pairs += sum(pairs_L)
        self.loads.append(load_N)
        self.load_count += len(pairs_L)

    def used(self, layer: int, used_T: Tensor) -> None:
        self._used_LT.append(used_T)

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        self._expert_LTK.append(expert_TK)

    def fetch(self) -> None:
        """Start to copy the reports of the pass to the host."""
        self._fetched = Fetched([*self.loads, *self._used_LT, *self._expert_LTK])

    def fetched(self, plan: Plan) -> None:
        """Wait for the copies, and count the pairs of the pass."""
        assert self._fetched is not None
        parts = iter(self._fetched.wait())
        for tensors in (self.loads, self._used_LT, self._expert_LTK):
            tensors[:] = [next(parts) for _ in tensors]
        self.count_pairs(plan)

    def count_pairs(self, plan: Plan) -> None:
        """After a pass: add its pairs, and those of each sequence of its plan if the mixtures reported them."""
        allowed, self._allowed_pairs = self._allowed_pairs, 0
        if not self._used_LT:
            self.pairs += allowed
            return
        used_LT = torch.stack(self._used_LT)
        used: list[int] = used_LT.sum(0).tolist()
        self.pairs += sum(used)
        for chunk, first, _ in _rows(plan):
            self._pairs_of[chunk.sequence.id] += sum(used[first : first + _tokens(chunk)])
        if self._uneven:
            self._count_absent(plan, used_LT.count_nonzero(0).tolist())
        self._used_LT.clear()

    def _count_absent(self, plan: Plan, ran: list[int]) -> None:
        """Add the mixtures that tokens did not run; `ran`: how many each token ran. Weak rows are left out, because the
        cost at the trained count is that of one row."""
        for chunk, first, is_weak in _rows(plan):
            if is_weak:
                continue
            absent = _tokens(chunk) * self._layers - sum(ran[first : first + _tokens(chunk)])
            self._absent_of[chunk.sequence.id] += absent
            self.absent += absent

    def observed(self, plan: Plan, mixtures: Sequence[FeedForward]) -> tuple[Observed, ...]:
        """What was observed of each chunk of the plan that ran last; empty if no request needs it."""
        if not self._pairs_of and not self._expert_LTK:
            return ()
        layers: list[Experts] = [expert_TK.cpu().numpy() for expert_TK in self._expert_LTK]
        routes = pack(layers, mixtures) if layers else None
        adaptive = any(shape.adaptive for shape in mixtures)
        rows = _rows(plan)
        return tuple(self._observed(chunk, first, routes, adaptive) for chunk, first, is_weak in rows if not is_weak)

    def _observed(self, chunk: Chunk, first: int, routes: StepRoutes | None, adaptive: bool) -> Observed:
        request = chunk.sequence.request
        uneven = self._uneven and request.id in self._pairs_of
        pairs = self._pairs_of[request.id] if adaptive or uneven or request.budget.rule.adaptive else None
        own = None
        if routes is not None and request.return_routes:
            own = routes.part(first, _tokens(chunk))
        return Observed(pairs, own, self._absent_of[request.id])


def _tokens(chunk: Chunk) -> int:
    return chunk.length + len(chunk.drafts)


def _rows(plan: Plan) -> list[tuple[Chunk, int, bool]]:
    """The rows of the batch: each chunk, the number of its first token in the batch, and whether it is the weak row."""
    rows, first = [], 0
    for chunk in plan:
        for number in range(chunk.sequence.row_count):
            rows.append((chunk, first, number > 0))
            first += _tokens(chunk)
    return rows
