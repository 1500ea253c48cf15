"""/docs: nothing of it comes from elsewhere, it works with keys, and it shows the whole contract."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.fakes import FakeEngine
from tests.server.harness import app_of, in_memory


def test_the_page_needs_nothing_from_elsewhere() -> None:
    with in_memory(api_keys=("k",)) as client:
        page = client.get("/docs")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", page.text)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy
        assert len(page.content) < 12_000
        assert "Bearer KEY" in page.text, "it says how a key is given"
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/openapi.json", headers={"authorization": "Bearer k"}).status_code == 200
        assert client.get("/redoc", headers={"authorization": "Bearer k"}).status_code == 404


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
@pytest.mark.parametrize(("wanted", "typed", "shown"), [("", "", True), ("k", "", False), ("k", " k ", True)])
def test_the_page_shows_every_route_and_field(wanted: str, typed: str, shown: bool) -> None:
    contract = app_of(FakeEngine()).openapi()
    with in_memory() as client:
        given = json.dumps({"page": client.get("/docs").text, "contract": contract})
    command = ["node", str(Path(__file__).parent / "docs_page.js"), wanted, typed]
    said = json.loads(
        subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=60).stdout
    )
    assert ("enter one" in said["state"]) is not shown
    if not shown:
        assert said["routes"] == ""
        return
    assert said["title"].startswith("moedial")
    assert all(path in said["routes"] for path in contract["paths"])
    for name in ("CompletionBody", "ChatBody", "ResponsesBody", "Error"):
        fields = contract["components"]["schemas"][name]["properties"]
        assert [field for field in fields if field not in said["routes"]] == []
    assert "default 1" in said["routes"] and "≤ 100" in said["routes"]
