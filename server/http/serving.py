"""What a route asks of the app: the state of the server, and the service of the model that a request is about."""

from fastapi import Request

from server.models.host import HostedModels
from server.service import Service
from server.state import ServerState

SERVICE = "service"  # in the state of a request, where several models are served


def server_of(request: Request) -> ServerState:
    """The state of the whole server."""
    state = request.app.state.service
    assert isinstance(state, ServerState)
    return state


def service_of(request: Request) -> Service:
    """The service of the model that the request is about."""
    chosen = request.scope["state"].get(SERVICE) or server_of(request)
    assert isinstance(chosen, Service)
    return chosen


def hosted_models_of(request: Request) -> HostedModels:
    """The models of a server that has several."""
    state = server_of(request)
    assert isinstance(state, HostedModels)
    return state
