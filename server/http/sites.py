"""The middleware that refuses requests of other sites' pages. `server/access/sites.py` decides which."""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from model.errors import MoedialError
from server.access.sites import SitePolicy
from server.http.error_responses import error_response

OnRefused = Callable[[Scope, MoedialError], None]


class Sites:
    """Applies a site policy; `on_refused` is called with each refusal."""

    def __init__(self, app: ASGIApp, policy: SitePolicy, on_refused: OnRefused) -> None:
        self.app, self.policy, self.on_refused = app, policy, on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        error = self.policy.refusal(scope["method"], Headers(scope=scope))
        if error is None:
            return await self.app(scope, receive, send)
        self.on_refused(scope, error)
        await error_response(error, scope["path"])(scope, receive, send)
