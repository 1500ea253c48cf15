"""The app below a path prefix of another application, such as Ray Serve's route prefix, which stays in the path."""

import structlog
from starlette.testclient import TestClient

from tests.server.fakes import FakeEngine
from tests.server.harness import app_of, eventually, service_of, value


def test_below_a_prefix_everything_knows_the_servers_own_paths() -> None:
    app = app_of(FakeEngine(), api_keys="K", access_log=True)
    with TestClient(app, root_path="/low") as client, structlog.testing.capture_logs() as logged:
        eventually(lambda: service_of(client).loaded is not None)
        open_ones = [client.get(f"/low{path}").status_code for path in ("/", "/page/app.js", "/live", "/metrics")]
        locked = client.post("/low/v1/messages", json={})
        ollama = client.post("/low/api/chat", json={"model": "x"}, headers={"x-api-key": "K"})
        assert value(service_of(client), "requests_rejected_total", reason="invalid_api_key") == 1
        assert value(service_of(client), "http_requests_total", route="/api/chat", status="404") == 1
    app.state.watch.check()
    assert open_ones == [200] * 4
    assert locked.status_code == 401 and locked.json()["type"] == "error" and "request-id" in locked.headers
    assert ollama.status_code == 404 and list(ollama.json()) == ["error"]
    assert "/v1/messages" in [line["path"] for line in logged if line["event"] == "request"]
