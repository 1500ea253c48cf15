"""Keys over real HTTP and real processes: no child knows them, no log shows them, and keys share no prefixes."""

from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.live import Live, serving

pytestmark = pytest.mark.slow
SHOWN, FILED, WRONG = "sk-from-the-variable", "sk-from-the-file", "sk-that-is-unknown"
PROMPT = "Once upon a time, there was a little girl who lived in a house by the sea. " * 4


def post(live: Live, key: str, **body: Any) -> httpx.Response:
    values = {"prompt": PROMPT, "max_tokens": 4, "seed": 1} | body
    return httpx.post(f"{live.url}/v1/completions", json=values, headers={"x-api-key": key}, timeout=60)


def cached(answer: httpx.Response) -> int:
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_keys_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nkey = "{FILED}"\ntokens_per_minute = 1000\n')
    file.chmod(0o600)
    monkeypatch.setenv("MOEDIAL_API_KEYS", SHOWN)
    monkeypatch.setenv("MOEDIAL_KEY", SHOWN)
    with serving("--api-keys-file", str(file), "--threads", "1", "--log-level", "debug") as live:
        shapes = {"guided_regex": "[a-z]{3}"}  # so that the process that compiles grammars runs, too
        first, again, other = post(live, FILED, **shapes), post(live, FILED), post(live, SHOWN)
        assert cached(first) == cached(other) == 0 < cached(again)
        assert [post(live, WRONG).status_code, post(live, FILED, max_tokens=-1).status_code] == [401, 400]
        children = psutil.Process(live.process.pid).children(recursive=True)
        assert len(children) >= 2
        for child in children:
            known = f"{child.environ()} {child.cmdline()}"
            assert not any(key in known for key in (SHOWN, FILED)) and str(file) not in known
        shown = httpx.get(f"{live.url}/metrics").text
        assert live.metric("key_tokens_total", key="alice", kind="generation") > 0
    output = capfd.readouterr()
    assert '"alice"' in shown and '"key":"alice"' in output.err.replace(" ", "")
    for key in (SHOWN, FILED, WRONG):
        assert key not in shown + output.out + output.err
