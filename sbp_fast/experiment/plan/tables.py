"""Tables of what a configuration will take, computed from it alone: no data is read and no device touched."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.experiment.arms import arms_of
from sbp_fast.experiment.costs import CorpusEstimate, Cost
from sbp_fast.experiment.graph import PREPARE, model_stage, needed_stages, stages_of
from sbp_fast.experiment.plan.fit import Need, needs, smallest_change, with_checkpointing
from sbp_fast.model.flops import DEVICE_NAMES, PEAK_FLOPS, parameters_by_part
from sbp_fast.pipeline.files import read_json
from sbp_fast.pipeline.progress import short
from sbp_fast.train.memory import CARD_MEMORY, CHECKPOINTING, RESERVED_BYTES, RESERVED_SHARE, usable_memory

Costs = dict[str, Cost]
DISK_UNITS = {"disk": 2**30, "core_seconds": 3600}
SHARES = (0.3, 0.4, 0.5)  # of a card's peak: good training of models of this size reaches 0.4
MEASURED = Path(__file__).parents[3] / "bench" / "results"
PARTS = {
    "weights": "weights, fp32",
    "optimizer": "optimizer, fp32",
    "gradients": "gradients, fp32",
    "gathered": "gathered weights",
    "reduced": "gradients in transit",
    "activations": "saved activations",
    "at_work": "loss, or a layer",
    "batch": "batch",
}


def stage_costs(config: RunConfig) -> Costs:
    """Return the cost of each stage by name, in the order in which they run."""
    corpus = CorpusEstimate.guess(config)
    return {name: stage.cost(stage.config, corpus) for name, stage in stages_of(config).items()}


def plan_tables(config: RunConfig, gpus: int, card: str) -> list[Table | str]:
    """Return tables of model, memory, time and disk for `gpus` cards of one kind, and last the verdict, one line.

    Raises:
        UserError: the settings contradict each other or do not fit the number of GPUs; the card is unknown.
    """
    if card not in CARD_MEMORY:
        raise UserError(f"--gpu {card}", "is not known", f"choose from {', '.join(CARD_MEMORY)}")
    needed, costs = needs(config, gpus), stage_costs(config)
    return [
        _model_table(config),
        _training_table(needed),
        _memory_table(config, gpus, card),
        _time_table(config, costs, gpus, card),
        _disk_table(costs),
        *overheads(config, costs, card),
        verdict(config, gpus, card),
    ]


def _table(title: str, *columns: str, caption: str = "") -> Table:
    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _model_table(config: RunConfig) -> Table:
    shape = config.model
    title = f"{config.name}: {shape.layers} layers of {shape.hidden_size}, {shape.heads}:{shape.kv_heads} heads"
    table = _table(title, "parameters", "", "share")
    parts = parameters_by_part(shape, config.corpus.vocabulary_size)
    for part, count in parts.items():
        tied = part == "output projection" and shape.tied_embeddings
        table.add_row(part, "the embedding's" if tied else short(count), "" if tied else _percent(count / sum(parts.values())))
    table.add_row("all", short(sum(parts.values())), "")
    return table


def _training_table(needed: list[Need]) -> Table:
    table = _table("Training", "", "tokens", "steps", "tokens a step", "microbatches", "a process")
    for need in needed:
        recipe, most = need.recipe, -(-need.microbatches // need.gpus)
        even = "" if need.microbatches % need.gpus == 0 else "at most "
        table.add_row(
            need.section,
            short(recipe.tokens),
            f"{recipe.steps:,}",
            f"{recipe.tokens_per_step:,}",
            f"{need.microbatches:,} of {recipe.microbatch_tokens:,}",
            f"{even}{most:,}",
        )
    return table


def _memory_table(config: RunConfig, gpus: int, card: str) -> Table:
    """Return the memory of both recipes for each choice of activation checkpointing, the configured one in brackets."""
    own, shards = config.parallel.activation_checkpointing, config.parallel.shard_processes or gpus
    choices = [(choice, needs(with_checkpointing(config, choice), gpus)) for choice in CHECKPOINTING]
    columns = [(choice, both[index]) for index in range(2) for choice, both in choices]
    measured = "; ".join(f"{need.section} {_measured(config, need, card)}" for choice, need in columns if choice == own)
    table = _table(
        f"GiB on each of {gpus} {card.upper()}, weights sharded over {shards}, by activation checkpointing",
        "",
        *(
            f"{need.section if choice == 'none' else ''}\n" + (rf"\[{choice}]" if choice == own else choice)
            for choice, need in columns
        ),
        caption=f"{RESERVED_SHARE:.0%} and {RESERVED_BYTES / 2**30:.0f} GiB of {CARD_MEMORY[card] / 2**30:.1f} are left to "
        f"CUDA, NCCL and fragmentation. The peak of {measured}.",
    )
    for part, name in PARTS.items():
        table.add_row(name, *(_gibibytes(asdict(need.memory)[part]) for _, need in columns))
    table.add_row("all", *(_gibibytes(need.memory.total) for _, need in columns), style="bold")
    table.add_row("usable", *[_gibibytes(usable_memory(card))] * len(columns))
    return table


def _measured(config: RunConfig, need: Need, card: str, folder: Path = MEASURED) -> str:
    """Return the peak memory that a benchmark of the same step measured on this card, or "not measured".

    A `training.json` of a device holds its `environment` and `cases`; the shape of a case says what was run.
    """
    asked = {
        "model": config.model.model_dump(mode="json"),
        "vocabulary_size": config.corpus.vocabulary_size,
        "microbatch_tokens": need.recipe.microbatch_tokens,
        "microbatches": -(-need.microbatches // need.gpus),
        "optimizer": need.recipe.optimizer,
        "parallel": config.parallel.model_dump(mode="json"),
        "gpus": need.gpus,
    }
    for path in sorted(folder.glob("*/training.json")):
        record: dict[str, Any] = read_json(path)
        if DEVICE_NAMES.get(record["environment"]["device"]) == card:
            for case in record["cases"]:
                if case["shape"] == asked and "peak_memory_bytes" in case:
                    return f"measured: {_gibibytes(case['peak_memory_bytes'])} GiB"
    return "not measured"


def _time_table(config: RunConfig, costs: Costs, gpus: int, card: str) -> Table:
    percents = ", ".join(f"{share:.0%}" for share in SHARES)
    table = _table(
        f"Time on {card.upper()} ({PEAK_FLOPS[card] / 1e12:,.4g} TFLOP/s), at {percents} of the peak",
        "stage", "tokens", "FLOPs", "share", "GPU hours", f"days on {gpus}, at {SHARES[1]:.0%}",
        caption=_assumptions(config),
    )  # fmt: skip
    total = sum(cost.flops for cost in costs.values())
    for stage, cost in costs.items():
        hours = [cost.gpu_hours(card, share) for share in SHARES]
        cells = _time_cells(cost.flops, cost.flops / total, hours, gpus) if cost.flops else []
        table.add_row(stage, short(cost.tokens), *cells)
    hours = [sum(cost.gpu_hours(card, share) for cost in costs.values()) for share in SHARES]
    table.add_row("all", "", *_time_cells(total, 1.0, hours, gpus), style="bold")
    return table


def _time_cells(flops: float, share: float, hours: list[float], gpus: int) -> list[str]:
    days = hours[1] / 24 / gpus
    return [
        f"{flops:.2e}".replace("e+", "e"),
        _percent(share),
        " ".join(f"{_three(hour):>5}" for hour in hours),
        _three(days),
    ]


def _assumptions(config: RunConfig) -> str:
    corpus = CorpusEstimate.guess(config)
    return (
        f"Assumed until `prepare` has counted: documents of {corpus.document_tokens:,.0f} tokens whose tokens see "
        f"{corpus.visible:,.0f} on average, {short(corpus.unique_tokens)} unique tokens (a baseline of 20 epochs), "
        f"{config.pair.partners_per_seed} pairs a document, synthetic documents as long as real ones. "
        "`synthesize` takes what its weights, keys and values take to read; all else is counted in operations."
    )


def _disk_table(costs: Costs) -> Table:
    table = _table("Disk, and hours of one CPU core", "stage", "GiB", "core hours")
    table.add_column("on the disk")
    for stage, cost in costs.items():
        sizes = (cost.disk / 2**30, cost.core_seconds / 3600)
        table.add_row(stage, *(_three(size) if size else "" for size in sizes), cost.disk_content)
    total = [sum(getattr(cost, part) for cost in costs.values()) / unit for part, unit in DISK_UNITS.items()]
    table.add_row("all", *(_three(size) for size in total), "", style="bold")
    return table


def overheads(config: RunConfig, costs: Costs, card: str) -> list[str]:
    """Return one line for each arm with synthetic documents: its cost beside its final run, as a share of a baseline run."""
    stages, arms = stages_of(config), arms_of(config)
    baseline = model_stage(arms[config.baseline], config.baseline)
    lines = []
    for arm in arms.values():
        if arm.settings.synthetic:
            final = model_stage(arm, arm.name)
            needed = needed_stages(stages, final)
            beside = needed - {final, baseline, PREPARE}
            also = ", and 100% for the baseline, whose model it builds on" if baseline in needed else ""
            flops = math.fsum(costs[stage].flops for stage in beside) / costs[baseline].flops
            hours = math.fsum(costs[stage].gpu_hours(card, 1.0) for stage in beside) / costs[baseline].gpu_hours(card, 1.0)
            lines.append(
                f"Beside its final run {arm.label} takes {_percent(flops)} of a baseline run's FLOPs and {_percent(hours)} of "
                f"its GPU hours{also}."
            )
    return lines


def verdict(config: RunConfig, gpus: int, card: str) -> str:
    """Return one line: whether training fits, and if not, the smallest change that makes it fit."""
    needed, available = needs(config, gpus), f"of {_gibibytes(usable_memory(card))} GiB usable on each of {gpus} {card.upper()}"
    memory = ", ".join(f"{need.section} {_gibibytes(need.memory.total)}" for need in needed) + f" {available}"
    if all(need.fits(card) for need in needed):
        return f"Fits: {memory}."
    scarce = min(needed, key=lambda need: need.microbatches)
    if scarce.microbatches < gpus:
        memory = f"{scarce.section} has {scarce.microbatches} microbatches a step for {gpus} GPUs; {memory}"
    changes = smallest_change(config, gpus, card)
    remedy = "Neither these settings nor more GPUs make it fit." if changes is None else f"This does: {' '.join(changes)}"
    return f"Does not fit: {memory}. {remedy}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:,.1f}"


def _three(value: float) -> str:
    """Return a number in three digits, at most two of them decimals: 12.3k, 456, 7.89, 0.01."""
    return short(value) if value >= 1 else f"{value:.2f}"
