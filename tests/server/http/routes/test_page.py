"""The page's routes: files, headers, hashes, sizes, keys, the switch. In a browser: `make test-page`."""

import gzip
import hashlib
import re
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from server.http.page_files import FILES, FOLDER, INDEX
from server.serve import ready_text
from tests.server.harness import in_memory, service_of, value

VENDOR = FOLDER / "vendor"
MAX_BYTES = 130_000  # of everything that a browser loads, compressed
UNDONE = {  # how the changes that VENDOR.md names are undone
    "preact.js": lambda data: data + b"//# sourceMappingURL=preact.mjs.map\n",
    "hooks.js": lambda data: data.replace(b'"./preact.js"', b'"preact"') + b"//# sourceMappingURL=hooks.mjs.map\n",
    "uplot.js": lambda data: data.removesuffix(b"export default uPlot;\n"),
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with in_memory(api_keys=("k",)) as made:
        yield made


def test_every_file_is_open_and_has_its_headers(client: TestClient) -> None:
    for path in FILES:
        answer = client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/page/app.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/v1/models").status_code == 401, "the page is open, what it asks for is not"
    key = {"authorization": "Bearer k"}
    for path in ("/page/nothing.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/index.html"):
        assert client.get(path, headers=key).status_code == 404, path


def test_a_file_that_a_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/app.js")
    tag = first.headers["etag"]
    for sent in (tag, f'"x", {tag}', tag.removeprefix("W/")):
        again = client.get("/page/app.js", headers={"if-none-match": sent})
        assert (again.status_code, again.content) == (304, b"") and again.headers["etag"] == tag
    assert client.get("/page/app.js", headers={"if-none-match": '"x"'}).status_code == 200
    assert client.get("/page/page.css").headers["etag"] != tag


@pytest.mark.parametrize(("accepted", "coding"), [("br, gzip;q=0.5", "gzip"), ("gzip;q=0, *", None), ("", None)])
def test_files_are_compressed_for_those_who_accept_it(client: TestClient, accepted: str, coding: str | None) -> None:
    answer = client.get("/page/app.js", headers={"accept-encoding": accepted})
    assert answer.headers.get("content-encoding") == coding and answer.headers["vary"] == "accept-encoding"
    assert answer.content == (FOLDER / "app.js").read_bytes()


def test_what_a_browser_loads_is_small() -> None:
    loaded = [file for path, file in FILES.items() if "/licences/" not in path and not path.endswith(".md")]
    assert sum(len(file.compressed) for file in loaded) < MAX_BYTES
    assert all(gzip.decompress(file.compressed) == file.data for file in loaded)


def test_nothing_is_loaded_from_elsewhere_and_nothing_from_the_root() -> None:
    """Behind a path prefix, an address that begins with a slash leads out of the prefix."""
    for path in sorted(FOLDER.rglob("*.*")):
        if path.suffix not in (".html", ".css", ".js") or path.name.startswith("uplot") or path.parent == VENDOR:
            continue
        text = path.read_text()
        assert not re.search(r"""(?:src|href|from|import\()\s*=?\s*["'](?:https?:)?/""", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text), path
    assert not re.search(r"url\((?!data:)|@import", (FOLDER / "page.css").read_text())


def test_every_script_says_what_lives_there_and_is_loaded() -> None:
    own = sorted(FOLDER.glob("*.js"))
    texts = {path.name: path.read_text() for path in own}
    assert all(text.startswith("// ") for text in texts.values())
    everything = "\n".join([*texts.values(), (FOLDER / INDEX).read_text()])
    assert [name for name in texts if f'"./{name}"' not in everything and f"page/{name}" not in everything] == []


def test_what_others_wrote_is_as_they_wrote_it() -> None:
    """VENDOR.md has the hashes of the packages' own files, and of ours with the changes that it names."""
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in (VENDOR / "VENDOR.md").read_text().splitlines()]
    listed = {row[0]: row for row in rows if len(row) == 6 and re.fullmatch(r"[0-9a-f]{64}", row[5])}
    assert set(listed) == {path.name for path in VENDOR.iterdir() if path.suffix in (".js", ".css")}
    for name, (_, package, _, _, theirs, ours) in listed.items():
        data = (VENDOR / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == ours, name
        undone = UNDONE.get(name, lambda data: data)(data)
        assert hashlib.sha256(undone).hexdigest() == theirs, name
        assert (VENDOR / "licences" / f"{package.split()[0]}.txt").exists()


def test_the_page_can_be_switched_off() -> None:
    with in_memory(page="off") as client:
        assert client.get("/").status_code == 404 and client.get("/page/app.js").status_code == 404
        assert client.get("/docs").status_code == 200
        assert "page:" not in ready_text(service_of(client), 8000, 1.0)
    with in_memory() as client:
        assert "  page: http://127.0.0.1:8000/\n" in ready_text(service_of(client), 8000, 1.0)


def test_head_and_counts_know_the_routes() -> None:
    with in_memory() as client:
        head = client.head("/page/app.js")
        assert (head.status_code, head.content) == (200, b"")
        client.get("/page/page.css")
        assert value(service_of(client), "http_requests_total", route="/page/{name:path}", method="GET") == 1
