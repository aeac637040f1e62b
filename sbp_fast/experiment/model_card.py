"""The model card of an exported model: what it is, what it read and how it scored, all from the manifests of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.data.tokenizer import BEGIN, END, PARTNER
from sbp_fast.experiment.arms import Arm, arms_of
from sbp_fast.experiment.graph import COMPARE, PREPARE, Stage, evaluate_stage, model_stage, relation_stage, stages_of
from sbp_fast.experiment.report.relation import relation_sentences
from sbp_fast.experiment.report.wording import (
    arm_descriptions,
    headline,
    main_metrics,
    shown_difference,
    shown_score,
)
from sbp_fast.experiment.results import collect
from sbp_fast.experiment.sources import used_sources
from sbp_fast.model.saved import read_description
from sbp_fast.pipeline.manifest import MANIFEST, Manifest
from sbp_fast.pipeline.progress import duration
from sbp_fast.train.task import SYNTHESIZER

MOST_SOURCES = 10  # of the corpus, that are named
RUN_CONFIG = "config.toml"
TAGS = ("synthetic-bootstrapped-pretraining", "sbp-fast")
METHOD = "[synthetic bootstrapped pretraining](https://arxiv.org/abs/2509.15248)"
UNFINISHED = "The run is not finished, so it has no results yet."
NOT_SCORED = "The run did not score this model: it scored the training runs of its arms, and this is none of them."
REPLACED = "The model has been trained again since the run scored it, so the run's results are left out."
SPELLED = "Text that spells a special token is encoded as its characters."
USE = f"A document begins with `{BEGIN}`, which the tokenizer puts first, and ends with `{END}`. {SPELLED}"
PARTNER_USE = (
    f"The model writes the partner of a seed: it reads the seed, whole from `{BEGIN}` to `{END}`, and then `{PARTNER}` "
    f"(`tokenizer.partner_token_id`); what follows, up to `{END}`, is the new document. {SPELLED}"
)


@dataclass(frozen=True)
class RunOfModel:
    """The run that a model is a part of.

    Attributes:
        directory: of the run.
        config: of the run.
        stages: of the run, by name.
        name: of the stage whose output the model is.
    """

    directory: Path
    config: RunConfig
    stages: dict[str, Stage]
    name: str

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest of a stage; None if it is not finished."""
        directory = self.directory / name
        return Manifest.read(directory) if (directory / MANIFEST).is_file() else None


def model_card(model: Path, corpus: Path) -> str:
    """Return the content of the `README.md` of an exported model.

    It names no path of this machine. Figures are those of the run that the model is a part of, in the words of its report.

    Args:
        model: output of `train`, `choose` or `import`.
        corpus: output of `prepare` that the model was trained on.

    Raises:
        UserError: an input is not finished, or the run's configuration cannot be read.
    """
    manifest, run = Manifest.read(model), run_of(model)
    tunes = manifest.counts.get("arm") == SYNTHESIZER
    title = f"{run.config.name}: {run.name}" if run else model.name
    sections = {
        "": _summary(manifest, run),
        "Use": PARTNER_USE if tunes else USE,
        "The model": _table(("", ""), _facts(model, manifest)),
        "Training data": _table(("", ""), _data(Manifest.read(corpus, "prepare").counts)),
        "Results": _results(manifest, run) if run else "",
        "Made from": _table(("output", "stage", "fingerprint"), _lineage(manifest, run)),
    }
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in TAGS),
        "---",
    ]
    body = (f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items() if text)
    return "\n\n".join(["\n".join(front), f"# {title}", *body]) + "\n"


def run_of(model: Path) -> RunOfModel | None:
    """Return the run that a model's directory is a part of; None if it stands alone."""
    model = model.resolve()
    directory = model.parent.parent  # the names of stages that make models have two parts
    if not (directory / RUN_CONFIG).is_file() or not (directory / PREPARE / MANIFEST).is_file():
        return None
    config, name = load_config([directory / RUN_CONFIG]), model.relative_to(directory).as_posix()
    stages = stages_of(config)
    return RunOfModel(directory, config, stages, name) if name in stages else None


def _summary(manifest: Manifest, run: RunOfModel | None) -> str:
    arm, version = manifest.counts.get("arm"), f"sbp-fast {manifest.code_version}"
    if arm is None:
        return f"A model that {version} took over from a Hugging Face directory and did not train."
    experiment = f"the experiment `{run.config.name}`" if run else "an experiment"
    if arm == SYNTHESIZER:
        return f"The synthesizer of {experiment} in {METHOD}, tuned on pairs of documents by {version}."
    return f"The arm `{arm}` of {experiment} in {METHOD}, trained from scratch by {version}."


def _facts(model: Path, manifest: Manifest) -> Iterable[tuple[str, str]]:
    """Yield what the manifest and the description of a model say of it."""
    shape, vocabulary_size = read_description(model)
    counts = manifest.counts
    yield "layers, hidden size", f"{shape.layers}, {shape.hidden_size}"
    yield "heads, of keys and values", f"{shape.heads}, {shape.kv_heads}"
    yield "tokens in the vocabulary", f"{vocabulary_size:,}"
    yield "context of a document", f"{shape.context:,} tokens"
    if "parameters" not in counts:
        return
    yield "parameters", f"{counts['parameters']:,}"
    yield "training tokens", f"{counts['tokens']:,}, of which {counts['loss_tokens']:,} have a loss"
    for source, read in counts["sources"].items():
        yield f"{source} tokens", f"{read['tokens']:,}, read {read['epochs']:.3g} times"
    if "pairs" in counts:
        yield "pairs", f"{counts['pairs']:,}, read {counts['epochs']:.3g} times"
    recipe = counts["choice"]["recipe"] if "choice" in counts else manifest.config.get("recipe", {})
    for name in ("optimizer", "learning_rate", "schedule", "weight_decay", "tokens_per_step"):
        if name in recipe:
            yield name.replace("_", " "), str(recipe[name])
    if "seed" in manifest.config:
        yield "seed", str(manifest.config["seed"])
    yield "training", f"{manifest.flops:.2e} FLOPs, {duration(manifest.seconds)} on {manifest.device}"


def _data(counts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield what the manifest of a prepared corpus says of it."""
    yield "documents", f"{counts['documents']:,} of {counts['tokens']:,} tokens"
    yield "unique documents", f"{counts['unique_documents']:,} of {counts['unique_tokens']:,} tokens"
    yield "held-out documents", f"{counts['heldout_documents']:,}"
    sources = sorted(counts["sources"].items(), key=lambda item: -item[1])
    for source, documents in sources[:MOST_SOURCES]:
        yield f"source {source or 'without a name'}", f"{documents:,} documents"
    if len(sources) > MOST_SOURCES:
        yield "further sources", f"{len(sources) - MOST_SOURCES}"


def _results(manifest: Manifest, run: RunOfModel) -> str:
    """Return the run's results of a model, or why there are none."""
    sources = {source.synthesizer: source for source in used_sources(run.config).values()}
    runs = {model_stage(arm, name): (arm, name) for arm in arms_of(run.config).values() for name in arm.runs}
    if run.name not in sources | runs:
        return NOT_SCORED
    if any(run.manifest(name) is None for name in run.stages):
        return UNFINISHED
    if run.name in sources:
        source = sources[run.name]
        scores = run.manifest(relation_stage(source))
    else:
        arm, name = runs[run.name]
        scores, comparison = run.manifest(evaluate_stage(name)), run.manifest(COMPARE)
        if scores and comparison and scores.fingerprint not in comparison.inputs.values():
            return REPLACED
    if scores is None or scores.inputs["model"] != manifest.fingerprint:
        return REPLACED
    results = collect(run.directory, hashed=False)
    if run.name in sources:
        return "\n\n".join(relation_sentences(results["sources"][source.name]["relation"]))
    return _arm_results(results, arm)


def _arm_results(results: Mapping[str, Any], arm: Arm) -> str:
    """Return the metrics of an arm as a table, and the sentences of the report about the run."""
    scores, rows = results["arms"][arm.name], []
    for name, metric in main_metrics(results["metrics"]).items():
        difference = scores["difference_to_baseline"].get(name)
        label = f"{metric['label']}{', %' if metric['percent'] else ''}"
        rows.append((label, shown_score(scores[name], metric), shown_difference(difference, metric) if difference else ""))
    runs = len(arm.runs)
    return "\n\n".join(
        [
            f"{scores['label']} {arm_descriptions(results)[arm.name]}.",
            _table(("on held-out text and questions", "this arm", "against the baseline"), rows),
            f"The figures are of the arm, which has {runs} training {'run' if runs == 1 else 'runs'}.",
            " ".join(headline(results)),
        ]
    )


def _lineage(manifest: Manifest, run: RunOfModel | None) -> Iterable[tuple[str, str, str]]:
    """Yield the outputs that a model was made from, each after those that were made from it, with their fingerprints.

    Within a run these are followed back to the corpus, a synthesizer among them, as far as the run still holds the outputs
    that the model was made from.
    """
    yield "this model", run.name if run else "", manifest.fingerprint
    waiting, seen = [(run.name if run else "", manifest)], {manifest.fingerprint}
    for stage, made in waiting:
        for name, fingerprint in made.inputs.items():
            if fingerprint in seen:
                continue
            seen.add(fingerprint)
            source = run.stages[stage].inputs.get(name, "") if run and stage else ""
            held = run.manifest(source) if run and source else None
            if held is not None and held.fingerprint == fingerprint:
                waiting.append((source, held))
                name = SYNTHESIZER if held.counts.get("arm") == SYNTHESIZER else name
            yield name, source, fingerprint


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(headings), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
