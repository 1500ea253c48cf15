"""The intake: adds requests from the HTTP process to the engine, at once or when their grammars have been compiled.

It does not depend on sockets.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

from engine.engine import Engine
from engine.grammars.matcher import Matcher
from engine.process.messages import Compiled, FromEngine, Rejected
from engine.types import Request
from model.budget import ExpertCounts
from model.errors import InvalidRequest

Job = tuple[Request | None, Future[Matcher]]  # None: only a grammar is to be compiled


class Intake:
    """Adds requests to the engine: at once, or, if a grammar must be compiled first, when that is done."""

    def __init__(self, engine: Engine, send: Callable[[FromEngine], None], wake: Callable[[], None]) -> None:
        self.engine, self.send, self._wake = engine, send, wake
        self.jobs: dict[str, Job] = {}

    def submit(self, request: Request) -> None:
        with self._refusing(request.id):
            if request.sampling.grammar:
                self._start(request.id, request.sampling.grammar, request)
            else:
                self.engine.add(request)

    def compile(self, id: str, grammar: str) -> None:
        with self._refusing(id):
            self._start(id, grammar, None)

    def abort(self, request_id: str) -> None:
        _, job = self.jobs.pop(request_id, (None, None))
        if job is None:
            self.engine.abort(request_id)
        else:
            job.cancel()
            self.send(Rejected(request_id, "aborted before it began", None, "aborted"))

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        """Of a request that runs, or of one whose grammar is still being compiled."""
        request, job = self.jobs.get(request_id, (None, None))
        if request is not None and job is not None:
            self.jobs[request_id] = replace(request, budget=request.budget.changed(0, counts)), job
        else:
            self.engine.set_counts(request_id, counts)

    def admit(self) -> bool:
        """Add the requests whose grammars have been compiled; returns whether there were any."""
        if not self.jobs:
            return False
        self.engine.masks.collect()
        done = [id for id, job in self.jobs.items() if _compiled(*job)]
        for id in done:
            request, job = self.jobs.pop(id)
            with self._refusing(id):
                matcher = job.result()
                if request is not None:
                    self.engine.add(request, matcher)
                else:
                    self.send(Compiled(id))
        return bool(done)

    def _start(self, id: str, grammar: str, request: Request | None) -> None:
        self.jobs[id] = request, self.engine.masks.compiler().start(grammar, self._wake)

    @contextmanager
    def _refusing(self, id: str) -> Iterator[None]:
        try:
            yield
        except InvalidRequest as error:
            self.send(Rejected(id, error.message, error.param, error.code))


def _compiled(request: Request | None, job: Future[Matcher]) -> bool:
    """Whether a grammar was compiled or refused. A request waits for its first mask in the engine's queue; a bare
    grammar counts as compiled when the mask process has it."""
    if not job.done():
        return False
    if request is not None or job.exception() is not None:
        return True
    matcher = job.result()
    matcher.open()
    return matcher.ready
