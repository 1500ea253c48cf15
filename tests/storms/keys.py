"""A storm of requests by one key, and without a key, beside a neighbour with a key of its own.

`python -m tests.storms.keys [WAVE …]`
"""

import sys
import tempfile
from pathlib import Path

from tests.storms.base import ANSWERED, COMPLETIONS, REFUSED, Storm, Wave, main

GREEDY, LIMITED, NEIGHBOUR = "sk-greedy", "sk-limited", "sk-neighbour"
KEYS = f"""
[greedy]
key = "{GREEDY}"
share_of_places = 0.5

[limited]
key = "{LIMITED}"
requests_per_minute = 60
tokens_per_minute = 2000

[neighbour]
key = "{NEIGHBOUR}"
"""
WRONG = ("?", "sk", "sk-greedy x", "sk-greed", "SK-GREEDY", "x" * 5_000, "sk-greedy,sk-neighbour")
LARGE = {"prompt": ["Once upon a time"] * 8, "n": 4, "max_tokens": 60, "num_experts": 8}
SMALL = {"prompt": "Once upon a time", "max_tokens": 4, "num_experts": 1}


async def wrong_keys(storm: Storm, number: int) -> str:
    name = ("authorization", "x_api_key")[number % 2]
    key = WRONG[number // 2 % len(WRONG)]
    return await storm.post(COMPLETIONS, SMALL, **{name: f"Bearer {key}" if name == "authorization" else f"{key}?"})


async def greedy(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, LARGE, authorization=f"Bearer {GREEDY}")


async def limited(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, SMALL, x_api_key=LIMITED)


WAVES = (
    Wave("wrong keys", wrong_keys, 400, 40, (REFUSED,)),
    Wave("one key asks for everything", greedy, 60, 60, (ANSWERED, REFUSED), counted=False),
    Wave("one key over its limits", limited, 400, 20, (ANSWERED, REFUSED)),
)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        file.write_text(KEYS)
        file.chmod(0o600)
        sys.exit(main(__doc__ or "", WAVES, "--api-keys-file", str(file), key=NEIGHBOUR))
