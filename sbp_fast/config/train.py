"""What a training run computes, how it is spread over processes, saved and logged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sbp_fast.config.section import NO_EFFECT, Count, Section, Share

AttentionBackend = Literal["auto", "triton", "triton-hopper", "torch", "flash-attn", "xformers", "flex", "sdpa", "varlen"]


class TrainConfig(Section):
    """What a training run computes."""

    tokens: Count = 1_000_000
    """Training tokens in all, the same for every arm; the little padding that packing needs counts as tokens."""
    tokens_per_step: Count = 8192
    microbatch_tokens: Count = 2048
    """Length of one packed stream: what goes through the model at once. A step is a whole number of them, shared out among
    the processes, so it also bounds how many processes can take part."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """ "muon" orthogonalises the updates of the layers' matrices, at AdamW's learning rate; AdamW goes on doing the rest."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    schedule: Literal["cosine", "constant", "warmup-stable-decay"] = "cosine"
    warmup_share: Share = 0.05
    decay_share: Share = 0.2
    """Of the steps, the last part, in which "warmup-stable-decay" falls to the final rate."""
    final_learning_rate_share: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of matrices alone. A baseline that repeats its corpus often wants far more than the usual 0.1: tune it there."""
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the layers compute in; "auto" is bfloat16 on CUDA, float32 elsewhere. Weights, their gradients' sums and the
    optimizer are float32 always."""
    float8: bool = False
    """Compute the layers' projections in float8 (needs torchao and a GPU that can)."""
    attention: AttentionBackend = "auto"
    """A backend of `sbp_kernels.packed_attention`; what "auto" became is printed and recorded."""
    bad_steps: Annotated[Count, NO_EFFECT] = 5
    """Steps in a row whose loss or gradient is not finite, each skipped, that end the run."""
    spike_deviations: Annotated[float, Field(ge=0)] = 0.0
    """Go back to the last checkpoint, and past the batches since, when the loss exceeds the mean of the last 128 steps by this
    many deviations (0: never)."""

    @model_validator(mode="after")
    def _streams_fill_a_step(self) -> TrainConfig:
        if self.tokens_per_step % self.microbatch_tokens:
            raise ValueError(
                f"tokens_per_step = {self.tokens_per_step} is no multiple of microbatch_tokens = {self.microbatch_tokens}"
            )
        return self

    @property
    def streams_per_step(self) -> int:
        """Packed streams, or microbatches, that make a step."""
        return self.tokens_per_step // self.microbatch_tokens

    @property
    def steps(self) -> int:
        """Of the run: its tokens to the nearest step."""
        return max(1, round(self.tokens / self.tokens_per_step))


class ParallelConfig(Section):
    """How training is spread over processes. Nothing here changes a result beyond rounding, so a run may go on with others."""

    shard_processes: Annotated[int, Field(ge=0)] = 0
    """Processes that share one copy of the weights (0: all); with fewer than there are, the groups replicate each other
    (HSDP): take the GPUs of a node."""
    reshard_after_forward: bool = True
    """Give a layer's gathered weights back after its forward pass; false needs their memory and saves a gathering."""
    gather_once: bool = False
    """Keep all weights gathered over the microbatches of a step, for which the memory of all of them must be there."""
    prefetch_layers: Annotated[int, Field(ge=0)] = 1
    """Layers gathered ahead of the one at work."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute again in the backward pass: nothing; all but matrix products and attention; all but each layer's input."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each layer with torch.compile; "auto" does on CUDA."""


class CheckpointConfig(Section):
    """What a killed run resumes from."""

    seconds: Annotated[float, Field(ge=0)] = 20.0
    """Save this often, in the background."""
    keep: Count = 2
    """The newest ones that stay on disk while a run goes on; a damaged one is passed over for the one before."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """The first checkpoint after each this many steps stays for good (0: none does)."""


class LogConfig(Section):
    """Lines of metrics.jsonl, and where else they go."""

    every_steps: Count = 1
    """Read the device's figures this often; between two reads nothing waits for the device."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Get the same figures under the same keys; the package of each must be installed."""
