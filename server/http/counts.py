"""Counts HTTP answers by route template, method and status: closed sets, whatever paths and methods clients send."""

from collections.abc import Callable, Iterable

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpCounts:
    """Calls `count` with the route template, method and status of every answer when it begins."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], count: Callable[[str, str, str], None]) -> None:
        self.app, self.count = app, count
        self.routes = [route for route in routes if isinstance(route, Route)]
        self.fixed = {route.path: route.path for route in self.routes if not route.param_convertors}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        route, begun = self._template(scope["path"]), False

        async def send_counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.count(route, method, str(message["status"]))
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        except Exception:
            if not begun:  # answered by an outer layer
                self.count(route, method, "500")
            raise

    def _template(self, path: str) -> str:
        if path in self.fixed:
            return path
        return next((route.path for route in self.routes if route.path_regex.match(path)), OTHER)
