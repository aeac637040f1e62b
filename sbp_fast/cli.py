"""The command line: each command loads its configuration and calls one function; a mistake is one line, no traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sbp_fast import __version__
from sbp_fast.cli_options import Address, Corpus, EngineName, Force, Gpus, Out, Settings, load_settings, stoppable
from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.choose import open_workers
from sbp_fast.pipeline.progress import Console

app = typer.Typer(
    help="Synthetic bootstrapped pretraining: learn how documents relate, write more of them, pretrain on both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    # Waiting threads spin, which beside another busy process costs far more than it saves (docs/log.md). The variable is read
    # when torch is first imported, which is one reason why commands import what they need themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes that raise the same error, one prints it
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Print the version."""
    if show:
        print(f"sbp-fast {__version__}")
        raise typer.Exit


@app.command(epilog="Example: sbp-fast run demo corpus.path='mine/*.jsonl.zst' --out runs/mine")
def run(
    settings: Settings,
    out: Annotated[Path | None, typer.Option(help="The run's directory (default: runs/NAME).")] = None,
    gpus: Gpus = 1,
    engine: EngineName = "local",
    address: Address = None,
    force: Annotated[bool, typer.Option("--force", help="Rerun the stages that a changed setting or input affects.")] = False,
) -> None:
    """Run the whole experiment, from documents to report; a stopped run resumes."""
    config = load_settings(settings)
    from sbp_fast.experiment.report.summary import summary_table
    from sbp_fast.experiment.results import collect
    from sbp_fast.experiment.run import run as run_experiment

    directory = out or Path("runs") / config.name
    with stoppable() as console, open_workers(engine, address) as workers:
        report = run_experiment(config, directory, console=console, gpus=gpus, force=force, workers=workers)
    console.rich.print(summary_table(collect(directory)))
    console.say(f"report: {report}")


@app.command(epilog="Example: sbp-fast prepare demo corpus.path=mine.jsonl --out mine/prepare")
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
) -> None:
    """Turn documents into shuffled, checksummed token shards, and train or load their tokenizer."""
    config = load_settings([*settings, *([] if on_error is None else [f"corpus.on_error={on_error}"])])
    from sbp_fast.stages.prepare import prepare as work

    with open_workers(engine, address) as workers:
        work(config, out, console=Console(), force=force, workers=workers)


@app.command(epilog="Example: sbp-fast train demo pretrain.tokens=200000 --arm baseline --corpus mine/prepare --out mine/train")
def train(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    arm: Annotated[str, typer.Option(help="Arm to train, a table \\[arms.NAME]: baseline, sbp, oracle or one of yours.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Training seed (default: the arm's first).")] = None,
    synthetic: Annotated[Path | None, typer.Option(help="Output of `filter`, for an arm that reads synthetic text.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Output of `pair`: tune the synthesizer on it.")] = None,
    start: Annotated[Path | None, typer.Option(help="With --pairs: the model that the synthesizer starts from.")] = None,
    gpus: Gpus = 1,
    profile: Annotated[str | None, typer.Option(help="Record steps FIRST:LAST into OUT.profile, such as 10:13.")] = None,
    force: Force = False,
) -> None:
    """Train an arm from scratch (the baseline by default), or tune the synthesizer (--pairs, --start).

    Under torchrun, on any number of machines, all processes train together.
    """
    config = load_settings(settings)
    if pairs is not None and (arm or seed is not None):
        raise UserError("options", "exclude each other", "give --arm with --seed, or --pairs with --start")
    from sbp_fast.pipeline.distributed import run_in_processes
    from sbp_fast.stages.train import train as work
    from sbp_fast.train.task import TrainTask

    task = TrainTask.of_synthesizer(config) if pairs else TrainTask.of_arm(config, arm or config.baseline, seed)
    inputs = {"corpus": corpus, "synthetic": synthetic, "pairs": pairs, "start": start}
    options = {"force": force, "profile_steps": profile}
    with stoppable() as console:
        run_in_processes(work, config, task, out, gpus=gpus, console=console, **inputs, **options)


@app.command(epilog="Example: sbp-fast embed demo embed.model=Qwen/Qwen3-Embedding-0.6B --corpus mine/prepare --out mine/embed")
def embed(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
) -> None:
    """Embed the unique and the held-out documents as unit vectors."""
    config = load_settings(settings)
    from sbp_fast.stages.embed import embed as work

    with open_workers(engine, address) as workers:
        work(config, corpus, out, console=Console(), force=force, workers=workers)


@app.command(
    epilog="Example: sbp-fast pair demo pair.similarity_low=0.6 --corpus mine/prepare --vectors mine/embed --out mine/pair"
)
def pair(
    settings: Settings,
    *,
    corpus: Corpus,
    vectors: Annotated[Path | None, typer.Option(help="Output of `embed`; none if pair.file names known pairs.")] = None,
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
) -> None:
    """Find related documents that are not near-duplicates of each other."""
    config = load_settings(settings)
    from sbp_fast.stages.pair import pair as work

    with open_workers(engine, address) as workers:
        work(config, corpus, vectors, out, console=Console(), force=force, workers=workers)


@app.command(epilog="Example: sbp-fast index demo --to mine/pair --corpus more/prepare --vectors more/embed --out more/index")
def index(
    settings: Settings,
    *,
    to: Annotated[Path, typer.Option(help="Output of `pair` with an index, or of an earlier `index`; it stays as it is.")],
    corpus: Corpus,
    vectors: Annotated[Path, typer.Option(help="Output of `embed` on --corpus, with the settings of those in the index.")],
    out: Out,
    force: Force = False,
) -> None:
    """Add the unique documents of another corpus to an index that `pair` saved."""
    config = load_settings(settings)
    from sbp_fast.stages.index import index as work

    work(config, to, corpus, vectors, out, console=Console(), force=force)


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
    count: Annotated[int, typer.Option(min=1, help="Number of documents to print.")] = 10,
) -> None:
    """Print the unique documents nearest to a text or a document: similarity, id, corpus if there are several, first words."""
    from sbp_fast.neighbors.query import find_neighbors

    query = {"text": text, "document": document}
    for neighbor in find_neighbors(RunConfig(), index, corpora=corpus, vectors=vectors or (), **query, count=count):
        directory = f"  {neighbor.corpus}" if len(corpus) > 1 else ""
        print(f"{neighbor.similarity:.4f}  {neighbor.id}{directory}  {' '.join(neighbor.text.split())[:100]}")


@app.command(epilog="Example: sbp-fast synthesize demo --corpus mine/prepare --model mine/synthesizer --out mine/synthesize")
def synthesize(
    settings: Settings,
    *,
    corpus: Corpus,
    model: Annotated[Path, typer.Option(help="A synthesizer: output of `train --pairs`.")],
    out: Out,
    backend: Annotated[str | None, typer.Option(help="Name of a generation backend, as synthesize.backend.")] = None,
    gpus: Gpus = 1,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
) -> None:
    """Sample new documents, each related to a real one.

    Under torchrun, on any number of machines, the processes share the work.
    """
    config = load_settings([*settings, *([] if backend is None else [f"synthesize.backend={backend}"])])
    from sbp_fast.pipeline.distributed import run_in_processes
    from sbp_fast.stages.synthesize import synthesize as work

    if gpus > 1 and engine != "local":
        raise UserError("options", "exclude each other", "give --gpus, or --engine ray, which takes the GPUs of its cluster")
    with open_workers(engine, address) as workers:
        if workers.local:
            run_in_processes(work, config, out, gpus=gpus, console=Console(), corpus=corpus, model=model, force=force)
        else:
            work(config, out, corpus=corpus, model=model, console=Console(), force=force, workers=workers)


@app.command(
    name="filter",
    epilog="Example: sbp-fast filter demo --corpus mine/prepare --synthetic mine/synthesize --out mine/filter",
)
def filter_command(
    settings: Settings,
    *,
    corpus: Corpus,
    synthetic: Annotated[Path, typer.Option(help="Output of `synthesize`.")],
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
) -> None:
    """Filter synthetic documents, and list the rejected ones with their reject reasons."""
    config = load_settings(settings)
    from sbp_fast.stages.filter import filter_documents as work

    with open_workers(engine, address) as workers:
        work(config, out, corpus=corpus, synthetic=synthetic, console=Console(), force=force, workers=workers)


@app.command(epilog="Example: sbp-fast quality demo --corpus C --synthetic S --filtered F --pairs P --out mine/quality")
def quality(
    settings: Settings,
    *,
    corpus: Corpus,
    synthetic: Annotated[Path, typer.Option(help="Output of `synthesize`.")],
    filtered: Annotated[Path, typer.Option(help="Output of `filter` on it.")],
    pairs: Annotated[Path, typer.Option(help="Output of `pair`; documents below the low end of its band are unrelated.")],
    out: Out,
    force: Force = False,
) -> None:
    """Measure the quality of synthetic documents."""
    config = load_settings(settings)
    from sbp_fast.stages.quality import measure_quality

    inputs = {"corpus": corpus, "synthetic": synthetic, "filtered": filtered, "pairs": pairs}
    measure_quality(config, out, **inputs, console=Console(), force=force)


@app.command(
    epilog="Example: sbp-fast relation demo --corpus mine/prepare --pairs mine/pair --model mine/synthesizer --out mine/rel"
)
def relation(
    settings: Settings,
    *,
    corpus: Corpus,
    pairs: Annotated[Path, typer.Option(help="Output of `pair`, whose pairs of held-out documents are read.")],
    model: Annotated[Path, typer.Option(help="A synthesizer: output of `train --pairs`.")],
    out: Out,
    force: Force = False,
) -> None:
    """Measure whether a synthesizer learnt a relation: nats of held-out partners given their own seed, another, none."""
    config = load_settings(settings)
    from sbp_fast.stages.relation import measure_relation

    measure_relation(config, out, corpus=corpus, pairs=pairs, model=model, console=Console(), force=force)


@app.command(epilog="Example: sbp-fast evaluate demo --corpus mine/prepare --model mine/train --out mine/evaluate")
def evaluate(
    settings: Settings,
    *,
    corpus: Corpus,
    model: Annotated[Path, typer.Option(help="A trained model: output of `train`.")],
    out: Out,
    force: Force = False,
) -> None:
    """Score a model on held-out text and multiple-choice questions."""
    config = load_settings(settings)
    from sbp_fast.stages.evaluate import evaluate as work

    work(config, out, corpus=corpus, model=model, console=Console(), force=force)


@app.command(epilog="Example: sbp-fast compare demo --scores baseline=mine/a --scores sbp=mine/b --out mine/compare")
def compare(
    settings: Settings,
    *,
    scores: Annotated[
        list[str],
        typer.Option(help="ARM=DIRECTORY, output of `evaluate`; the baseline first, several for an arm with seeds."),
    ],
    out: Out,
    force: Force = False,
) -> None:
    """Compare arms by their scores, with intervals."""
    config = load_settings(settings)
    from sbp_fast.stages.compare import compare as work

    directories: dict[str, list[Path]] = {}
    for entry in scores:
        name, equals, directory = entry.partition("=")
        if not equals:
            raise UserError(f"--scores {entry}", "has no name", "write it as ARM=DIRECTORY, such as baseline=mine/evaluate")
        directories.setdefault(name, []).append(Path(directory))
    work(config, out, scores=directories, console=Console(), force=force)


@app.command(epilog="Example: sbp-fast report runs/demo")
def report(directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")]) -> None:
    """Rewrite report.html and results.json of a finished run."""
    from sbp_fast.experiment.report.page import write_report

    print(write_report(directory))


@app.command(epilog="Example: sbp-fast plan 3b-200b --gpus 64 --gpu h200")
def plan(
    settings: Settings,
    gpus: Annotated[int, typer.Option(min=0, help="Number of GPUs (0: as many as share the weights, or one).")] = 0,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100 (80 GB), h100, h200 or b200.")] = "h100",
) -> None:
    """Estimate memory, FLOPs, GPU hours and disk of every stage, and whether training fits, by arithmetic alone."""
    config = load_settings(settings)
    from sbp_fast.experiment.plan.tables import plan_tables

    for part in plan_tables(config, gpus or config.parallel.shard_processes or 1, gpu):
        Console().rich.print(part, soft_wrap=isinstance(part, str))


@app.command(epilog="Example: sbp-fast doctor")
def doctor() -> None:
    """Show what this machine can do and what is missing."""
    from sbp_fast.doctor import diagnose

    Console().rich.print(diagnose())


@app.command(epilog="Example: sbp-fast export runs/demo/train/sbp --corpus runs/demo/prepare --out demo-sbp")
def export(model: Annotated[Path, typer.Argument(help="A trained model's directory.")], *, corpus: Corpus, out: Out) -> None:
    """Write a model as a Hugging Face directory that transformers and vLLM load."""
    from sbp_fast.stages.huggingface import export_hugging_face

    export_hugging_face(model, corpus / "tokenizer.json", out)
    print(out)


@app.command(name="export-tokens", epilog="Example: sbp-fast export-tokens mine/prepare/train --to megatron --out mine/out")
def export_tokens(
    corpus: Annotated[str, typer.Argument(help="A token corpus: a directory or URL such as mine/prepare/train.")],
    *,
    to: Annotated[str, typer.Option(help="megatron, mds or parquet.")],
    out: Out,
    force: Force = False,
) -> None:
    """Write token shards in the format of Megatron-LM, MosaicML streaming, or as parquet."""
    from sbp_fast.stages.export_tokens import export_tokens as work

    work(corpus, to, out, console=Console(), force=force)


@app.command(name="import", epilog="Example: sbp-fast import Qwen3-0.6B --out mine/base")
def import_command(
    directory: Annotated[Path, typer.Argument(help="A Hugging Face directory on this machine.")], *, out: Out
) -> None:
    """Turn a Hugging Face Qwen3 or Llama directory into a model to start from."""
    from sbp_fast.stages.huggingface import import_hugging_face

    import_hugging_face(directory, out)
    print(out)
