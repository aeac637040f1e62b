"""Settings of a training run: its recipe, how it is spread over processes, its checkpoints and its log."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from sbp_fast.config.section import NO_EFFECT, Count, CountOrZero, Section, Share


def _check_attention_backend(name: str) -> str:
    """Look a name other than "auto" up in the registry of the kernels, which imports torch; skip that where torch is absent."""
    if name == "auto":
        return name
    try:
        from sbp_kernels import attention_backends
    except ModuleNotFoundError:
        return name
    if name not in attention_backends():
        known = {"known": ", ".join(map(repr, ["auto", *attention_backends()]))}
        raise PydanticCustomError("attention_backend", "Input should be one of {known}", known)
    return name


AttentionBackend = Annotated[str, AfterValidator(_check_attention_backend)]


class TrainConfig(Section):
    """The recipe of a training run."""

    tokens: Count = 1_000_000
    """Training tokens in all, the same for every arm; the little padding that packing needs counts as tokens."""
    tokens_per_step: Count = 8192
    microbatch_tokens: Count = 2048
    """Length of one packed sequence, which goes through the model at once. A step is a whole number of packed sequences,
    shared equally among the processes, so this also limits how many processes can take part."""
    optimizer: str = "adamw"
    """A name in `sbp_fast.train.optimizer.OPTIMIZERS`. "muon" orthogonalises the updates of the layers' matrices, at AdamW's
    learning rate, and leaves all other parameters to AdamW; "muon-float32" does so in float32, which is much faster on a CPU
    without fast bfloat16."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: str = "cosine"
    """A name in `sbp_fast.train.schedules.SCHEDULES`: the learning rate after the warm-up."""
    warmup_fraction: Share = 0.05
    """Fraction of the steps over which the learning rate rises linearly to its peak."""
    decay_fraction: Share = 0.2
    """Fraction of the steps, at the end, over which "warmup-stable-decay" falls to the final learning rate."""
    final_learning_rate_fraction: Share = 0.1
    """Learning rate of the last step, as a fraction of the peak."""
    weight_decay: Annotated[float, Field(ge=0, le=10_000)] = 0.1
    """Weight decay of matrices. A baseline that repeats its corpus often needs far more than the usual 0.1: tune it there."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the layers compute in; "auto" is bfloat16 on CUDA, float32 elsewhere. Weights, summed gradients and optimizer
    state are always float32."""
    float8: bool = False
    """Compute the layers' projections in float8; needs torchao and a GPU that supports it."""
    attention: AttentionBackend = "auto"
    """A backend of `sbp_kernels.packed_attention`; the backend that "auto" resolves to is printed and recorded."""
    select: Literal["last", "best"] = "last"
    """Weights that are the output: those after the last step, or those with the lowest loss on validation documents among
    the points of [validation]. The learning rate may not yet have fallen there."""
    patience: CountOrZero = 0
    """With `select = "best"`: end the run after this many validation points without a new lowest loss (0: never)."""
    bad_steps: Annotated[Count, NO_EFFECT] = 5
    """Number of consecutive steps with a loss or gradient that is not finite after which the run ends; each such step is
    skipped."""
    spike_deviations: Annotated[float, Field(ge=0)] = 0.0
    """Return to the last checkpoint, and skip the batches since, if the loss exceeds the mean of the last 128 steps by this
    many standard deviations (0: never)."""

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainConfig:
        if self.tokens_per_step % self.microbatch_tokens:
            raise ValueError(
                f"tokens_per_step = {self.tokens_per_step} is no multiple of microbatch_tokens = {self.microbatch_tokens}"
            )
        if self.tokens < self.tokens_per_step:
            raise ValueError(f"tokens = {self.tokens} is less than one step: tokens_per_step = {self.tokens_per_step}")
        if self.warmup_fraction + self._decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction = {self.warmup_fraction:g} and decay_fraction = {self.decay_fraction:g} together exceed 1"
            )
        if self.patience and self.select != "best":
            raise ValueError(
                f'patience = {self.patience} needs select = "best": the last weights are those after the loss rose'
            )
        return self

    @property
    def _decay_fraction(self) -> float:
        """The fraction of the steps that is for the decay; 0 where the schedule has none and nobody asked for another."""
        default = type(self).model_fields["decay_fraction"].default
        return self.decay_fraction if self.schedule == "warmup-stable-decay" or self.decay_fraction != default else 0.0

    @property
    def sequences_per_step(self) -> int:
        """Number of packed sequences, or microbatches, in a step."""
        return self.tokens_per_step // self.microbatch_tokens

    @property
    def steps(self) -> int:
        """Number of steps of the run: its tokens divided by the tokens per step, rounded."""
        return max(1, round(self.tokens / self.tokens_per_step))


class ParallelConfig(Section):
    """How training is spread over processes.

    Nothing here changes a result beyond rounding, so a run may resume with other values.
    """

    shard_processes: CountOrZero = 0
    """Number of processes that share one copy of the weights (0: all). With fewer, the groups replicate each other (HSDP): take
    the GPUs of a node."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass; false needs their memory and saves an all-gather."""
    gather_once: bool = False
    """Keep all weights gathered over the microbatches of a step; they must all fit in memory."""
    prefetch_layers: CountOrZero = 1
    """Number of layers whose weights are gathered ahead of the one that computes."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes: nothing; all but matrix products and attention; all but each layer's input."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each layer with torch.compile; "auto" does so on CUDA."""


class CheckpointConfig(Section):
    """When checkpoints are written and how long they stay; a killed run resumes from the newest."""

    seconds: Annotated[float, Field(ge=0)] = 20.0
    """Seconds between checkpoints, which are written in the background."""
    keep: Count = 2
    """Number of newest checkpoints that stay on disk during a run; a damaged one is skipped for the one before."""
    keep_every_steps: CountOrZero = 0
    """Keep the first checkpoint after each this many steps for good (0: none)."""


class LogConfig(Section):
    """Lines of metrics.jsonl, and the trackers that receive them too."""

    every_steps: Count = 1
    """Steps between two lines. Only a line reads figures from the device; between lines nothing synchronises."""
    trackers: tuple[str, ...] = ()
    """Names in `sbp_fast.train.trackers.TRACKERS`, which receive the same figures under the same keys; the package of each
    must be installed."""
