"""The expert sets of the served checkpoint that requests can name, or the reason why one cannot be used.

Read once, when the server starts. Not here: their form (see `weights/expert_sets.py`), and how they were measured.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import structlog

from model.budget import ExpertBudget, RoutingRule
from model.errors import CheckpointError, InvalidRequest, shown
from model.expert_range import ExpertRange
from weights.calibration import checkpoint_hash
from weights.expert_sets import ExpertSet, Loss, every, read

log = structlog.get_logger("server")


@dataclass(frozen=True)
class ServedSets:
    """Sets by their name, and of those that cannot be used the reason."""

    sets: Mapping[str, ExpertSet] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def fitting(self, experts: ExpertRange) -> "ServedSets":
        """The same, without those that the model as it was loaded cannot run."""
        fits, refused = dict(self.sets), dict(self.refused)
        for name, layers in self._layers.items():
            try:
                experts.check(ExpertBudget((), rule=RoutingRule(kept=layers)), "experts")
            except InvalidRequest as error:
                del fits[name]
                refused[name] = error.message
                log.warning("an expert set is not used", name=name, reason=error.message)
        return ServedSets(fits, refused)

    def kept(self, name: str, param: str) -> tuple[str, ...]:
        """The experts that a set keeps, as `RoutingRule.kept`. Raises InvalidRequest where this is no set's name."""
        if name in self._layers:
            return self._layers[name]
        if name in self.refused:
            raise InvalidRequest(f"{param}: the expert set {shown(name)} cannot be used: {self.refused[name]}", param)
        close = difflib.get_close_matches(name[:64], self.sets, 1)
        if close:
            hint = f"did you mean {close[0]!r}?"
        elif self.sets:
            hint = f"it has {', '.join(self.sets)}"
        else:
            hint = "it has none; the operator makes one with `moedial expert-set`"
        raise InvalidRequest(f"{param}: {shown(name)} is not an expert set of this model; {hint}", param)

    @cached_property
    def _layers(self) -> Mapping[str, tuple[str, ...]]:
        return {name: found.layers for name, found in self.sets.items()}

    def rows(self) -> list[dict[str, Any]]:
        """What a model card says of each."""
        return [_row(found) for found in self.sets.values()]


NO_SETS = ServedSets()


def load_sets(model: Path) -> ServedSets:
    """The sets of the checkpoint at `model`. One that is damaged or of another checkpoint is not used: the log says
    so, and so does the answer to a request that names it."""
    sets: dict[str, ExpertSet] = {}
    refused: dict[str, str] = {}
    paths = every(model)
    checkpoint = checkpoint_hash(model) if paths else ""
    for name, path in paths.items():
        try:
            sets[name] = read(path, checkpoint)
        except CheckpointError as error:
            log.warning("an expert set is not used", name=name, reason=str(error))
            refused[name] = str(error).replace(str(path), path.name)  # a path of this machine is nothing for clients
    return ServedSets(sets, refused)


def _row(found: ExpertSet) -> dict[str, Any]:
    row = {"name": found.name, "kept": found.kept, "text": found.text, "least_mass": round(min(found.mass), 4)}
    losses = {"task": _losses(found.task)} | ({"other": _losses(found.other)} if found.other else {})
    return row | {"loss": losses}


def _losses(loss: Loss) -> dict[str, float]:
    return {"all": round(loss.all, 4), "kept": round(loss.kept, 4)}
