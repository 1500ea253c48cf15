"""What a model card says of a calibration: the quality and speed of each count, of profiles and of rules.

Pure functions of a calibration. They choose nothing, and know no routes.
"""

from collections.abc import Mapping
from typing import Any

from engine.types import EngineInfo
from model.budget import FAMILY_RULE, Normaliser
from server.experts.calibration import ServedCalibration
from weights.calibration import Calibration, Option


def quality_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """One row per count that all layers and tokens share, with the family's own rule."""
    return [
        {"num_experts": option.counts[0]} | _figures(option) for option in calibration.options if is_plain_count(option)
    ]


def profile_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """One row per other option: counts by layer, and counts with a rule."""
    return [
        {"counts": list(option.counts), "experts": experts_field(option)} | _figures(option)
        for option in calibration.options
        if not is_plain_count(option)
    ]


def calibrated_fields(served: ServedCalibration, tiers: Mapping[str, Option]) -> dict[str, Any]:
    """What a calibration adds to a model's card: which normaliser is best at which count, where repair helps, which
    threshold runs so many experts on average, the profiles, and the options behind the tiers."""
    own = served.calibration
    if own is None:
        return {}
    normalisers = {count: wire_normaliser(normaliser) for count, normaliser in own.normalisers.items()}
    return {
        "normalisers": normalisers,
        "thresholds": dict(own.thresholds),
        "repaired": list(own.repaired),
        "profiles": profile_rows(own),
        "tiers": {alias: option.name for alias, option in tiers.items()},
    }


def experts_field(option: Option) -> dict[str, Any]:
    """What a request writes in its field `experts` to run the option."""
    uniform = len(set(option.counts)) == 1
    rule: dict[str, Any] = {
        "normaliser": wire_normaliser(option.normaliser),
        "threshold": option.threshold,
        "top_p": option.top_p,
        "repair": option.repair,
    }
    neutral = {"normaliser": "trained", "threshold": 0.0, "top_p": 0.0, "repair": False}
    asked = {name: value for name, value in rule.items() if value != neutral[name]}
    return {"count": option.counts[0] if uniform else list(option.counts), **asked}


def wire_normaliser(normaliser: Normaliser) -> str:
    """A normaliser as requests and answers write it."""
    return f"k2={normaliser}" if isinstance(normaliser, int) else normaliser


def source(served: ServedCalibration, info: EngineInfo) -> dict[str, Any]:
    """When, where and on what a calibration was measured, and in what the model is served otherwise; or the reason why
    there is none."""
    own = served.calibration
    if own is None:
        return {"reason": served.reason}
    measured = {"created": own.created, "machine": own.machine, "text": own.text, "tokens": own.tokens}
    differences = served.differences(info)
    return measured | ({"differences": differences} if differences else {})


def is_plain_count(option: Option) -> bool:
    """Whether all layers have one count and the family's own rule holds."""
    return len(set(option.counts)) == 1 and option.budget.rule == FAMILY_RULE


def _figures(option: Option) -> dict[str, Any]:
    """Quality next to the trained count, the speed of one stream, and its time per token next to the trained count;
    rounded, as a calibration knows no more. GET /calibration has all digits."""
    quality = option.quality
    rate = option.speed and option.speed.tokens_per_second.get("1")
    return {
        "name": option.name,
        "loss": round(quality.loss, 4),
        "perplexity": round(quality.perplexity, 4),
        "agreement": round(quality.agreement, 4),
        "kl": round(quality.kl, 4),
        "relative_quality": round(quality.relative, 4),
        "tokens_per_second": rate and round(rate, 1),
        "relative_cost": round(option.relative_cost, 4),
    }
