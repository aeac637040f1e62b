"""Whether a configuration fits a number of GPUs of one kind, and the smallest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from sbp_fast.config import RunConfig, TrainConfig
from sbp_fast.errors import UserError
from sbp_fast.experiment.costs import with_model
from sbp_fast.experiment.sources import used_sources
from sbp_fast.train.memory import CHECKPOINTING, StepMemory, step_memory, usable_memory

NODE = 8  # GPUs of a machine; larger numbers of GPUs are multiples of it
MOST_GPUS = 8192
CONTEXTS_IN_MICROBATCH = {"pretrain": 1, "synthesizer": 2}  # contexts that a microbatch of each recipe must hold


@dataclass(frozen=True)
class Need:
    """Requirements of training by one recipe on a number of GPUs.

    Attributes:
        section: section of the configuration that is the recipe.
        recipe: the recipe.
        gpus: number of GPUs.
        microbatches: microbatches of a step; the trainer refuses fewer than GPUs, as some would be idle.
        memory: memory on each GPU.
    """

    section: str
    recipe: TrainConfig
    gpus: int
    microbatches: int
    memory: StepMemory

    @staticmethod
    def of(config: RunConfig, section: str, recipe: TrainConfig, gpus: int) -> Need:
        """Return the requirements of a recipe; of the synthesizer, those of the largest model that one starts from."""
        starts = {source.settings.model for source in used_sources(config).values()} if section == "synthesizer" else set()
        memory = max(
            (
                step_memory(started.model, started.corpus.vocabulary_size, recipe, started.parallel, gpus)
                for started in (with_model(config, start) for start in starts or {""})
            ),
            key=lambda memory: memory.total,
        )
        return Need(section, recipe, gpus, recipe.sequences_per_step, memory)

    def fits(self, card: str) -> bool:
        """Return whether GPUs of this kind suffice."""
        return self.microbatches >= self.gpus and self.memory.total <= usable_memory(card)


def needs(config: RunConfig, gpus: int) -> list[Need]:
    """Return the requirements of pretraining and of the synthesizer.

    Raises:
        UserError: the processes cannot be divided into groups, or a microbatch is too short for a context.
    """
    shards = config.parallel.shard_processes
    if shards and gpus % shards:
        problem = f"{shards} does not divide the {gpus} processes"
        raise UserError("parallel.shard_processes", problem, "set it to a divisor, such as the GPUs of a node, or to 0")
    for section, contexts in CONTEXTS_IN_MICROBATCH.items():
        tokens, least = getattr(config, section).microbatch_tokens, contexts * config.model.context
        if tokens < least:
            problem = f"{tokens} is less than {contexts} times model.context"
            raise UserError(f"{section}.microbatch_tokens", problem, f"raise it to {least} or more")
    return [Need.of(config, section, getattr(config, section), gpus) for section in CONTEXTS_IN_MICROBATCH]


def smallest_change(config: RunConfig, gpus: int, card: str) -> list[str] | None:
    """Return the smallest change that makes training fit, as settings of the command line; None if there is none.

    The list is empty if training fits as it is. Stronger activation checkpointing is tried first, then smaller microbatches,
    then more GPUs, each with as little as possible of those before it; last fewer GPUs, which help where there are fewer
    microbatches than GPUs.
    """
    choices = CHECKPOINTING[CHECKPOINTING.index(config.parallel.activation_checkpointing) :]
    recipes = {section: _with_halved_microbatches(config, section) for section in CONTEXTS_IN_MICROBATCH}
    halvings = range(max(map(len, recipes.values())))
    for number, times, choice in product(_numbers_of_gpus(config, gpus), halvings, choices):
        changed, settings = with_checkpointing(config, choice), []
        for section, (own, *shorter) in recipes.items():
            candidates = (own, *shorter[:times])
            fitting = (candidate for candidate in candidates if Need.of(changed, section, candidate, number).fits(card))
            recipe = next(fitting, None)
            if recipe is None:
                break
            if recipe is not own:
                settings.append(f"{section}.microbatch_tokens={recipe.microbatch_tokens}")
        else:
            checkpointing = [f"parallel.activation_checkpointing={choice}"] if choice != choices[0] else []
            return checkpointing + settings + ([f"--gpus {number}"] if number != gpus else [])
    return None


def _with_halved_microbatches(config: RunConfig, section: str) -> list[TrainConfig]:
    """Return a recipe, followed by its variants with repeatedly halved microbatches, down to the shortest allowed."""
    recipe: TrainConfig = getattr(config, section)
    recipes, tokens = [recipe], recipe.microbatch_tokens
    while tokens % 2 == 0 and tokens // 2 >= CONTEXTS_IN_MICROBATCH[section] * config.model.context:
        tokens //= 2
        recipes.append(recipe.model_copy(update={"microbatch_tokens": tokens}))
    return recipes


def with_checkpointing(config: RunConfig, choice: str) -> RunConfig:
    """Return the configuration with another choice of activation checkpointing."""
    parallel = config.parallel.model_copy(update={"activation_checkpointing": choice})
    return config.model_copy(update={"parallel": parallel})


def _numbers_of_gpus(config: RunConfig, gpus: int) -> Iterator[int]:
    """Yield `gpus`, then larger numbers that clusters have and the configuration can use, then smaller ones."""
    groups = config.parallel.shard_processes or 1
    numbers = [number for number in (1, 2, 4, *range(NODE, MOST_GPUS + 1, NODE)) if number % groups == 0]
    yield gpus
    yield from (number for number in numbers if number > gpus)
    yield from (number for number in reversed(numbers) if number < gpus)
