"""The calibration of the served checkpoint as the HTTP process has it, or the reason why there is none.

Read once, when the server starts. Not here: its form (see `weights/calibration.py`), and what is chosen by it.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import structlog

from engine.types import EngineInfo
from model.errors import CheckpointError
from server.errors import NotCalibrated
from weights import calibration_plot
from weights.calibration import FILE, Calibration, checkpoint_hash, find, read

log = structlog.get_logger("server")


@dataclass(frozen=True)
class ServedCalibration:
    """A calibration, or why there is none: a sentence for clients, which names the command to run."""

    calibration: Calibration | None = None
    reason: str = "this model has no calibration; the operator makes one with `moedial calibrate`"

    @cached_property
    def json(self) -> bytes:
        """The whole calibration, as GET /calibration sends it. Raises NotCalibrated."""
        return msgspec.json.encode(self._own)

    @cached_property
    def svg(self) -> bytes:
        """The same as a picture of quality against speed. Raises NotCalibrated."""
        return calibration_plot.svg(self._own).encode()

    def differences(self, info: EngineInfo) -> str:
        """What the loaded model runs with, where it was measured with something else; "" where nothing differs."""
        own = self.calibration
        if own is None or not info.backend:
            return ""
        pairs = {name: (getattr(own, name), getattr(info, name)) for name in ("dtype", "quantize", "kv_cache_dtype")}
        return "; ".join(
            f"{name} was {measured}, now {served}"
            for name, (measured, served) in pairs.items()
            if measured not in (None, served)
        )

    def warn_of_differences(self, info: EngineInfo) -> None:
        """Say in the log what `differences` finds."""
        if found := self.differences(info):
            log.warning("the calibration was measured with other settings; its figures are used", differences=found)

    @property
    def _own(self) -> Calibration:
        if self.calibration is None:
            raise NotCalibrated(self.reason)
        return self.calibration


UNCALIBRATED = ServedCalibration()


def load_calibration(model: Path, name: str) -> ServedCalibration:
    """The calibration of the checkpoint at `model`, which is served as `name`.

    One that is damaged or of another checkpoint is not used: the log says so, and so does the reason.
    """
    command = f"`moedial calibrate {name}`"
    path = find(model)
    if path is None:
        return ServedCalibration(None, f"{name} has no calibration; the operator makes one with {command}")
    try:
        return ServedCalibration(read(path, checkpoint_hash(model)), "")
    except CheckpointError as error:
        log.warning("the calibration is not used", reason=str(error))
        shown = str(error).replace(str(path), FILE)  # a path of this machine is nothing for clients
        return ServedCalibration(None, f"{name} has no calibration: {shown}")
    except OSError as error:
        log.warning("the calibration is not used", reason=str(error))
        return ServedCalibration(None, f"{name} has no calibration that can be read; {command} makes one")
