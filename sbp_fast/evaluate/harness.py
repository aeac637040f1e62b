"""Scores by lm-evaluation-harness (the package `lm_eval`), with the arguments that give this project's models their due.

Every document began with the begin token in training. An export's tokenizer puts it before a text, which is right for prompts;
for rolling log-likelihoods the harness puts it there itself, so the tokenizer must not. Both read no more than the model's
context, and weights in float32, as this project's own evaluation does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sbp_fast.errors import UserError
from sbp_fast.evaluate.harness_tasks import TAG

ROLLING = "loglikelihood_rolling"
BATCH_SIZE = 16
MERGED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""Parts of the harness's results that are written, each a mapping by task."""


def harness_version() -> str:
    """Return the version of the installed harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise UserError("lm-evaluation-harness", "is not installed", "pip install 'sbp-fast[lm-eval]'") from None


def run_harness(model: Path, tasks: Sequence[str], own_tasks: Path, context: int, device: str) -> tuple[dict[str, Any], str]:
    """Return the results of an exported model by the harness, and its tables of them as Markdown.

    Args:
        model: a Hugging Face directory.
        tasks: names of tasks, groups or tags of the harness or of `own_tasks`; patterns such as `mmlu_*` too.
        own_tasks: directory of further task files.
        context: most tokens that the model reads at once.
        device: as torch names it.

    Raises:
        UserError: the harness is not installed, or a name matches no task.
    """
    harness_version()
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=str(own_tasks))
    results: dict[str, Any] = {part: {} for part in MERGED}
    tables = []
    for rolling, chosen in _by_kind(manager, tasks).items():
        arguments = harness_arguments(model, context, rolling=rolling)
        found = lm_eval.simple_evaluate(
            "hf", arguments, tasks=chosen, task_manager=manager, batch_size=BATCH_SIZE, device=device, log_samples=False
        )
        tables += [make_table(found, part) for part in ("results", "groups") if found.get(part)]
        for part in MERGED:
            results[part] |= _json_values(found.get(part) or {})
    return results, "\n".join(tables)


def harness_arguments(model: Path, context: int, *, rolling: bool) -> dict[str, Any]:
    """Return the arguments of the harness's model `hf` for an export."""
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": "float32", "max_length": context}
    return arguments | ({"add_bos_token": False} if rolling else {})


def _by_kind(manager: Any, names: Sequence[str]) -> dict[bool, list[Any]]:
    """Return the loaded tasks and groups by whether they take rolling log-likelihoods."""
    by_kind: dict[bool, list[Any]] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            known = f"give a task of `lm_eval ls tasks`, or {TAG} for the configuration's own questions"
            raise UserError(f"--harness {name}", "matches no task", known)
        loaded = manager.load(matching)
        kinds = {task.OUTPUT_TYPE == ROLLING for task in loaded["tasks"].values()}
        if len(kinds) > 1:
            problem = "has tasks of rolling log-likelihoods and others, which need other arguments"
            raise UserError(f"--harness {name}", problem, "name its tasks one by one")
        within = {child for children in loaded["group_map"].values() for child in children}
        tops = [item for name, item in (loaded["groups"] | loaded["tasks"]).items() if name not in within]
        by_kind.setdefault(kinds.pop(), []).extend(tops)
    return by_kind


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as JSON holds it; a standard error that is not finite, as of a single item, is None."""
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            converted[key] = _json_values(value)
        elif isinstance(value, float) and "stderr" in key and not math.isfinite(value):
            converted[key] = None
        else:
            converted[key] = value.item() if hasattr(value, "item") else value
    return converted
