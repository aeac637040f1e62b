"""Whether a configuration fits a number of GPUs of one kind, and the smallest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from sbp_fast.config import RunConfig, TrainConfig
from sbp_fast.errors import UserError
from sbp_fast.train.memory import CHECKPOINTING, StepMemory, step_memory, usable_memory

NODE = 8  # GPUs of a machine; beyond one machine whole ones are added
MOST_GPUS = 8192
STREAMS_HOLD = {"pretrain": 1, "synthesizer": 2}  # contexts that a stream of each recipe must have room for


@dataclass(frozen=True)
class Need:
    """What training by one recipe takes on each of `gpus`.

    Attributes:
        section: of the configuration, the recipe's.
        streams: microbatches of a step; fewer than GPUs leave some of these idle, which the trainer refuses.
    """

    section: str
    recipe: TrainConfig
    gpus: int
    streams: int
    memory: StepMemory

    @staticmethod
    def of(config: RunConfig, section: str, recipe: TrainConfig, gpus: int) -> Need:
        memory = step_memory(config.model, config.corpus.vocabulary_size, recipe, config.parallel, gpus)
        return Need(section, recipe, gpus, recipe.sequences_per_step, memory)

    def fits(self, card: str) -> bool:
        return self.streams >= self.gpus and self.memory.total <= usable_memory(card)


def needs(config: RunConfig, gpus: int) -> list[Need]:
    """Of pretraining, and of the synthesizer.

    Raises:
        UserError: processes that cannot be divided into groups, or tokens into streams; streams too short for a context.
    """
    shards = config.parallel.shard_processes
    if shards and gpus % shards:
        found = f"{shards} does not divide the {gpus} processes"
        raise UserError("parallel.shard_processes", found, "set it to a divisor, such as the GPUs of a node, or to 0")
    for section, contexts in STREAMS_HOLD.items():
        tokens, least = getattr(config, section).microbatch_tokens, contexts * config.model.context
        if tokens < least:
            found = f"{tokens} is less than {contexts} times model.context"
            raise UserError(f"{section}.microbatch_tokens", found, f"raise it to {least} or more")
    return [Need.of(config, section, getattr(config, section), gpus) for section in STREAMS_HOLD]


def smallest_change(config: RunConfig, gpus: int, card: str) -> list[str] | None:
    """Settings that make it fit, as they are written on the command line: none where it fits; None where there are none.

    More activations computed again come first, then smaller streams, then more GPUs, each with as little as possible of
    those before it; fewer GPUs last, which help where there are fewer streams than GPUs.
    """
    choices = CHECKPOINTING[CHECKPOINTING.index(config.parallel.activation_checkpointing) :]
    recipes = {section: _with_ever_shorter_streams(config, section) for section in STREAMS_HOLD}
    halvings = range(max(map(len, recipes.values())))
    for number, times, choice in product(_numbers_of_gpus(config, gpus), halvings, choices):
        changed, settings = with_checkpointing(config, choice), []
        for section, (own, *shorter) in recipes.items():
            fitting = (one for one in (own, *shorter[:times]) if Need.of(changed, section, one, number).fits(card))
            recipe = next(fitting, None)
            if recipe is None:
                break
            if recipe is not own:
                settings.append(f"{section}.microbatch_tokens={recipe.microbatch_tokens}")
        else:
            checkpointing = [f"parallel.activation_checkpointing={choice}"] if choice != choices[0] else []
            return checkpointing + settings + ([f"--gpus {number}"] if number != gpus else [])
    return None


def _with_ever_shorter_streams(config: RunConfig, section: str) -> list[TrainConfig]:
    """A recipe, and what it becomes as its streams are halved again and again, as long as they hold what they must."""
    recipe: TrainConfig = getattr(config, section)
    recipes, tokens = [recipe], recipe.microbatch_tokens
    while tokens % 2 == 0 and tokens // 2 >= STREAMS_HOLD[section] * config.model.context:
        tokens //= 2
        recipes.append(recipe.model_copy(update={"microbatch_tokens": tokens}))
    return recipes


def with_checkpointing(config: RunConfig, choice: str) -> RunConfig:
    parallel = config.parallel.model_copy(update={"activation_checkpointing": choice})
    return config.model_copy(update={"parallel": parallel})


def _numbers_of_gpus(config: RunConfig, gpus: int) -> Iterator[int]:
    """`gpus`, then the larger numbers that clusters have and the configuration can use, then the smaller ones."""
    groups = config.parallel.shard_processes or 1
    numbers = [number for number in (1, 2, 4, *range(NODE, MOST_GPUS + 1, NODE)) if number % groups == 0]
    yield gpus
    yield from (number for number in numbers if number > gpus)
    yield from (number for number in reversed(numbers) if number < gpus)
