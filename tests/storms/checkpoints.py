"""A storm of damaged checkpoints: bytes are changed, cut off or repeated at random; the command serves or refuses.

`python -m tests.storms.checkpoints --count 20 --seed 1`
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from weights.folder import BUNDLED

FILES = ("config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json", "generation_config.json")
SECONDS = 60
COMMAND = str(Path(sys.executable).with_name("moedial"))


def spoil(data: bytes, rng: random.Random) -> bytes:
    """The data with one thing wrong, mostly near the beginning, where headers are."""
    at = rng.randrange(min(len(data), 4_096) if rng.random() < 0.7 else len(data))
    match rng.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[at : at + 64] * 2 + data[at + 64 :]
        case _:
            return data[:at] + b"9" * 20 + data[at:]


def start(folder: Path) -> tuple[str, str]:
    """How the command ends on this checkpoint, and what it said: served, refused, or what is wrong with that."""
    command = [COMMAND, "serve", str(folder), "--port", "0", "--log-level", "error", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + SECONDS
        assert process.stdout is not None
        ready = process.stdout.readline()
        if ready:
            process.terminate()
        _, said = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "hung", ""
    finally:
        process.kill()
        process.wait()
    if ready:
        return "served", said
    lines = [line for line in said.splitlines() if line.startswith("moedial: ")]
    fine = process.returncode in (1, 2) and len(lines) == 1 and "Traceback" not in said
    return ("refused" if fine else "broken"), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, ends, slowest = random.Random(options.seed), Counter[str](), 0.0
    for _ in range(options.count):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            shutil.copytree(BUNDLED / "infinity-stories", folder)
            path = folder / rng.choice([name for name in FILES if (folder / name).exists()])
            path.write_bytes(spoil(path.read_bytes(), rng))
            started = time.monotonic()
            end, said = start(folder)
            ends[end] += 1
            slowest = max(slowest, time.monotonic() - started)
            if end in ("broken", "hung"):
                print(f"BAD {path.name}: {end}: {said[-400:]}")
    print("| served | refused | broken | hung | slowest, s |\n|---|---|---|---|---|")
    print(f"| {ends['served']} | {ends['refused']} | {ends['broken']} | {ends['hung']} | {slowest:.1f} |")
    print(json.dumps({**ends, "slowest": round(slowest, 1)}))
    return int(ends["broken"] + ends["hung"] > 0)


if __name__ == "__main__":
    sys.exit(main())
