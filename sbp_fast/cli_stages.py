"""The commands that run one stage of an experiment each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbp_fast.cli_options import (
    Address,
    Corpus,
    DryRun,
    EngineName,
    Force,
    Gpus,
    Out,
    Profile,
    Settings,
    SourceName,
    Verbose,
    load_settings,
    load_source,
    print_parts,
    stage_console,
)
from sbp_fast.config import EmbedConfig, RunConfig
from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.choose import open_workers
from sbp_fast.pipeline.progress import print_line

if TYPE_CHECKING:
    from sbp_fast.train.task import TrainTask

app = typer.Typer()


@app.command(epilog="Example: sbp-fast prepare small corpus.path=mine.jsonl --out mine/prepare")
def prepare(
    settings: Settings,
    *,
    out: Out,
    on_error: Annotated[
        str | None, typer.Option(help="An unusable record: stop, or skip and list it (as corpus.on_error).")
    ] = None,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Turn documents into shuffled, checksummed token shards, and train or load their tokenizer."""
    config = load_settings([*settings, *([] if on_error is None else [f"corpus.on_error={on_error}"])])
    with stage_console("prepare", verbose) as console, open_workers(engine, address) as workers:
        from sbp_fast.stages.prepare import prepare as work

        work(config, out, console=console, force=force, workers=workers)


@app.command(epilog="Example: sbp-fast train small pretrain.tokens=99000 --arm baseline --corpus mine/prepare --out mine/train")
def train(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    arm: Annotated[str, typer.Option(help="Arm to train, a table \\[arms.NAME]: baseline, sbp, oracle or one of yours.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Training seed (default: the arm's first).")] = None,
    synthetic: Annotated[
        Path | None, typer.Option(help="Output of `filter` or `stitch`, for an arm that reads synthetic documents.")
    ] = None,
    stitched: Annotated[
        Path | None, typer.Option(help="Output of `stitch --pairs`, for an arm that reads related documents joined.")
    ] = None,
    gpus: Gpus = 1,
    profile: Profile = None,
    force: Force = False,
    verbose: Verbose = False,
    dry_run: DryRun = False,
) -> None:
    """Train an arm from scratch, by default the baseline.

    Under torchrun, on any number of machines, all processes train together.
    """
    config = load_settings(settings)
    from sbp_fast.train.task import TrainTask

    task = TrainTask.of_arm(config, arm or config.baseline, seed)
    inputs = {"corpus": corpus, "synthetic": synthetic, "stitched": stitched}
    if dry_run:
        from sbp_fast.experiment.dry_run import describe, training_entry

        print_parts(describe([training_entry(config, task, out, inputs, gpus=gpus, force=force)], out))
        return
    _train(config, task, out, inputs, gpus=gpus, verbose=verbose, force=force, profile_steps=profile)


@app.command(epilog="Example: sbp-fast tune small --corpus mine/prepare --pairs mine/pair --start mine/train --out mine/tune")
def tune(
    settings: Settings,
    *,
    corpus: Corpus,
    pairs: Annotated[Path, typer.Option(help="Output of `pair`.")],
    start: Annotated[
        Path | None, typer.Option(help="Model to start from, unless from scratch: output of `train` or `import`.")
    ] = None,
    source: SourceName = "related",
    out: Out,
    gpus: Gpus = 1,
    profile: Profile = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Tune a synthesizer to write a document's partner after the document.

    Under torchrun, on any number of machines, all processes train together.
    """
    config, tuned = load_source(settings, source)
    from sbp_fast.train.task import TrainTask

    task = TrainTask.of_synthesizer(config, from_scratch=tuned.from_scratch)
    inputs = {"corpus": corpus, "pairs": pairs, "start": start}
    _train(config, task, out, inputs, gpus=gpus, verbose=verbose, force=force, profile_steps=profile)


def _train(
    config: RunConfig, task: TrainTask, out: Path, inputs: dict[str, Path | None], *, gpus: int, verbose: bool, **options: Any
) -> None:
    with stage_console(f"train {task.name}", verbose) as console:
        from sbp_fast.pipeline.launcher import run_in_processes
        from sbp_fast.stages.train import train as work

        run_in_processes(work, config, task, out, gpus=gpus, console=console, **inputs, **options)


@app.command(epilog="Example: sbp-fast embed small embed.model=Qwen/Qwen3-Embedding-0.6B --corpus C --out mine/embed")
def embed(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Embed the unique and the held-out documents as unit vectors."""
    config = load_settings(settings)
    with stage_console("embed", verbose) as console, open_workers(engine, address) as workers:
        from sbp_fast.stages.embed import embed as work

        work(config, corpus, out, console=console, force=force, workers=workers)


@app.command(
    epilog="Example: sbp-fast pair small pair.similarity_low=0.6 --corpus mine/prepare --vectors mine/embed --out mine/pair"
)
def pair(
    settings: Settings,
    *,
    corpus: Corpus,
    vectors: Annotated[Path | None, typer.Option(help="Output of `embed`; none where pair.file names known pairs.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="In place of --vectors: pairs whose partners to shuffle.")] = None,
    source: SourceName = "related",
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Find related documents that are not near-duplicates of each other, or shuffle the partners of related ones (--pairs)."""
    config, _ = load_source(settings, source)
    if pairs is not None and vectors is not None:
        raise UserError("options", "exclude each other", "give --vectors, or --pairs to shuffle")
    with stage_console("pair", verbose) as console, open_workers(engine, address) as workers:
        from sbp_fast.stages.pair import pair as work
        from sbp_fast.stages.random_pairs import pair_at_random

        if pairs is not None:
            pair_at_random(config, out, corpus=corpus, pairs=pairs, console=console, force=force)
        else:
            work(config, corpus, vectors, out, console=console, force=force, workers=workers)


@app.command(epilog="Example: sbp-fast index small --to mine/pair --corpus more/prepare --vectors more/embed --out more/index")
def index(
    settings: Settings,
    *,
    to: Annotated[Path, typer.Option(help="Output of `pair` with an index, or of an earlier `index`; it stays as it is.")],
    corpus: Corpus,
    vectors: Annotated[Path, typer.Option(help="Output of `embed` on --corpus, with the settings of those in the index.")],
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Add the unique documents of another corpus to an index that `pair` saved."""
    config = load_settings(settings)
    with stage_console("index", verbose) as console:
        from sbp_fast.stages.index import index as work

        work(config, to, corpus, vectors, out, console=console, force=force)


@app.command(epilog="Example: sbp-fast neighbors mine/pair --corpus mine/prepare --text 'ships of the navy'")
def neighbors(
    index: Annotated[
        Path, typer.Argument(help="Output of `pair` with an index (pair.backend=hnsw or pair.save_index), or of `index`.")
    ],
    *,
    corpus: Annotated[list[Path], typer.Option(help="Output of `prepare`; once for each corpus in the index.")],
    vectors: Annotated[list[Path] | None, typer.Option(help="With --document: output of `embed` on its corpus.")] = None,
    text: Annotated[str, typer.Option(help="Text to search for.")] = "",
    document: Annotated[str, typer.Option(help="Or the id of a unique document to search for.")] = "",
    model: Annotated[str | None, typer.Option(help="With --text: the index's encoder, as embed.model.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of documents to print.")] = 10,
) -> None:
    """Print the unique documents nearest to a text or a document: similarity, id, corpus if there are several, first words."""
    from sbp_fast.neighbors.query import find_neighbors

    query = {"text": text, "document": document}
    config = RunConfig() if model is None else RunConfig(embed=EmbedConfig(model=model))
    for neighbor in find_neighbors(config, index, corpora=corpus, vectors=vectors or (), **query, count=count):
        directory = f"  {neighbor.corpus}" if len(corpus) > 1 else ""
        print_line(f"{neighbor.similarity:.4f}  {neighbor.id}{directory}  {' '.join(neighbor.text.split())[:100]}")


@app.command(epilog="Example: sbp-fast stitch small --corpus mine/prepare --synthetic mine/filter --out mine/stitch")
def stitch(
    settings: Settings,
    *,
    corpus: Corpus,
    pairs: Annotated[Path | None, typer.Option(help="Output of `pair`: join unique documents with related ones.")] = None,
    synthetic: Annotated[Path | None, typer.Option(help="Output of `filter`: join the documents of each seed.")] = None,
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Join documents that belong together to documents of up to a context."""
    config = load_settings(settings)
    if (pairs is None) == (synthetic is None):
        raise UserError("options", "need either --pairs or --synthetic", "give the output of `pair`, or of `filter`")
    with stage_console("stitch", verbose) as console:
        from sbp_fast.stages.stitch import stitch as work

        work(config, out, corpus=corpus, pairs=pairs, synthetic=synthetic, console=console, force=force)


@app.command(epilog="Example: sbp-fast choose mine.toml --arm baseline-tuned --models mine/a --models mine/b --out mine/choose")
def choose(
    settings: Settings,
    *,
    arm: Annotated[str, typer.Option(help="Arm with several recipes, a table \\[arms.NAME].")],
    models: Annotated[list[Path], typer.Option(help="Output of `train`, one for each recipe in their order.")],
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Choose the recipe whose model has the lowest loss on validation documents."""
    config = load_settings(settings)
    if arm not in config.arms:
        raise UserError(f"--arm {arm}", "is unknown", f"known: {', '.join(config.arms)}")
    with stage_console("choose", verbose) as console:
        from sbp_fast.stages.choose import choose as work

        work(config, out, arm=arm, models={str(model): model for model in models}, console=console, force=force)


@app.command(epilog="Example: sbp-fast synthesize small --corpus mine/prepare --model mine/synthesizer --out mine/synthesize")
def synthesize(
    settings: Settings,
    *,
    corpus: Corpus,
    model: Annotated[Path, typer.Option(help="A synthesizer, output of `tune`; any model for a source without pairs.")],
    source: SourceName = "related",
    out: Out,
    backend: Annotated[str | None, typer.Option(help="Name of a generation backend, as synthesize.backend.")] = None,
    gpus: Gpus = 1,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Sample new documents, each related to a real one.

    Under torchrun, on any number of machines, the processes share the work.
    """
    config, _ = load_source([*settings, *([] if backend is None else [f"synthesize.backend={backend}"])], source)
    if gpus > 1 and engine != "local":
        raise UserError("options", "exclude each other", "give --gpus, or --engine ray, which takes the GPUs of its cluster")
    with stage_console("synthesize", verbose) as console, open_workers(engine, address) as workers:
        from sbp_fast.pipeline.launcher import run_in_processes
        from sbp_fast.stages.synthesize import synthesize as work

        options: dict[str, Any] = {"corpus": corpus, "model": model, "console": console, "force": force}
        if workers.local:
            run_in_processes(work, config, out, gpus=gpus, **options)
        else:
            work(config, out, workers=workers, **options)


@app.command(
    name="filter",
    epilog="Example: sbp-fast filter small --corpus mine/prepare --synthetic mine/synthesize --out mine/filter",
)
def filter_command(
    settings: Settings,
    *,
    corpus: Corpus,
    synthetic: Annotated[Path, typer.Option(help="Output of `synthesize`.")],
    source: SourceName = "related",
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Filter synthetic documents, and list the rejected ones with their reject reasons."""
    config, _ = load_source(settings, source)
    with stage_console("filter", verbose) as console, open_workers(engine, address) as workers:
        from sbp_fast.stages.filter import filter_documents as work

        work(config, out, corpus=corpus, synthetic=synthetic, console=console, force=force, workers=workers)


@app.command(epilog="Example: sbp-fast quality small --corpus C --synthetic S --filtered F --pairs P --out mine/quality")
def quality(
    settings: Settings,
    *,
    corpus: Corpus,
    synthetic: Annotated[Path, typer.Option(help="Output of `synthesize`.")],
    filtered: Annotated[Path, typer.Option(help="Output of `filter` on it.")],
    pairs: Annotated[Path, typer.Option(help="Output of `pair`; documents below the low end of its band are unrelated.")],
    source: SourceName = "related",
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Measure the quality of synthetic documents."""
    config, _ = load_source(settings, source)
    inputs = {"corpus": corpus, "synthetic": synthetic, "filtered": filtered, "pairs": pairs}
    with stage_console("quality", verbose) as console:
        from sbp_fast.stages.quality import measure_quality

        measure_quality(config, out, **inputs, console=console, force=force)


@app.command(
    epilog="Example: sbp-fast relation small --corpus mine/prepare --pairs mine/pair --model mine/synthesizer --out mine/rel"
)
def relation(
    settings: Settings,
    *,
    corpus: Corpus,
    pairs: Annotated[Path, typer.Option(help="Output of `pair`, whose pairs of held-out documents are read.")],
    model: Annotated[Path, typer.Option(help="A synthesizer: output of `tune`.")],
    source: SourceName = "related",
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Measure whether a synthesizer learnt a relation: nats of held-out partners given their own seed, another, none."""
    config, _ = load_source(settings, source)
    with stage_console("relation", verbose) as console:
        from sbp_fast.stages.relation import measure_relation

        measure_relation(config, out, corpus=corpus, pairs=pairs, model=model, console=console, force=force)


@app.command(epilog="Example: sbp-fast evaluate small --corpus mine/prepare --model mine/train --out mine/evaluate")
def evaluate(
    settings: Settings,
    *,
    corpus: Corpus,
    model: Annotated[Path, typer.Option(help="A trained model: output of `train`.")],
    harness: Annotated[
        str, typer.Option(metavar="TASKS", help="Instead, run these tasks of lm-evaluation-harness, separated by commas.")
    ] = "",
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Score a model on held-out text and questions, or by lm-evaluation-harness."""
    config = load_settings(settings)
    with stage_console("evaluate", verbose) as console:
        from sbp_fast.stages.evaluate import evaluate as work
        from sbp_fast.stages.harness import evaluate_by_harness

        if harness:
            tasks = [name.strip() for name in harness.split(",")]
            evaluate_by_harness(config, out, corpus=corpus, model=model, tasks=tasks, console=console, force=force)
        else:
            work(config, out, corpus=corpus, model=model, console=console, force=force)


@app.command(epilog="Example: sbp-fast compare small --scores baseline=mine/a --scores sbp=mine/b --out mine/compare")
def compare(
    settings: Settings,
    *,
    scores: Annotated[
        list[str],
        typer.Option(help="ARM=DIRECTORY, output of `evaluate`; the baseline first, several for an arm with seeds."),
    ],
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Compare arms by their scores, with intervals."""
    config = load_settings(settings)
    directories: dict[str, list[Path]] = {}
    for entry in scores:
        name, equals, directory = entry.partition("=")
        if not equals:
            raise UserError(f"--scores {entry}", "has no name", "write it as ARM=DIRECTORY, such as baseline=mine/evaluate")
        directories.setdefault(name, []).append(Path(directory))
    with stage_console("compare", verbose) as console:
        from sbp_fast.stages.compare import compare as work

        work(config, out, scores=directories, console=console, force=force)


for _command in app.registered_commands:
    _command.rich_help_panel = "Single stages"  # their heading in `sbp-fast --help`
