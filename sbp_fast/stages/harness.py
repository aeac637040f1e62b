"""The command `evaluate --harness`: one model's scores by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.evaluate.harness import harness_version, run_harness
from sbp_fast.evaluate.harness_tasks import write_tasks
from sbp_fast.evaluate.multiple_choice import question_sets
from sbp_fast.evaluate.scoring import check_vocabulary
from sbp_fast.model.huggingface import write_hugging_face
from sbp_fast.model.saved import load_model
from sbp_fast.pipeline.files import write_json
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

RESULTS = "harness.json"


def evaluate_by_harness(
    config: RunConfig,
    out: Path,
    *,
    corpus: Path,
    model: Path,
    tasks: Sequence[str],
    console: Console,
    force: bool = False,
) -> Manifest:
    """Export a model and score it by lm-evaluation-harness; writes `harness.json` and prints its tables.

    Beside the harness's own tasks there are `sbp_NAME` and `sbp_NAME_characters` for each set of multiple-choice questions of
    the configuration, and the tag `sbp` for all of them.

    Args:
        config: of the run.
        out: directory of the output.
        corpus: output of `prepare`.
        model: directory of a trained model.
        tasks: names or patterns of tasks.
        console: for progress and the tables.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: the harness is not installed, an input is not finished, the model has another vocabulary, a question file is
            malformed, or a name matches no task.
    """
    installed = harness_version()
    prepared = PreparedCorpus(corpus)
    sets = question_sets(config.evaluate, config.seed, prepared, Console(quiet=True))

    def body(context: StageContext) -> None:
        torch.set_num_threads(resolve_threads(config))
        context.device = resolve_device(config)
        trained = load_model(model)
        check_vocabulary(trained, prepared, model.name)
        exported, own_tasks, positions = context.scratch / "model", context.scratch / "tasks", trained.config.context
        write_hugging_face(trained, prepared.tokenizer, exported, positions=positions, where=model)
        write_tasks(sets, own_tasks)
        results, tables = run_harness(exported, tasks, own_tasks, positions, context.device)
        write_json(context.directory / RESULTS, {"lm_eval": installed, **results})
        for line in tables.splitlines():
            context.console.say(line)

    return run_stage(
        "harness",
        out,
        config={"tasks": list(tasks), "lm_eval": installed},
        inputs={
            "corpus": corpus,
            "model": model,
            **{f"questions of {questions.name}": questions.fingerprint for questions in sets},
        },
        body=body,
        console=console,
        force=force,
    )
