"""Two small tasks for lm-evaluation-harness, written as files: stories to continue, and endings to choose."""

import json
from pathlib import Path
from typing import Any

CONTINUE = [
    {"text": "Once upon a time, there was a little", "target": "girl"},
    {"text": "Tom had a red ball. He liked to play with his", "target": "ball"},
    {"text": "The sun was hot, so Mia went to swim in the", "target": "water"},
]
CHOOSE = [
    {"text": "The dog was hungry, so it ate the", "choices": ["food.", "cloud.", "song."], "label": 0},
    {"text": "It was raining. Lily took her", "choices": ["thunder.", "umbrella.", "soup."], "label": 1},
    {"text": "They were happy and went", "choices": ["purple.", "under.", "home. The end."], "label": 2},
    {"text": "", "choices": ["Once upon a time", "Upon time once a"], "label": 0},
]
HEAD = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
TASKS: dict[str, dict[str, Any]] = {
    "stories_continue": {
        "output_type": "generate_until",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": [".", "\n", "!", "?"], "max_gen_toks": 12, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "stories_choose": {
        "output_type": "multiple_choice",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path) -> None:
    """A YAML file and its JSON lines for each task; JSON is YAML."""
    folder.mkdir()
    for (name, task), rows in zip(TASKS.items(), (CONTINUE, CHOOSE), strict=True):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | HEAD | files | task))
