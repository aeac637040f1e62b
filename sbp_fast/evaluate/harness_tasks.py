"""Multiple-choice questions as tasks of lm-evaluation-harness: a YAML file each, and the loader that they name.

A set NAME gives two tasks, because the harness divides by the length of a choice as the task file has it:

- `sbp_NAME`: choices begin with the space that joins them to the prompt, so `acc_bytes` is this project's `NAME_accuracy`;
- `sbp_NAME_characters`: the harness joins with a space, so `acc_norm` is `NAME_accuracy_characters`.

`acc` is `NAME_accuracy_raw` in both. Those of the embedded sets are in `lm_eval_tasks`, for `lm_eval --include_path`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sbp_fast.evaluate.multiple_choice import QuestionSet, read_questions
from sbp_fast.pipeline.files import dump_json

TAG = "sbp"
"""Name under which the harness runs all tasks of this project's question sets."""
TASK = """\
task: {task}
tag: {tag}
custom_dataset: !function sbp_fast.evaluate.harness_tasks.load_dataset
dataset_kwargs: {{path: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: {choices}
doc_to_target: answer
target_delimiter: "{delimiter}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: {normalized}, aggregation: mean, higher_is_better: true}}
"""


def task_files(name: str, path: str) -> dict[str, str]:
    """Return the content of the task files of a question set by file name.

    Args:
        name: of the set.
        path: of its questions, as `read_questions` takes it.
    """
    by_bytes = {"task": f"sbp_{name}", "choices": "joined_choices", "delimiter": "", "normalized": "acc_bytes"}
    by_characters = {"task": f"sbp_{name}_characters", "choices": "choices", "delimiter": " ", "normalized": "acc_norm"}
    quoted = dump_json(path, name)  # JSON strings are YAML
    return {f"{fields['task']}.yaml": TASK.format(tag=TAG, path=quoted, **fields) for fields in (by_bytes, by_characters)}


def write_tasks(sets: Iterable[QuestionSet], directory: Path) -> None:
    """Write the questions of each set as JSONL, and the task files that read them, into a new directory."""
    directory.mkdir()
    for questions in sets:
        path = directory / f"{questions.name}.jsonl"
        fields = ("id", "source", "prompt", "choices", "answer")
        lines = (dump_json({field: getattr(q, field) for field in fields}, path) for q in questions.questions)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for file, content in task_files(questions.name, str(path)).items():
            (directory / file).write_text(content, encoding="utf-8")


def load_dataset(path: str, **_: Any) -> dict[str, Any]:
    """Return the questions of a file as the harness's only split, `test`, of a Hugging Face dataset."""
    from datasets import Dataset

    rows = [
        {
            "prompt": question.prompt,
            "choices": [choice.strip() for choice in question.choices],
            "joined_choices": [f" {choice.strip()}" for choice in question.choices],
            "answer": question.answer,
        }
        for question in read_questions(path)
    ]
    return {"test": Dataset.from_list(rows)}
