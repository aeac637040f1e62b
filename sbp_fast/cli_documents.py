"""The commands that run one stage on documents each: from preparing a corpus to the quality of synthetic ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sbp_fast.cli_options import (
    Address,
    Corpus,
    EngineName,
    Force,
    Gpus,
    Out,
    Settings,
    SourceName,
    Verbose,
    load_settings,
    load_source,
    stage_console,
)
from sbp_fast.config import EmbedConfig, RunConfig
from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.choose import open_workers
from sbp_fast.pipeline.progress import print_line

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
    endpoint: Annotated[str, typer.Option(help="With --text: URL of the server that embedded, as embed.endpoint.")] = "",
    key_variable: Annotated[str, typer.Option(help="With --endpoint: as embed.endpoint_key_variable.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Number of documents to print.")] = 10,
) -> None:
    """Print the unique documents nearest to a text or a document: similarity, id, corpus if there are several, first words."""
    from sbp_fast.neighbors.query import find_neighbors

    if (model or endpoint or key_variable) and not text:
        raise UserError("options", "--model, --endpoint and --key-variable are for a text", "leave them out, or give --text")
    if (endpoint and model) or (key_variable and not endpoint):
        raise UserError("options", "--key-variable needs --endpoint, which excludes --model", "leave one of them out")
    query = {"text": text, "document": document}
    named = {} if model is None else {"model": model}
    config = RunConfig(embed=EmbedConfig(endpoint=endpoint, endpoint_key_variable=key_variable, **named))
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


for _command in app.registered_commands:
    _command.rich_help_panel = "Single stages on documents"  # their heading in `sbp-fast --help`
