"""The models that /v1/models lists: the loaded model, and its aliases, each with an expert count of its own.

They are known once the engine has loaded the model. Nothing here runs a request.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from engine.types import EngineInfo
from model.errors import InvalidRequest, shown
from server.errors import ModelNotFound
from server.experts.calibration import UNCALIBRATED, ServedCalibration
from server.experts.calibration_card import calibrated_fields, quality_rows, source
from server.experts.lowering import steps_of
from server.experts.options import CalibratedOptions
from server.experts.policies import FAST, tiers
from server.experts.prices import Prices
from server.experts.requested_count import OptionName, Requested, RequestedCount, RequestedSet
from server.experts.selection import Selection, aliases_for, resolve, rounded
from server.experts.sets import NO_SETS, ServedSets
from server.settings import Settings
from server.version import fingerprint_of
from weights.calibration import Option

_COUNT_SUFFIX = re.compile(r"k[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class ServedModels:
    """One loaded model under its name and its aliases."""

    name: str
    info: EngineInfo
    default_count: int
    aliases: Mapping[str, int]  # full names, NAME@suffix
    quality: tuple[Any, ...]
    created: int
    fingerprint: str  # system_fingerprint of answers
    options: CalibratedOptions
    tiers: Mapping[str, Option]  # by full name; an alias of the operator's wins
    lowering: tuple[Option, ...]  # the default, and what brownout may run in its place; empty: without brownout
    calibration: ServedCalibration = UNCALIBRATED
    tells_routes: bool = False  # whether requests may have return_routed_experts
    prices: Prices | None = None  # None: the operator set none
    sets: ServedSets = NO_SETS
    set_aliases: Mapping[str, str] = field(default_factory=dict)  # full names; aliases of counts and options win

    @classmethod
    def build(
        cls,
        settings: Settings,
        info: EngineInfo,
        card: Mapping[str, Any],
        created: int,
        calibration: ServedCalibration = UNCALIBRATED,
        sets: ServedSets = NO_SETS,
    ) -> "ServedModels":
        """The models that the settings and the loaded model make.

        Raises:
            InvalidRequest: the operator's counts do not fit the model that was loaded.
        """
        default = settings.default_num_experts or info.experts.trained
        if info.experts.layers:
            info.experts.budget(default, "default_num_experts")
        suffixes = aliases_for(settings.aliases, info.experts)
        aliases = {f"{settings.name}@{suffix}": count for suffix, count in suffixes.items()}
        fingerprint = fingerprint_of(settings.name, info, default)
        measured = calibration.calibration
        quality = tuple(quality_rows(measured) if measured else card.get("quality") or ())
        options = CalibratedOptions.build(calibration, info.experts)
        fast = settings.brownout_quality if settings.brownout else FAST
        named = {f"{settings.name}@{tier}": option for tier, option in tiers(options.options, fast).items()}
        own = {alias: option for alias, option in named.items() if alias not in aliases}
        sets = sets.fitting(info.experts)
        of_sets = {f"{settings.name}@{name}": name for name in sets.sets if not _COUNT_SUFFIX.fullmatch(name)}
        return cls(
            settings.name,
            info,
            default,
            aliases,
            quality,
            created,
            fingerprint,
            options,
            tiers=own,
            lowering=steps_of(settings, options, info.experts, default),
            calibration=calibration,
            sets=sets,
            set_aliases={alias: name for alias, name in of_sets.items() if alias not in aliases and alias not in own},
            tells_routes=settings.return_routed_experts,
            prices=Prices.build(settings, info.experts),
        )

    @property
    def counts(self) -> frozenset[int]:
        """The closed set of counts that metrics may carry as a label."""
        chosen = [option.budget.uniform for option in (*self.tiers.values(), *self.lowering)]
        return frozenset((*self.aliases.values(), self.default_count, *(count for count in chosen if count)))

    def select(self, requested: Iterable[Requested]) -> Selection:
        """What a request that says this may use. Raises InvalidRequest."""
        return resolve(self.info.experts, self.default_count, requested, self.options, self.sets)

    def requested_in_alias(self, model: str | None) -> list[Requested]:
        """The count or the expert set that the `model` field asks for: none, or an alias's."""
        if model is None or model == self.name:
            return []
        if tier := self.tiers.get(model):
            return [RequestedCount(f"the model alias {model!r}", "model", OptionName(tier.name))]
        if name := self.set_aliases.get(model):
            return [RequestedSet(f"the model alias {model!r}", "model", name)]
        return [RequestedCount(f"the model alias {model!r}", "num_experts", self._count_of(model))]

    def _count_of(self, alias: str) -> int:
        """The count of an alias: of a listed one, or of any `NAME@kN` with N in the model's range."""
        if alias in self.aliases:
            return self.aliases[alias]
        experts = self.info.experts
        name, _, suffix = alias.rpartition("@")
        is_count = name == self.name and _COUNT_SUFFIX.fullmatch(suffix)
        count = int(suffix[1:]) if is_count else 0
        if experts.layers and experts.minimum <= count <= experts.maximum:
            return count
        form = f", and {self.name}@kN, N from {experts.minimum} to {experts.maximum}" if experts.layers else ""
        form = "".join(f", {alias}" for alias in (*self.tiers, *self.set_aliases)) + form
        message = f"the model {shown(alias, 128)} does not exist; this server has {self.name!r}{form}"
        raise ModelNotFound(message, "model")

    def cards(self) -> Iterator[dict[str, Any]]:
        """The cards of the model and of its listed aliases."""
        yield self._card(self.name, self.default_count, None)
        for alias, count in self.aliases.items():
            yield self._card(alias, count, self.name)
        for alias in (*self.tiers, *self.set_aliases):
            yield self.card(alias)

    def card(self, model: str) -> dict[str, Any]:
        """The card of a model or an alias. Raises ModelNotFound."""
        if model == self.name:
            return self._card(self.name, self.default_count, None)
        if tier := self.tiers.get(model):
            return self._card(model, rounded(tier.mean_count), self.name, {"option": tier.name})
        if name := self.set_aliases.get(model):
            return self._card(model, self.default_count, self.name, {"expert_set": name})
        return self._card(model, self._count_of(model), self.name)

    def check_tokens(self, ids: Mapping[str, list[int]]) -> None:
        """Raises InvalidRequest for token ids that the embedding does not have; keys are field names."""
        last = self.info.vocabulary - 1
        for name, values in ids.items():
            if values and not 0 <= min(values) <= max(values) <= last:
                wrong = next(value for value in values if not 0 <= value <= last)
                raise InvalidRequest(f"{name}: token id {wrong!r:.64} is not between 0 and {last}", name)

    def _card(
        self, id: str, default: int | float, parent: str | None, alias_of: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, Any]:
        meta = {"moe": self._moe(default) | dict(alias_of), "execution": self._execution()}
        longest = self.info.max_model_len
        return {
            "id": id,
            "object": "model",
            "created": self.created,
            "owned_by": "moedial",
            "root": self.name,
            "parent": parent,
            "max_model_len": longest,
            "meta": meta,
        }

    def _execution(self) -> dict[str, Any]:
        """What runs the model on this machine."""
        info = self.info
        reason: dict[str, Any] = {"reason": info.kernels_reason} if info.kernels_reason else {}
        if info.expert_bytes:
            reason |= {"ranks": len(info.expert_bytes), "expert_bytes": list(info.expert_bytes)}
        where = {"device": info.device, "backend": info.backend}
        shared = {"prefix_cache": info.prefix_cache, "chunked_prefill": info.chunked}
        shared["return_routed_experts"] = self.tells_routes
        formats = {"dtype": info.dtype, "quantize": info.quantize, "kv_cache_dtype": info.kv_cache_dtype}
        return where | {"kernels": info.kernels} | formats | shared | reason

    def _moe(self, default: int | float) -> dict[str, Any]:
        experts = self.info.experts
        return {
            "family": self.info.family,
            "num_experts_total": self.info.experts_total,
            "trained": experts.trained,
            "default": default,
            "min": experts.minimum,
            "max": experts.maximum,
            "layers": experts.layers,
            "shared_experts": self.info.shared_experts,
            "token_local": self.info.token_local,
            "normaliser": "trained",  # of a request that names none: the family's own
            "quality": list(self.quality),
            "expert_sets": self.sets.rows(),
            "calibration": source(self.calibration, self.info),
            **calibrated_fields(self.calibration, self.tiers),
            **({"prices": self.prices.card} if self.prices else {}),
        }
