"""The stage `train`: an arm from scratch, or the synthesizer from a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sbp_kernels import backend_provenance, resolve_backend

from sbp_fast.config import ModelConfig, RunConfig, TrainConfig, resolve_device, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.tokenizer import TOKENIZER, Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.backend import sampling_params
from sbp_fast.generate.samples import generate_samples
from sbp_fast.model.flops import parameters, training_flops
from sbp_fast.model.saved import WEIGHTS, fill, read_description, read_weights, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.heldout_pairs import HELDOUT_PAIRS, HeldoutPairs
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.distributed import Processes, join_processes
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage_together
from sbp_fast.train.data.batches import Batches
from sbp_fast.train.data.corpus_batches import CorpusBatches
from sbp_fast.train.data.pair_batches import PairBatches
from sbp_fast.train.data.validation_sets import document_set, pair_set
from sbp_fast.train.log import METRICS, read_curve
from sbp_fast.train.loop import Training
from sbp_fast.train.metrics import Totals
from sbp_fast.train.sharding import build, make_mesh, resolve_precision
from sbp_fast.train.task import TrainTask
from sbp_fast.train.validation import Validation

SAMPLE_TOKENS = 64  # of a document that is written while a model is trained


def train(
    config: RunConfig,
    task: TrainTask,
    out: Path,
    *,
    corpus: Path,
    synthetic: Path | None = None,
    stitched: Path | None = None,
    pairs: Path | None = None,
    start: Path | None = None,
    console: Console,
    force: bool = False,
    profile_steps: str | None = None,
) -> Manifest | None:
    """Train a model and save it in `out`, with lines of metrics.

    Processes started by torchrun or `run_in_processes` train together. Rank 0 owns the directory, which every process must see
    under the same path.

    Args:
        config: of the run.
        task: an arm, trained from scratch, or the synthesizer, tuned to write the partners of `pairs` after their seeds.
        out: directory of the output.
        corpus: output of `prepare`.
        synthetic: output of `filter`, or of `stitch` on it, for an arm that reads synthetic documents.
        stitched: output of `stitch` on the unique documents, for an arm that reads them joined with related ones.
        pairs: related pairs, for the synthesizer.
        start: directory of the model that the synthesizer starts from, unless it starts from scratch.
        console: for progress.
        force: replace an output that was made from other settings or inputs.
        profile_steps: steps to profile, such as "10:13", into `out` + ".profile".

    Returns:
        The stage's manifest; None in all processes but the first.

    Raises:
        UserError: the inputs do not belong together, the recipe does not fit them, or the run diverges.
        Stopped: the process received SIGTERM or SIGINT, and the run is saved.
    """
    given = {"corpus": corpus, "synthetic": synthetic, "stitched": stitched, "pairs": pairs, "start": start}
    inputs = {name: path for name, path in given.items() if path is not None}
    _check_inputs(task, inputs)
    device = resolve_device(config)
    if torch.device(device).type == "cpu":
        torch.set_num_threads(resolve_threads(config))
    with join_processes(device, group_of_one=resolve_precision(task.recipe, device) != torch.float32) as processes:

        def body(context: StageContext) -> None:
            context.device = device
            run = Run(config, task, PreparedCorpus(corpus), context, processes, profile_steps)
            tune_synthesizer(run) if task.tunes else pretrain(run)

        return run_stage_together(
            processes,
            "train",
            out,
            config=training_settings(config, task),
            inputs=inputs,
            body=body,
            console=console,
            force=force,
        )


def _check_inputs(task: TrainTask, inputs: dict[str, Path]) -> None:
    """Refuse inputs that the task does not read, and the absence of inputs that it reads."""
    reads = {
        "corpus": True,
        "pairs": task.tunes,
        "start": task.tunes and not task.from_scratch,
        "synthetic": task.synthetic,
        "stitched": task.order == "related",
    }
    wanted = {name for name, is_read in reads.items() if is_read}
    if missing := wanted - inputs.keys():
        options = ", ".join(f"--{name}" for name in sorted(missing))
        raise UserError(f"training {task.name}", f"needs {options}", "give the output of the stage that writes it")
    if extra := inputs.keys() - wanted:
        options = ", ".join(f"--{name}" for name in sorted(extra))
        raise UserError(f"training {task.name}", f"does not read {options}", "leave it out, or train another arm")


def training_settings(config: RunConfig, task: TrainTask) -> dict[str, Any]:
    """Return the settings that a trained model depends on: not those of parallelism, checkpoints and logs."""
    settings: dict[str, Any] = {"seed": task.seed, "recipe": task.recipe.settings()}
    if task.recipe.select == "best":
        settings |= {"validation": config.validation.settings()}
    if task.tunes:
        return settings | ({"model": config.model.settings()} if task.from_scratch else {})
    settings |= {"data": task.data, "order": task.order, "model": config.model.settings()}
    return settings | ({"synthetic_share": task.share} if task.synthetic else {})


@dataclass(frozen=True)
class Run:
    """Inputs of a training run."""

    config: RunConfig
    task: TrainTask
    prepared: PreparedCorpus
    context: StageContext
    processes: Processes
    profile_steps: str | None

    @property
    def recipe(self) -> TrainConfig:
        """The recipe of the task."""
        return self.task.recipe

    def build(self, shape: ModelConfig, vocabulary_size: int) -> Transformer:
        """Return the sharded model; its weights are not yet set."""
        parallel, processes = self.config.parallel, self.processes
        mesh = make_mesh(self.recipe, parallel, processes)
        return build(shape, vocabulary_size, self.recipe, parallel, processes.device, mesh)


def pretrain(run: Run) -> None:
    """Train an arm from scratch on the real corpus, mixed with the synthetic one where the arm reads it."""
    config, context, task = run.config, run.context, run.task
    real = run.prepared.train if task.data == "all" else run.prepared.unique
    if task.order == "related":
        _require_this_corpus(context, "stitched")
        real = Corpus(context.inputs["stitched"])
    synthetic = None
    if task.synthetic:
        _require_this_corpus(context, "synthetic")
        synthetic = Corpus(context.inputs["synthetic"])
    batches = CorpusBatches(real, synthetic, task, config.model.context)
    if synthetic is not None:
        wanted, planned = task.share, batches.synthetic_share
        context.console.say(f"synthetic share of the tokens: {planned:.1%} (at most {wanted:.1%} wanted; none is read twice)")
        context.record(synthetic_share={"wanted": wanted, "planned": planned})
    _begin(run, batches, {name: packed.packing.padding_share for name, packed in batches.packed.items()})
    vocabulary_size = run.prepared.tokenizer.vocabulary_size
    model = run.build(config.model, vocabulary_size)
    model.initialize(task.seed)
    totals = _fit(run, model, batches, real, _validate_on_documents(run))
    sources = {"real": {"tokens": totals.real_tokens, "epochs": totals.real_tokens / real.tokens}}
    if synthetic is not None:
        epochs = totals.synthetic_tokens / max(synthetic.tokens, 1)
        sources["synthetic"] = {"tokens": totals.synthetic_tokens, "epochs": epochs}
    context.record(sources=sources)


def tune_synthesizer(run: Run) -> None:
    """Train the model in `start`, or one of random weights, to write a document's partner after the document."""
    context, tokenizer, start = run.context, run.prepared.tokenizer, run.context.inputs.get("start")
    _require_this_corpus(context, "pairs")
    shape, vocabulary_size = run.config.model, tokenizer.vocabulary_size
    if start is not None:
        shape, known_size = read_description(start)
        _check_vocabulary(start, known_size, tokenizer)
    unique, longest = run.prepared.unique, shape.context
    batches = PairBatches(unique, PairSet(context.inputs["pairs"]), tokenizer.partner, run.recipe, longest, run.task.seed)
    packed = batches.packed
    if packed.partners_too_long:
        context.console.say(f"{packed.partners_too_long} partners left out: longer than model.context = {longest} tokens")
    validation = _validate_on_pairs(run, longest)
    _begin(run, batches, {"pairs": packed.packing.padding_share})
    model = run.build(shape, vocabulary_size)
    if start is None:
        model.initialize(run.task.seed)
    else:
        fill(model, read_weights(start / WEIGHTS), where=start / WEIGHTS)
    totals = _fit(run, model, batches, unique, validation)
    context.record(
        pairs=len(packed.partners),
        epochs=batches.epochs,
        partners_too_long=packed.partners_too_long,
        sources={"real": {"tokens": totals.real_tokens, "epochs": totals.real_tokens / unique.tokens}},
    )


def _check_vocabulary(start: Path, known_size: int, tokenizer: Tokenizer) -> None:
    """Refuse a model to start from whose tokens are not the corpus's; an imported model has its tokenizer beside it."""
    tokenizer_json = start / TOKENIZER
    if tokenizer_json.is_file():
        known, vocabulary = Tokenizer(tokenizer_json).vocabulary(), tokenizer.vocabulary()
        if differing := {token for token, _ in known.items() ^ vocabulary.items()}:
            problem = f"has another tokenizer than the corpus: {len(differing)} tokens differ, such as {min(differing)!r}"
            raise UserError(start, problem, f"prepare the corpus with corpus.tokenizer={tokenizer_json}")
    if known_size != tokenizer.vocabulary_size:
        known_sizes = f"a vocabulary of {known_size}, the corpus's tokenizer {tokenizer.vocabulary_size}"
        remedy = f"start from a model of this corpus, or import one with its {TOKENIZER} and prepare the corpus with that"
        raise UserError(start, f"has {known_sizes}", remedy)


def _validate_on_documents(run: Run) -> Validation:
    """Return the validation of an arm: the loss of validation documents, and documents sampled from nothing."""
    settings, prepared, context = run.config.validation, run.prepared, run.config.model.context
    if not settings.points:
        return Validation(points=0)
    measured = document_set(
        prepared.heldout,
        prepared.validation,
        limit=settings.tokens,
        capacity=run.recipe.microbatch_tokens,
        context=context,
    )
    seeds = {number: np.zeros(0, np.int64) for number in range(settings.samples)}
    return Validation(settings.points, measured, _sampler(run, context, prepared.tokenizer.begin, seeds))


def _validate_on_pairs(run: Run, context: int) -> Validation:
    """Return the validation of the synthesizer: the loss of held-out partners, and documents after validation documents.

    Raises:
        UserError: `select = "best"`, and there are no held-out pairs to choose by.
    """
    settings, prepared, pairs = run.config.validation, run.prepared, run.context.inputs["pairs"]
    if not settings.points:
        return Validation(points=0)
    measured = None
    if HELDOUT_PAIRS in Manifest.read(pairs).files:
        heldout_pairs = HeldoutPairs.load(pairs).of_split("validation")
        measured = pair_set(
            prepared.heldout,
            heldout_pairs.seeds,
            heldout_pairs.partners,
            prepared.tokenizer.partner,
            limit=settings.tokens,
            capacity=run.recipe.microbatch_tokens,
            context=context,
        )
    if measured is None:
        run.context.console.say("no pairs of validation documents: the synthesizer's held-out loss is not measured")
        if run.recipe.select == "best":
            remedy = 'hold out more documents (corpus.heldout_share), or set synthesizer.select = "last"'
            raise UserError(
                pairs, 'has no pairs of validation documents to choose by, as synthesizer.select = "best" asks', remedy
            )
    seeds = {int(document): prepared.heldout[document][:context] for document in prepared.validation[: settings.samples]}
    return Validation(settings.points, measured, _sampler(run, context, prepared.tokenizer.partner, seeds))


def _sampler(
    run: Run, context: int, first: int, seeds: dict[int, np.ndarray]
) -> Callable[[Transformer], list[dict[str, Any]]] | None:
    """Return the function that writes samples after seeds, by [synthesize]'s temperature and the like; None without seeds.

    Args:
        run: the training run.
        context: tokens of the model's context.
        first: id of the token that begins a document.
        seeds: index of a held-out document, or a number -> its tokens, none for a document without a seed.
    """
    if not seeds:
        return None
    prepared, task = run.prepared, run.task
    sampling = sampling_params(run.config.synthesize, prepared, context)
    sampling = replace(sampling, first=first, maximum_tokens=min(SAMPLE_TOKENS, sampling.maximum_tokens))
    names = [str(prepared.heldout.ids[document]) if len(tokens) else None for document, tokens in seeds.items()]

    def write(model: Transformer) -> list[dict[str, Any]]:
        results = generate_samples(model, sampling, seeds, task.seed)
        return [
            {"seed": name, "text": prepared.tokenizer.decode(result.tokens), "stop": result.stop}
            for name, result in zip(names, results, strict=True)
        ]

    return write


def _begin(run: Run, batches: Batches, padding: dict[str, float]) -> None:
    """Refuse an impossible run before anything large is allocated; print and record what "auto" resolved to."""
    context, processes = run.context, run.processes
    try:
        attention = resolve_backend(run.recipe.attention, context.device)
    except ValueError as reason:
        raise UserError("attention", str(reason), "choose another, or auto") from None
    if batches.sequences_per_step % processes.world:
        problem = f"{batches.sequences_per_step} packed sequences a step for {processes.world} processes"
        raise UserError("microbatch_tokens", problem, "lower it, or take a number of processes that divides the sequences")
    dtype = resolve_precision(run.recipe, context.device)
    precision = str(dtype).removeprefix("torch.")
    launches = backend_provenance(attention, context.device, run.config.model.head_dim, dtype)
    described = f"{attention}, {launches}" if launches else attention
    context.console.detail(f"attention: {described}; layers in {precision}; {processes.world} process(es)")
    shares = ", ".join(f"{name} {share:.2%}" for name, share in padding.items())
    context.console.detail(f"padding of the packed sequences: {shares}")
    counts = {"attention_launches": launches} if launches else {}
    context.record(arm=run.task.name, attention=attention, **counts, precision=precision, padding_share=padding)


def _fit(run: Run, model: Transformer, batches: Batches, real: Corpus, validation: Validation) -> Totals:
    """Train, save the model and record the counts that all tasks share."""
    context, processes, recipe = run.context, run.processes, run.recipe
    training = Training(
        model,
        batches,
        recipe,
        run.config,
        processes,
        directory=context.directory,
        out=context.out,
        console=context.console,
        real_epoch_tokens=real.tokens,
        validation=validation,
        on_save=context.save_clock,
        profile_steps=run.profile_steps,
    )
    totals = training.run()
    save_model(model, context.directory, is_rank0=processes.is_rank0)
    training.checkpoints.clear(context.beside(".checkpoints"))
    if processes.is_rank0:
        _record(run, model, totals)
        if totals.validations:
            losses = dict(totals.validations)
            run.context.record(
                selected_step=training.selected_step,
                validation_loss=losses[training.selected_step],
                last_validation_loss=losses[totals.steps],
                validation_tokens=validation.measured.loss_tokens if validation.measured else 0,
            )
    return totals


def _record(run: Run, model: Transformer, totals: Totals) -> None:
    losses = [loss for _, loss in read_curve(run.context.directory / METRICS, "train/loss")]
    last = losses[-max(1, len(losses) // 20) :]
    run.context.record(
        parameters=parameters(model.config, model.vocabulary_size),
        steps=totals.steps,
        tokens=totals.tokens,
        loss_tokens=totals.loss_tokens,
        valid_share=totals.loss_tokens / totals.tokens,
        final_loss=sum(last) / len(last) if last else None,
        visible_pairs=totals.visible_pairs,
        skipped_steps=totals.skipped_steps,
        rolled_back_steps=totals.rolled_back_steps,
        threads=torch.get_num_threads(),
        processes=run.processes.world,
        loop_seconds=round(totals.loop_seconds, 3),
        validation_seconds=round(totals.validation_seconds, 3),
    )
    seen = (totals.tokens, totals.visible_pairs, totals.loss_tokens)
    run.context.flops = training_flops(model.config, model.vocabulary_size, *seen)


def _require_this_corpus(context: StageContext, name: str) -> None:
    """Refuse an input made from another corpus: its document indices would silently mean other documents."""
    manifest, corpus = (Manifest.read(context.inputs[key]) for key in (name, "corpus"))
    if manifest.inputs.get("corpus") != corpus.fingerprint:
        raise UserError(
            context.inputs[name], f"was not made from {context.inputs['corpus']}", "give the corpus that it was made from"
        )
