"""Quality by expert count with lm-evaluation-harness: python examples/quality_sweep.py ADDRESS MODEL TASKS [COUNT ...].

For example, against a server that serves an OLMoE checkpoint:

    python examples/quality_sweep.py http://localhost:8000 olmoe arc_easy,hellaswag 1 2 4 8

The count goes into the model's name (`olmoe@k2`), because requests for log-likelihoods cannot carry a field of their
own. It needs `pip install 'lm-eval[api]'`; the server tokenises, so no tokenizer has to be at hand. What follows a
lone `--` goes to the harness as it is.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FROM_SERVER = "tokenizer_backend=remote,tokenized_requests=True"


def evaluate(address: str, model: str, tasks: str, folder: Path, more: list[str]) -> dict[str, Any]:
    """The harness's results, by task."""
    arguments = f"base_url={address}/v1/completions,model={model},max_length=512,{FROM_SERVER}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", tasks, "--batch_size", "8", "--output_path", str(folder), *more]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (report,) = folder.rglob("results_*.json")
    results: dict[str, Any] = json.loads(report.read_text())["results"]
    return results


def main(address: str, model: str, tasks: str, counts: list[str], more: list[str]) -> None:
    """A line per task, metric and count."""
    print(f"{'task':24} {'metric':20} {'K':>4} {'value':>8}")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            results = evaluate(address, f"{model}@k{count}", tasks, Path(folder), more)
        for task, metrics in results.items():
            for metric, value in metrics.items():
                if isinstance(value, float) and "stderr" not in metric:
                    print(f"{task:24} {metric.removesuffix(',none'):20} {count:>4} {value:8.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    address, model, tasks, *counts = given[:end]
    main(address, model, tasks, counts or ["1", "2", "4", "8"], given[end + 1 :])
