"""Which backend runs a model: the first that does not refuse it, and why the ones before it did."""

from model.backends.base import Backend, Runnable
from model.backends.cpu.backend import CpuBackend
from model.backends.torch.backend import TorchBackend
from model.decoder import Decoder
from model.errors import CheckpointError
from model.options import Options
from model.shapes.decoder import DecoderConfig

BACKENDS: tuple[Backend, ...] = (CpuBackend(), TorchBackend())  # the fastest first


def provide() -> None:
    """Have every backend get ready. Called once, when an engine starts."""
    for backend in BACKENDS:
        backend.provide()


def choose(config: DecoderConfig, options: Options) -> tuple[Backend, str]:
    """The backend, and why it is not a faster one ("" for the first).

    Raises:
        CheckpointError: all refuse; the reasons are named.
    """
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = backend.refusal(config, options)
        if reason is None:
            return backend, "; ".join(reasons)
        reasons.append(reason)
    raise CheckpointError(": ".join(reversed(reasons)))


def prepare(decoder: Decoder, options: Options) -> tuple[Runnable, str]:
    """The decoder in the form that runs best here, and why it is not a faster one.

    Raises:
        CheckpointError: no backend runs it.
    """
    backend, reason = choose(decoder.config, options)
    return backend.prepare(decoder, options), reason
