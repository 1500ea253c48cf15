"""moedial as a Ray Serve application: every replica is the whole server, with an engine process of its own.

    serve run deploy.ray.app:build model=/models/OLMoE-1B-7B-0924 max_replicas=4 threads=16

Ray starts replicas, sends them requests and ends them; it knows no model and no expert counts. See docs/scaling.md.
"""

import asyncio
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from server.serve import load
from server.settings import Settings
from server.state import ServerState

LOADING_POLL_SECONDS = 0.2
STOP_SECONDS = 10  # for the engine process, after the last answer


class Arguments(BaseModel):
    """What `serve run` and Ray's configuration files may say; `settings` has other settings of the server by name."""

    model_config = ConfigDict(extra="forbid")

    model: str = "infinity-stories"
    threads: int = 1
    gpus: float = 0
    min_replicas: int = 1
    max_replicas: int = 2
    settings: dict[str, Any] = {}

    def server_settings(self) -> Settings:
        return Settings(model=self.model, threads=self.threads, **self.settings)


class Replica:
    """What Ray asks of a replica beside its requests."""

    app: FastAPI  # made by the function that `serve.ingress` has

    async def check_health(self) -> None:
        """Return while the engine runs. Ray's first call returns once the model is loaded: only then come requests.

        Raises:
            EngineDown: the engine does not run. Ray replaces a replica after three failed checks in a row.
            CheckpointError: the model cannot be loaded.
        """
        server: ServerState = self.app.state.service
        while not server.booted and server.boot_error is None:
            await asyncio.sleep(LOADING_POLL_SECONDS)
        if server.boot_error is not None:
            raise server.boot_error
        server.check_engine()


def build(arguments: Arguments) -> serve.Application:
    """The application; `serve run` calls it with what follows its name."""
    settings = arguments.server_settings()

    def application() -> FastAPI:
        """The server's app, made inside the replica."""
        return load(arguments.server_settings())

    deployment = serve.deployment(
        serve.ingress(application)(Replica),
        name="moedial",
        max_ongoing_requests=settings.max_running + settings.queue_size,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": settings.max_running,
            "downscale_delay_s": 300,
        },
        ray_actor_options={"num_cpus": arguments.threads, "num_gpus": arguments.gpus},
        graceful_shutdown_timeout_s=settings.drain_seconds + STOP_SECONDS,
        health_check_period_s=10,
        health_check_timeout_s=30,
    )
    return deployment.bind()
