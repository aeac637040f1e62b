"""The command line: each command loads its configuration, calls one function, and speaks plainly about mistakes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sbp_fast import __version__
from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
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

Settings = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG... [KEY.PATH=VALUE]...",
        help="TOML files, or shipped names such as demo, composed left to right; then single settings.",
    ),
]
Out = Annotated[Path, typer.Option(help="Directory to write; it must not hold anything else.")]
Corpus = Annotated[Path, typer.Option(help="Output of `prepare`.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output made from other settings or inputs.")]
Gpus = Annotated[
    int, typer.Option(min=1, help="Work as this many processes on this machine, one a GPU; without GPUs, on the CPU.")
]
EngineName = Annotated[str, typer.Option("--engine", help="What does the work: local (this machine) or ray (a cluster).")]
Address = Annotated[
    str | None, typer.Option(help="With --engine ray: auto (the default), HOST:PORT or ray://HOST:PORT of the cluster.")
]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    # Threads that wait for each other spin; beside another busy process that costs far more than it saves (docs/log.md).
    # Read once, when torch is first imported, which is why the commands import what they need themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes that meet the same mistake one says so
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
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
    force: Annotated[bool, typer.Option("--force", help="Redo the stages that a changed setting or input touches.")] = False,
) -> None:
    """Run the whole experiment, from documents to report; resumes where it stopped."""
    config = _load(settings)
    from sbp_fast.experiment.report.summary import summary_table
    from sbp_fast.experiment.results import collect
    from sbp_fast.experiment.run import run as run_experiment
    from sbp_fast.pipeline.distributed import Stopped

    console, directory = Console(), out or Path("runs") / config.name
    try:
        with open_workers(engine, address) as workers:
            report = run_experiment(config, directory, console=console, gpus=gpus, force=force, workers=workers)
    except Stopped as stopped:
        console.say(str(stopped))
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        console.say("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    console.rich.print(summary_table(collect(directory)))
    console.say(f"report: {report}")


@app.command(epilog="Example: sbp-fast prepare demo corpus.path=mine.jsonl --out mine/corpus")
def prepare(
    settings: Settings,
    *,
    out: Out,
    on_error: Annotated[
        str | None, typer.Option(help="A record that cannot be used: stop, or skip and list it (as corpus.on_error).")
    ] = None,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
) -> None:
    """Turn documents into shuffled, checksummed token shards, and train or load their tokenizer."""
    config = _load([*settings, *([] if on_error is None else [f"corpus.on_error={on_error}"])])
    from sbp_fast.stages.prepare import prepare as work

    with open_workers(engine, address) as workers:
        work(config, out, console=Console(), force=force, workers=workers)


@app.command(epilog="Example: sbp-fast train demo pretrain.tokens=200000 --corpus mine/corpus --out mine/base")
def train(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    oracle: Annotated[bool, typer.Option("--oracle", help="Read all documents, not the unique share alone.")] = False,
    synthetic: Annotated[Path | None, typer.Option(help="Kept synthetic documents: train jointly on both.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Related pairs: tune a synthesizer on them.")] = None,
    start: Annotated[Path | None, typer.Option(help="Model to start a synthesizer from.")] = None,
    gpus: Gpus = 1,
    profile: Annotated[str | None, typer.Option(help="Record steps FIRST:LAST into OUT.profile, such as 10:13.")] = None,
    force: Force = False,
) -> None:
    """Train a model: base by default, the oracle, a synthesizer (--pairs, --start) or jointly (--synthetic).

    Under torchrun, on any number of machines, it takes part in the run of all processes.
    """
    config = _load(settings)
    if sum([oracle, synthetic is not None, pairs is not None]) > 1 or (pairs is None) != (start is None):
        raise UserError("options", "do not go together", "give one of --oracle, --synthetic, or --pairs with --start")
    from sbp_fast.config import resolve_device
    from sbp_fast.pipeline.distributed import Stopped, launch, leads, world_size
    from sbp_fast.stages.train import Role
    from sbp_fast.stages.train import train as work

    if gpus > 1 and world_size() == 1:
        raise typer.Exit(launch(sys.argv[1:], gpus, resolve_device(config)))
    role: Role = "oracle" if oracle else "joint" if synthetic else "synthesizer" if pairs else "base"
    inputs = {"synthetic": synthetic, "pairs": pairs, "start": start}
    console = Console(quiet=not leads())
    try:
        work(config, out, role=role, corpus=corpus, **inputs, console=console, force=force, profile_steps=profile)
    except Stopped as stopped:
        console.say(str(stopped))
        raise typer.Exit(stopped.exit_code) from None


@app.command(
    epilog="Example: sbp-fast embed demo embed.model=Qwen/Qwen3-Embedding-0.6B --corpus mine/corpus --out mine/vectors"
)
def embed(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
) -> None:
    """Embed the unique documents as unit vectors."""
    config = _load(settings)
    from sbp_fast.stages.embed import embed as work

    with open_workers(engine, address) as workers:
        work(config, corpus, out, console=Console(), force=force, workers=workers)


@app.command(
    epilog="Example: sbp-fast pair demo pair.similarity_low=0.6 --corpus mine/corpus --vectors mine/vectors --out mine/pairs"
)
def pair(
    settings: Settings,
    *,
    corpus: Corpus,
    vectors: Annotated[Path, typer.Option(help="Output of `embed`.")],
    out: Out,
    engine: EngineName = "local",
    address: Address = None,
    force: Force = False,
) -> None:
    """Find related documents that are not near-copies of each other."""
    config = _load(settings)
    from sbp_fast.stages.pair import pair as work

    with open_workers(engine, address) as workers:
        work(config, corpus, vectors, out, console=Console(), force=force, workers=workers)


@app.command(epilog="Example: sbp-fast index demo --to mine/pairs --corpus more/corpus --vectors more/vectors --out more/index")
def index(
    settings: Settings,
    *,
    to: Annotated[Path, typer.Option(help="Output of `pair` with an index, or of an earlier `index`; it stays as it is.")],
    corpus: Corpus,
    vectors: Annotated[Path, typer.Option(help="Output of `embed` on --corpus, with the settings of those in the index.")],
    out: Out,
    force: Force = False,
) -> None:
    """Add the unique documents of another corpus to an index that `pair` kept."""
    config = _load(settings)
    from sbp_fast.stages.index import index as work

    work(config, to, corpus, vectors, out, console=Console(), force=force)


@app.command(epilog="Example: sbp-fast neighbours mine/pairs --corpus mine/corpus --text 'ships of the navy'")
def neighbours(
    index: Annotated[
        Path, typer.Argument(help="Output of `pair` with an index (pair.backend=hnswlib or pair.keep_index), or of `index`.")
    ],
    *,
    corpus: Annotated[list[Path], typer.Option(help="Output of `prepare`; once for each corpus in the index.")],
    vectors: Annotated[list[Path] | None, typer.Option(help="With --document: output of `embed` on its corpus.")] = None,
    text: Annotated[str, typer.Option(help="What to look for.")] = "",
    document: Annotated[str, typer.Option(help="Or the id of a unique document.")] = "",
    count: Annotated[int, typer.Option(min=1, help="How many to print.")] = 10,
) -> None:
    """Print the unique documents nearest to a text or a document: similarity, id, corpus if there are several, first words."""
    from sbp_fast.neighbors.query import neighbours as work

    found = work(RunConfig(), index, corpora=corpus, vectors=vectors or (), text=text, document=document, count=count)
    for neighbour in found:
        place = f"  {neighbour.corpus}" if len(corpus) > 1 else ""
        print(f"{neighbour.similarity:.4f}  {neighbour.id}{place}  {' '.join(neighbour.text.split())[:100]}")


@app.command(epilog="Example: sbp-fast synthesize demo --corpus mine/corpus --model mine/synthesizer --out mine/synthetic")
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

    Under torchrun, on any number of machines, it takes part in the work of all processes.
    """
    config = _load([*settings, *([] if backend is None else [f"synthesize.backend={backend}"])])
    from sbp_fast.config import resolve_device
    from sbp_fast.pipeline.distributed import launch, leads, world_size
    from sbp_fast.stages.synthesize import synthesize as work

    if gpus > 1 and engine != "local":
        raise UserError("options", "do not go together", "give --gpus, or --engine ray, which takes the GPUs of its cluster")
    if gpus > 1 and world_size() == 1:
        raise typer.Exit(launch(sys.argv[1:], gpus, resolve_device(config)))
    with open_workers(engine, address) as workers:
        console = Console(quiet=not leads())
        work(config, out, corpus=corpus, model=model, console=console, force=force, workers=workers)


@app.command(
    name="filter",
    epilog="Example: sbp-fast filter demo --corpus mine/corpus --synthetic mine/synthetic --out mine/kept",
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
    """Keep the sound synthetic documents, and say why each other one went."""
    config = _load(settings)
    from sbp_fast.stages.filter import filter_documents as work

    with open_workers(engine, address) as workers:
        work(config, out, corpus=corpus, synthetic=synthetic, console=Console(), force=force, workers=workers)


@app.command(epilog="Example: sbp-fast evaluate demo --corpus mine/corpus --model baseline=mine/base --out mine/evaluation")
def evaluate(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=DIRECTORY of a trained model; differences are against the first.")
    ] = None,
    synthetic: Annotated[Path | None, typer.Option(help="Output of `synthesize`: measure documents, not models.")] = None,
    kept: Annotated[Path | None, typer.Option(help="With --synthetic: output of `filter` on it.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="With --synthetic: output of `pair`; its band judges relevance.")] = None,
    force: Force = False,
) -> None:
    """Measure models on held-out text and multiple choice (--model), or the quality of synthetic documents (--synthetic)."""
    config = _load(settings)
    if synthetic is not None and kept is not None and pairs is not None and not model:
        from sbp_fast.stages.quality import measure_quality

        directories = {"corpus": corpus, "synthetic": synthetic, "kept": kept, "pairs": pairs}
        measure_quality(config, out, **directories, console=Console(), force=force)
        return
    if not model or synthetic or kept or pairs:
        raise UserError("options", "do not go together", "give --model, or --synthetic with --kept and --pairs")
    from sbp_fast.stages.evaluate import evaluate as work

    models = {}
    for entry in model:
        name, equals, directory = entry.partition("=")
        if not equals:
            raise UserError(f"--model {entry}", "has no name", "write it as NAME=DIRECTORY, such as baseline=mine/base")
        models[name] = Path(directory)
    work(config, out, corpus=corpus, models=models, console=Console(), force=force)


@app.command(epilog="Example: sbp-fast report runs/demo")
def report(directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")]) -> None:
    """Write report.html and results.json of a finished run anew."""
    from sbp_fast.experiment.report.page import write_report

    print(write_report(directory))


@app.command(epilog="Example: sbp-fast plan 3b-200b --gpus 64 --gpu h200")
def plan(
    settings: Settings,
    gpus: Annotated[int, typer.Option(min=0, help="How many train together (0: as many as share the weights, or one).")] = 0,
    gpu: Annotated[str, typer.Option(help="Which: a100 (80 GB), h100, h200 or b200.")] = "h100",
) -> None:
    """Say what every stage takes and whether it fits, by arithmetic alone: memory, FLOPs, GPU hours, disk."""
    config = _load(settings)
    from sbp_fast.experiment.plan.tables import plan_tables

    for part in plan_tables(config, gpus or config.parallel.shard_processes or 1, gpu):
        Console().rich.print(part, soft_wrap=isinstance(part, str))


@app.command(epilog="Example: sbp-fast doctor")
def doctor() -> None:
    """Say what this machine can do and what is missing."""
    from sbp_fast.doctor import diagnose

    Console().rich.print(diagnose())


@app.command(epilog="Example: sbp-fast export runs/demo/joint --corpus runs/demo/corpus --out demo-sbp")
def export(model: Annotated[Path, typer.Argument(help="A trained model's directory.")], *, corpus: Corpus, out: Out) -> None:
    """Write a model as a Hugging Face directory that transformers and vLLM load."""
    from sbp_fast.model.huggingface import export_model

    export_model(model, corpus / "tokenizer.json", out)
    print(out)


@app.command(name="export-tokens", epilog="Example: sbp-fast export-tokens mine/corpus/train --to megatron --out mine/megatron")
def export_tokens(
    corpus: Annotated[str, typer.Argument(help="A token corpus: a directory or URL such as mine/corpus/train.")],
    *,
    to: Annotated[str, typer.Option(help="megatron, mds or parquet.")],
    out: Out,
    force: Force = False,
) -> None:
    """Write token shards in the format of Megatron-LM, MosaicML streaming, or as parquet."""
    from sbp_fast.data.token_shards.export import export_tokens as work

    work(corpus, to, out, console=Console(), force=force)


@app.command(name="import", epilog="Example: sbp-fast import Qwen3-0.6B --out mine/base")
def import_command(
    directory: Annotated[Path, typer.Argument(help="A Hugging Face directory on this machine.")], *, out: Out
) -> None:
    """Turn a Hugging Face Qwen3 or Llama directory into a model to start from."""
    from sbp_fast.model.huggingface import import_model

    import_model(directory, out)
    print(out)


def _load(settings: list[str]) -> RunConfig:
    files = [setting for setting in settings if "=" not in setting]
    if not files:
        raise UserError(
            "command line", "names no configuration", "put a TOML file or a shipped name such as demo before the settings"
        )
    return load_config(files, [setting for setting in settings if "=" in setting])
