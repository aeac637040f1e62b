"""The stage `synthesize`: seeds drawn uniformly from the unique documents, and new documents drawn after each of them."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sbp_fast.config import ModelConfig, RunConfig, resolve_device, resolve_threads
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import INDEX, Corpus, CorpusWriter
from sbp_fast.corpus.tokenizer import Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.files import atomic_open
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import load_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.progress import Console, Task, short
from sbp_fast.stage import Manifest, Work, run_stage
from sbp_fast.synthesize.generator import Draft, SamplingRule, generate
from sbp_fast.synthesize.sampler import document_uniforms

PARTS = "parts"


def synthesize(config: RunConfig, out: Path, *, corpus: Path, model: Path, console: Console, force: bool = False) -> Manifest:
    """Write a corpus of synthetic documents, enough for the joint run and what the filters will take.

    Its document table has the columns of any corpus and: seed (index into the unique corpus), sample (number of this
    document among its seed's), finished (whether the model ended it, not the length limit).

    Args:
        corpus: output of `prepare`.
        model: directory of the synthesizer.

    Raises:
        UserError: a model that does not know the corpus's tokens; what `run_stage` refuses.
    """
    settings = {
        "seed": config.seed,
        "synthesize": config.synthesize.model_dump(mode="json"),
        "joint": config.joint.model_dump(mode="json"),
        "pretrain": {"tokens": config.pretrain.tokens},
    }

    def body(work: Work) -> None:
        torch.set_num_threads(resolve_threads(config))
        work.device = resolve_device(config)
        prepared = PreparedCorpus(corpus)
        synthesizer = load_model(model, work.device)
        if synthesizer.vocabulary_size != prepared.tokenizer.vocabulary_size:
            known = f"a vocabulary of {synthesizer.vocabulary_size}, the corpus {prepared.tokenizer.vocabulary_size}"
            raise UserError(model, f"has {known}", "give the synthesizer that was trained on this corpus")
        plan = SeedPlan.make(config, prepared.unique, synthesizer.config.context)
        if not (work.directory / INDEX).is_file():  # with it, a killed attempt had only its parts left to remove
            _write_parts(config, plan, prepared, synthesizer, work)
            _join_parts(plan, prepared, work)
        shutil.rmtree(work.directory / PARTS, ignore_errors=True)
        _record(config, plan, prepared, synthesizer.config, work)

    inputs = {"corpus": corpus, "model": model}
    return run_stage("synthesize", out, config=settings, inputs=inputs, body=body, console=console, force=force)


@dataclass(frozen=True)
class SeedPlan:
    """Which seeds are drawn, in order, a pure function of configuration and corpus.

    Attributes:
        documents: int64 [seeds], indices into the unique corpus.
        first_samples: int64 [seeds], number of the first of the `samples` documents drawn after each.
        samples: documents for each seed.
        shard_seeds: seeds of a shard.
    """

    documents: np.ndarray
    first_samples: np.ndarray
    samples: int
    shard_seeds: int

    @staticmethod
    def make(config: RunConfig, unique: Corpus, context: int) -> SeedPlan:
        """Enough seeds for the tokens wanted, if synthetic documents are as long as real ones.

        Seeds come without replacement until every document has been one; then again in another order.
        """
        wanted = config.synthesize.oversample * config.joint.maximum_synthetic_share * config.pretrain.tokens
        length = float(np.minimum(np.diff(unique.offsets), context).mean())
        samples = config.synthesize.samples_per_seed
        seeds = max(1, math.ceil(wanted / length / samples))
        rounds = np.arange(seeds) // len(unique)
        orders = [np.random.default_rng([config.seed, number]).permutation(len(unique)) for number in range(rounds[-1] + 1)]
        return SeedPlan(np.concatenate(orders)[:seeds], rounds * samples, samples, config.synthesize.shard_seeds)

    @property
    def shards(self) -> list[slice]:
        return [slice(start, start + self.shard_seeds) for start in range(0, len(self.documents), self.shard_seeds)]


def _part(work: Work, shard: int) -> Path:
    return work.directory / PARTS / f"part-{shard:05d}.npz"


def _write_parts(config: RunConfig, plan: SeedPlan, prepared: PreparedCorpus, model: Transformer, work: Work) -> None:
    """Draw the documents of each shard that has no part yet."""
    (work.directory / PARTS).mkdir(exist_ok=True)
    rule = sampling_rule(config, prepared.tokenizer, model.config.context)
    missing = [shard for shard in range(len(plan.shards)) if not _part(work, shard).is_file()]
    total = len(plan.documents) * plan.samples
    waiting = sum(len(plan.documents[plan.shards[shard]]) for shard in missing) * plan.samples
    with work.console.task("documents written", total, "documents", done=total - waiting) as task:
        progress = _Progress(task)
        for shard in missing:
            drafts = _draw_shard(config, plan, plan.shards[shard], prepared.unique, model, rule, progress)
            tokens = np.concatenate([draft.tokens for draft in drafts])
            lengths = np.array([len(draft.tokens) for draft in drafts])
            finished = np.array([draft.finished for draft in drafts])
            with atomic_open(_part(work, shard)) as file:
                np.savez(file, tokens=tokens, lengths=lengths, finished=finished)
            work.keep_clock()


def sampling_rule(config: RunConfig, tokenizer: Tokenizer, context: int) -> SamplingRule:
    """A document follows the partner token, has no special token but its end, and at most `context` tokens."""
    return SamplingRule(
        first=tokenizer.partner,
        end=tokenizer.end,
        forbidden=(tokenizer.begin, tokenizer.partner),
        maximum_tokens=context,
        temperature=config.synthesize.temperature,
        top_p=config.synthesize.top_p,
    )


class _Progress:
    """Shows documents as they end, with the rate of tokens."""

    def __init__(self, task: Task) -> None:
        self.task, self.tokens, self.started, self.lock = task, 0, time.monotonic(), threading.Lock()

    def __call__(self, documents: int, tokens: int) -> None:
        with self.lock:
            self.tokens += tokens
            self.task.advance(documents, f"{short(self.tokens / (time.monotonic() - self.started))} tokens/s")


def _draw_shard(
    config: RunConfig,
    plan: SeedPlan,
    shard: slice,
    unique: Corpus,
    model: Transformer,
    rule: SamplingRule,
    progress: _Progress,
) -> list[Draft]:
    """The drafts of one shard, `plan.samples` for each of its seeds, in the order of the plan.

    On a CPU its batches are drawn side by side, a thread each: a step has many small operations, and threads that share
    these wait for each other most of the time, above all where other programs want the cores too.
    """
    context = model.config.context
    documents, first_samples = plan.documents[shard], plan.first_samples[shard]
    seeds = [unique[int(document)][:context] for document in documents]
    by_length = np.argsort([len(seed) for seed in seeds], kind="stable")
    together = max(1, config.synthesize.batch_documents // plan.samples)
    batches = [by_length[start : start + together] for start in range(0, len(seeds), together)]

    def draw(batch: np.ndarray) -> list[Draft]:
        uniforms = [
            document_uniforms(config.seed, int(documents[i]), int(first_samples[i]) + sample, rule.maximum_tokens)
            for i in batch
            for sample in range(plan.samples)
        ]
        return generate(model, [seeds[i] for i in batch], plan.samples, np.stack(uniforms), rule, progress)

    threads = torch.get_num_threads()
    workers = min(threads, len(batches)) if model.device.type == "cpu" else 1
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        drafts = dict(zip(np.concatenate(batches).tolist(), _groups(pool.map(draw, batches), plan.samples), strict=True))
    torch.set_num_threads(threads)  # some libraries share the number among all threads
    return [draft for i in range(len(seeds)) for draft in drafts[i]]


def _groups(drawn: Iterable[list[Draft]], samples: int) -> Iterator[list[Draft]]:
    """The drafts of each seed, seed by seed."""
    for drafts in drawn:
        for start in range(0, len(drafts), samples):
            yield drafts[start : start + samples]


def _join_parts(plan: SeedPlan, prepared: PreparedCorpus, work: Work) -> None:
    """Write all parts as one corpus."""
    tokenizer = prepared.tokenizer
    writer = CorpusWriter(work.directory, tokenizer.vocabulary_size)
    for shard, seeds in enumerate(plan.shards):
        with np.load(_part(work, shard)) as part:
            texts = np.split(part["tokens"], np.cumsum(part["lengths"])[:-1])
            finished = part["finished"]
        owners = np.repeat(plan.documents[seeds], plan.samples)
        numbers = (plan.first_samples[seeds, None] + np.arange(plan.samples)).ravel()
        for text, seed, sample, whole in zip(texts, owners.tolist(), numbers.tolist(), finished.tolist(), strict=True):
            writer.add(
                [tokenizer.begin, *text, tokenizer.end],
                id=f"synthetic/{seed}/{sample}",
                source="synthetic",
                text_bytes=len(tokenizer.decode(text).encode()),
                seed=seed,
                sample=sample,
                finished=whole,
            )
    writer.close()


def _record(config: RunConfig, plan: SeedPlan, prepared: PreparedCorpus, shape: ModelConfig, work: Work) -> None:
    written = Corpus(work.directory)
    finished = written.column("finished")
    lengths = np.diff(written.offsets) - 2
    work.record(
        documents=len(written),
        tokens=written.tokens,
        seeds=len(plan.documents),
        samples_per_seed=plan.samples,
        finished_share=float(finished.mean()),
        temperature=config.synthesize.temperature,
        top_p=config.synthesize.top_p,
        mean_tokens=float(lengths.mean()),
    )
    seeds = np.minimum(np.diff(prepared.unique.offsets), shape.context)
    prefilled, drawn = seeds[plan.documents], lengths + finished
    pairs = (prefilled * (prefilled + 1) // 2).sum() + (drawn * np.repeat(prefilled, plan.samples)).sum()
    pairs += (drawn * (drawn + 1) // 2).sum()
    tokens = prefilled.sum() + drawn.sum()
    work.flops = forward_flops(shape, written.vocabulary_size, float(tokens), float(pairs), float(drawn.sum()))
