import importlib.util
import json
import random
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fabricated_run import CONFIG, QUIET, write_prepared, write_stage

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate import harness, lm_eval_tasks
from sbp_fast.evaluate.harness_tasks import task_files, write_tasks
from sbp_fast.evaluate.likelihood import document_trees, log_likelihoods
from sbp_fast.evaluate.multiple_choice import EMBEDDED_SETS, question_sets
from sbp_fast.evaluate.question_files import task_name
from sbp_fast.model.huggingface import write_hugging_face
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.stages.evaluate import SCORES, evaluate
from sbp_fast.stages.harness import RESULTS, evaluate_by_harness

WORDS = [
    "the",
    "ships",
    "of",
    "our",
    "navy",
    "sailed",
    "home",
    "with",
    "trade",
    "from",
    "many",
    "lands",
    "snøfall",
    "\N{SNOWMAN}",
]
ROLLING_TASK = """\
task: documents
custom_dataset: !function documents.load
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
ROLLING_LOADER = """
from datasets import Dataset

def load(**_):
    return {"test": Dataset.from_json("TEXTS")}
"""


def needs_harness(test: Any) -> Any:
    """Mark a test that runs the harness, whose list of tasks alone takes 20 seconds to read."""
    absent = importlib.util.find_spec("lm_eval") is None
    return pytest.mark.slow(pytest.mark.skipif(absent, reason="lm-evaluation-harness is not installed")(test))


def write_quiz(path: Path, count: int = 60) -> Path:
    generator = random.Random(3)

    def words(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    records = [
        {"prompt": words(120 if number % 9 == 0 else 12), "choices": [words(6) for _ in range(4)], "answer": number % 4}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, Path]:
    root = tmp_path_factory.mktemp("harness")
    vocabulary = write_prepared(root / "corpus").tokenizer.vocabulary_size
    model = Transformer(CONFIG.model, vocabulary)
    model.initialize(1)
    with torch.no_grad():
        model.embed_tokens.weight *= 20  # predictions that differ between the choices
    write_stage(root / "model", "train", {}, lambda directory: save_model(model, directory))
    settings = CONFIG.evaluate.model_copy(update={"choices": str(write_quiz(root / "quiz.jsonl"))})
    return CONFIG.model_copy(update={"evaluate": settings}), root / "corpus", root / "model"


def own_accuracies(directory: Path) -> dict[str, float]:
    rows = pq.read_table(directory / SCORES).to_pylist()
    names = {row["metric"] for row in rows if row["metric"].startswith("quiz_")}
    return {name: np.mean([row["numerator"] for row in rows if row["metric"] == name]) for name in names}


@needs_harness
def test_accuracies_of_the_harness_equal_those_of_evaluate(inputs: tuple[RunConfig, Path, Path], tmp_path: Path) -> None:
    config, corpus, model = inputs
    evaluate(config, tmp_path / "own", corpus=corpus, model=model, console=QUIET)
    own = own_accuracies(tmp_path / "own")
    evaluate_by_harness(config, tmp_path / "harness", corpus=corpus, model=model, tasks=["sbp"], console=QUIET)
    written = json.loads((tmp_path / "harness" / RESULTS).read_text())
    results = written["results"]
    assert len(set(own.values())) == 3  # the three disagree, so that none can stand for another
    assert results["sbp_quiz"]["acc,none"] == pytest.approx(own["quiz_accuracy_raw"], abs=1e-12)
    assert results["sbp_quiz_characters"]["acc,none"] == pytest.approx(own["quiz_accuracy_raw"], abs=1e-12)
    assert results["sbp_quiz"]["acc_bytes,none"] == pytest.approx(own["quiz_accuracy"], abs=1e-12)
    assert results["sbp_quiz_characters"]["acc_norm,none"] == pytest.approx(own["quiz_accuracy_characters"], abs=1e-12)
    assert written["n-samples"]["sbp_quiz"] == {"original": 60, "effective": 60}
    assert written["lm_eval"] == harness.harness_version()


@needs_harness
def test_rolling_likelihood_of_the_harness_equals_that_of_documents(
    inputs: tuple[RunConfig, Path, Path], tmp_path: Path
) -> None:
    _, corpus, model = inputs
    prepared, trained = PreparedCorpus(corpus), load_model(model)
    context = trained.config.context
    # The harness scores no end token, and of a document longer than the context it reads parts that overlap.
    documents = [prepared.heldout[index][:-1][: context + 1 - index % 3] for index in range(len(prepared.heldout))]
    assert max(map(len, documents)) == context + 1
    nats, _ = log_likelihoods(trained, document_trees(documents, context), len(documents))
    texts = [prepared.tokenizer.decode(document[1:]) for document in documents]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tasks / "documents.py").write_text(ROLLING_LOADER.replace("TEXTS", str(tasks / "texts.jsonl")))
    (tasks / "documents.yaml").write_text(ROLLING_TASK)
    write_hugging_face(trained, prepared.tokenizer, tmp_path / "model", positions=context, where=model)
    results, _ = harness.run_harness(tmp_path / "model", ["documents"], tasks, context, "cpu")
    expected = -nats.sum() / np.log(2) / sum(len(text.encode()) for text in texts)
    assert results["results"]["documents"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)


@needs_harness
def test_harness_with_an_unknown_task_names_it(inputs: tuple[RunConfig, Path, Path], tmp_path: Path) -> None:
    config, corpus, model = inputs
    with pytest.raises(UserError, match="--harness arc_eazy: matches no task"):
        evaluate_by_harness(config, tmp_path / "out", corpus=corpus, model=model, tasks=["arc_eazy"], console=QUIET)
    assert not (tmp_path / "out").exists()


def test_harness_that_is_not_installed_is_refused_with_the_remedy(
    inputs: tuple[RunConfig, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", absent)
    config, corpus, model = inputs
    with pytest.raises(UserError, match=r"is not installed; pip install 'sbp-fast\[lm-eval\]'"):
        evaluate_by_harness(config, tmp_path / "out", corpus=corpus, model=model, tasks=["sbp"], console=QUIET)
    assert not (tmp_path / "out").exists()


def test_shipped_task_files_are_those_of_the_embedded_question_sets() -> None:
    (directory,) = map(Path, lm_eval_tasks.__path__)
    shipped = {path.name: path.read_text() for path in directory.glob("*.yaml")}
    assert shipped == {name: text for path in EMBEDDED_SETS for name, text in task_files(task_name(path), path).items()}


def test_written_questions_are_read_again_as_they_were(inputs: tuple[RunConfig, Path, Path], tmp_path: Path) -> None:
    config, corpus, _ = inputs
    sets = question_sets(config.evaluate, config.seed, PreparedCorpus(corpus), QUIET)
    write_tasks(sets, tmp_path / "tasks")
    settings: Any = config.evaluate.model_copy(update={"choices": str(tmp_path / "tasks" / "quiz.jsonl")})
    assert question_sets(settings, config.seed, PreparedCorpus(corpus), QUIET) == [
        type(questions)(questions.name, questions.questions) for questions in sets
    ]
    names = sorted(path.name for path in (tmp_path / "tasks").iterdir())
    assert names == ["quiz.jsonl", "sbp_quiz.yaml", "sbp_quiz_characters.yaml"]
