"""What a configuration will take, computed from it alone: no data is read and no device touched."""

from __future__ import annotations

from rich.table import Table

from sbp_fast.config import RunConfig, TrainConfig
from sbp_fast.model.flops import forward_flops, parameters, training_flops
from sbp_fast.progress import short

H100_FLOPS = 989.4e12  # dense bf16 peak of the vendor's data sheet; 0.4 of it is what good 3B training reaches
UTILIZATION = 0.4
TRAINING_BYTES = 16  # a parameter in fp32 with its gradient and two AdamW moments


def plan_table(config: RunConfig) -> list[Table]:
    """Two tables: the model, and tokens, FLOPs, GPU hours and disk of every stage."""
    return [_model_table(config), _stage_table(config)]


def _model_table(config: RunConfig) -> Table:
    count = parameters(config.model, config.corpus.vocabulary_size)
    shape = config.model
    table = Table(title=f"{config.name}: the model", show_header=False)
    table.add_row(
        "parameters", f"{short(count)} ({shape.layers} layers, {shape.width} wide, {shape.heads}:{shape.key_value_heads} heads)"
    )
    table.add_row(
        "weights, gradients, optimizer", f"{count * TRAINING_BYTES / 2**30:.3g} GiB in fp32, over all devices that share it"
    )
    for name, recipe in (("pretraining", config.pretrain), ("synthesizer", config.synthesizer)):
        table.add_row(name, f"{short(recipe.tokens)} tokens in {steps(recipe):,} steps of {short(recipe.tokens_per_step)}")
    return table


def _stage_table(config: RunConfig) -> Table:
    table = Table(title=f"{config.name}: every stage")
    for column in ("stage", "tokens", "FLOPs", f"H100 hours at {UTILIZATION:.0%}", "disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    model, vocabulary = config.model, config.corpus.vocabulary_size
    # a document as long as half the context sees a quarter of it on average: an upper guess for most corpora
    visible = model.context / 4
    token_bytes = 2 if vocabulary <= 1 << 16 else 4
    checkpoint = parameters(model, vocabulary) * 4
    synthetic = round(config.pretrain.tokens * config.joint.maximum_synthetic_share * config.synthesize.oversample)

    def trained(tokens: int, loss_share: float = 1.0) -> float:
        return training_flops(model, vocabulary, tokens, round(tokens * visible), round(tokens * loss_share))

    rows = [
        ("base (= baseline)", config.pretrain.tokens, trained(config.pretrain.tokens), checkpoint),
        ("synthesizer", config.synthesizer.tokens, trained(config.synthesizer.tokens, 0.5), checkpoint),
        (
            "synthesize",
            synthetic,
            forward_flops(model, vocabulary, 2 * synthetic, round(2 * synthetic * visible), synthetic),
            synthetic * token_bytes,
        ),
        ("joint", config.pretrain.tokens, trained(config.pretrain.tokens), checkpoint),
        ("oracle", config.pretrain.tokens, trained(config.pretrain.tokens), checkpoint),
    ]
    for stage, tokens, flops, disk in rows:
        hours = flops / (H100_FLOPS * UTILIZATION * 3600)
        table.add_row(stage, short(tokens), f"{flops:.2e}", f"{hours:,.3g}", f"{disk / 2**30:,.3g} GiB")
    total = sum(row[2] for row in rows)
    table.add_row("all", "", f"{total:.2e}", f"{total / (H100_FLOPS * UTILIZATION * 3600):,.3g}", "")
    table.caption = "Tokens of the corpus, and so its disk and the embedding's cost, are known after `prepare`."
    return table


def steps(recipe: TrainConfig) -> int:
    """Optimizer steps of a training recipe."""
    return -(-recipe.tokens // recipe.tokens_per_step)
