"""All question sets of a configuration, whatever their kind."""

from __future__ import annotations

from sbp_fast.config import EvaluateConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.multiple_choice import question_sets
from sbp_fast.evaluate.open_questions import open_question_sets
from sbp_fast.evaluate.question_files import NamedQuestions
from sbp_fast.pipeline.progress import Console


def all_question_sets(config: EvaluateConfig, seed: int, corpus: PreparedCorpus, console: Console) -> list[NamedQuestions]:
    """Return the sets of multiple-choice and of open questions.

    Raises:
        UserError: a file is missing or malformed, or two files give one task.
    """
    sets: list[NamedQuestions] = [*question_sets(config, seed, corpus, console), *open_question_sets(config.open_questions)]
    names = [questions.name for questions in sets]
    if repeated := {name for name in names if names.count(name) > 1}:
        problem = f"name a file each for the task {min(repeated)}"
        raise UserError("evaluate.choices and evaluate.open_questions", problem, "rename one of the files")
    return sets
