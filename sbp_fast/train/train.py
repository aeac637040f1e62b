"""The training stage: which model reads what, in each of its four roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from sbp_kernels import resolve_backend

from sbp_fast.config import RunConfig, TrainConfig, resolve_device, resolve_threads
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import Corpus
from sbp_fast.errors import UserError
from sbp_fast.files import read_json
from sbp_fast.model.flops import parameters, training_flops
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.progress import Console
from sbp_fast.stage import MANIFEST, Manifest, Work, run_stage
from sbp_fast.train.batches import Batches, CorpusBatches, PairBatches
from sbp_fast.train.checkpoint import CHECKPOINT, Totals
from sbp_fast.train.loop import fit

Role = Literal["base", "joint", "oracle", "synthesizer"]


def train(
    config: RunConfig,
    out: Path,
    *,
    role: Role,
    corpus: Path,
    synthetic: Path | None = None,
    pairs: Path | None = None,
    start: Path | None = None,
    console: Console,
    force: bool = False,
) -> Manifest:
    """Train a model and save it in `out`, with a line of metrics for each step.

    Args:
        role: "base" repeats the unique documents (it is the baseline), "oracle" reads all documents, "joint" the unique
            ones repeatedly and the `synthetic` ones once, all three from scratch by `config.pretrain`; "synthesizer"
            learns the partners of `pairs` from the model in `start`, by `config.synthesizer`.
        corpus: output of `prepare`.
        synthetic: a corpus of kept synthetic documents, for "joint".
        pairs: related pairs, for "synthesizer".
        start: a model's directory, for "synthesizer".

    Raises:
        UserError: inputs that do not belong together, a recipe that does not fit them, a run that diverges.
    """
    tuning = role == "synthesizer"
    if tuning != (pairs is not None) or tuning != (start is not None) or (role == "joint") != (synthetic is not None):
        raise ValueError(f"role {role}: pairs and start belong to synthesizer, synthetic to joint, and must be given there")
    recipe = config.synthesizer if tuning else config.pretrain
    settings: dict[str, Any] = {"seed": config.seed, "role": role, "recipe": recipe.model_dump(mode="json")}
    del settings["recipe"]["checkpoint_seconds"]  # how often a run is saved changes nothing that it computes
    if not tuning:
        settings["model"] = config.model.model_dump(mode="json")
    if role == "joint":
        settings["joint"] = config.joint.model_dump(mode="json")
    given = {"corpus": corpus, "synthetic": synthetic, "pairs": pairs, "start": start}
    inputs = {name: path for name, path in given.items() if path is not None}

    def body(work: Work) -> None:
        torch.set_num_threads(resolve_threads(config))
        work.device = resolve_device(config)
        prepared = PreparedCorpus(corpus)
        if tuning:
            tune_synthesizer(config, prepared, work)
        else:
            pretrain(config, role, prepared, work)

    return run_stage("train", out, config=settings, inputs=inputs, body=body, console=console, force=force)


def pretrain(config: RunConfig, role: Role, prepared: PreparedCorpus, work: Work) -> None:
    """Train from scratch on windows of the real corpus, for "joint" mixed with the synthetic one."""
    real = prepared.train if role == "oracle" else prepared.unique
    synthetic = None
    if role == "joint":
        _require_this_corpus(work, "synthetic")
        synthetic = Corpus(work.inputs["synthetic"])
    batches = CorpusBatches(real, synthetic, config)
    if synthetic is not None:
        wanted, planned = config.joint.maximum_synthetic_share, batches.synthetic_share
        work.console.say(f"synthetic share of the tokens: {planned:.1%} (at most {wanted:.1%} wanted; none is read twice)")
        work.record(synthetic_share={"wanted": wanted, "planned": planned})
    model = Transformer(config.model, prepared.tokenizer.vocabulary_size)
    model.initialize(config.seed)
    totals = _fit(model, batches, config.pretrain, work, real)
    sources = {"real": {"tokens": totals.real_tokens, "epochs": totals.real_tokens / real.tokens}}
    if synthetic is not None:
        epochs = totals.synthetic_tokens / max(synthetic.tokens, 1)
        sources["synthetic"] = {"tokens": totals.synthetic_tokens, "epochs": epochs}
    work.record(role=role, sources=sources)


def tune_synthesizer(config: RunConfig, prepared: PreparedCorpus, work: Work) -> None:
    """Teach the model in `start` to write a document's partner after it."""
    _require_this_corpus(work, "pairs")
    model = load_model(work.inputs["start"])
    if model.vocabulary_size != prepared.tokenizer.vocabulary_size:
        known = f"a vocabulary of {model.vocabulary_size}, the corpus's tokenizer {prepared.tokenizer.vocabulary_size}"
        raise UserError(work.inputs["start"], f"has {known}", "prepare the corpus with that model's tokenizer.json")
    partner, context = prepared.tokenizer.partner, model.config.context
    batches = PairBatches(prepared.unique, PairSet(work.inputs["pairs"]), partner, config.synthesizer, context, config.seed)
    if batches.partners_too_long:
        work.console.say(f"{batches.partners_too_long} partners left out: longer than model.context = {context} tokens")
    totals = _fit(model, batches, config.synthesizer, work, prepared.unique)
    work.record(
        role="synthesizer",
        pairs=batches.pairs,
        epochs=batches.epochs,
        partners_too_long=batches.partners_too_long,
        sources={"real": {"tokens": totals.real_tokens, "epochs": totals.real_tokens / prepared.unique.tokens}},
    )


def _fit(model: Transformer, batches: Batches, recipe: TrainConfig, work: Work, real: Corpus) -> Totals:
    """Train, save the model and record what every role has to say."""
    model.to(work.device)
    try:
        attention = resolve_backend(recipe.attention, work.device)
    except ValueError as reason:
        raise UserError("attention", str(reason), "choose another, or auto") from None
    work.console.say(f"attention: {attention}")
    work.record(attention=attention)
    totals, metrics = fit(model, batches, recipe, work, real.tokens)
    save_model(model, work.directory)
    (work.directory / CHECKPOINT).unlink(missing_ok=True)
    losses = [line["train/loss"] for line in metrics if line["train/loss"] is not None]
    last = losses[-max(1, len(losses) // 20) :]
    work.record(
        parameters=parameters(model.config, model.vocabulary_size),
        steps=totals.steps,
        tokens=totals.tokens,
        loss_tokens=totals.loss_tokens,
        valid_share=totals.loss_tokens / totals.tokens,
        final_loss=sum(last) / len(last) if last else None,
        visible_pairs=totals.visible_pairs,
        skipped_steps=totals.skipped_steps,
        threads=torch.get_num_threads(),
        loop_seconds=round(totals.loop_seconds, 3),
    )
    seen = (totals.tokens, totals.visible_pairs, totals.loss_tokens)
    work.flops = training_flops(model.config, model.vocabulary_size, *seen)
    return totals


def _require_this_corpus(work: Work, name: str) -> None:
    """Documents are named by their number, so what is made from another corpus would silently mean other documents."""
    manifest, corpus = (read_json(work.inputs[key] / MANIFEST) for key in (name, "corpus"))
    if manifest["inputs"].get("corpus") != corpus["fingerprint"]:
        raise UserError(
            work.inputs[name], f"was not made from {work.inputs['corpus']}", "give the corpus that it was made from"
        )
