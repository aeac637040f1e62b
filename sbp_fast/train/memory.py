"""Memory of a training step on each GPU, in bytes, by arithmetic alone.

Weights, gradients and optimizer state are float32 and sharded by FSDP2; a single process is a group of one. Layers compute
with gathered weights of `size` bytes a number, 2 for bfloat16. Activations saved for the backward pass are counted tensor by
tensor, as the operations of `sbp_kernels` save them in eager mode. Compiled layers, for which Inductor chooses what to save,
save about as much or less; float8 is counted as bfloat16. The total is the memory at the beginning of the backward pass,
which is the peak: activations are freed faster than sharded gradients are added.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sbp_fast.config import ModelConfig, ParallelConfig, TrainConfig
from sbp_fast.model.flops import parameters
from sbp_fast.train.optimizer import OPTIMIZERS

CARD_MEMORY = {"a100": 81_920 << 20, "h100": 81_559 << 20, "h200": 143_771 << 20, "b200": 183_359 << 20}
"""Bytes of each card as nvidia-smi shows them; sold as 80, 80, 141 and 180 GB (192 GB of chips, of which 180 are usable)."""

RESERVED_BYTES, RESERVED_SHARE = 2 << 30, 0.05
"""Memory left free: bytes for the CUDA context, libraries and NCCL's buffers; a share of the memory for fragmentation.

Both are assumed, not measured.
"""

CHECKPOINTING = ("none", "selective", "full")

# of sbp_kernels.linear_cross_entropy, on a GPU
SLAB_BYTES, MOST_SLAB_BYTES, SLAB_MODE_BYTES, PANEL_BYTES = 256 << 20, 1 << 30, 9 << 29, 128 << 20
LEAST_SLAB_ROWS, WANTED_SLAB_ROWS = 2048, 4096


def usable_memory(card: str) -> float:
    """Return the bytes of a card that a training step may take."""
    return CARD_MEMORY[card] * (1 - RESERVED_SHARE) - RESERVED_BYTES


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a layer's forward pass makes.

    Attributes:
        name: description of the tensor.
        numbers: numbers a token.
        size: bytes a number.
        saved: the choices of activation checkpointing that save it for the backward pass.
    """

    name: str
    numbers: int
    size: int
    saved: tuple[str, ...]


def layer_tensors(config: ModelConfig, size: int) -> list[LayerTensor]:
    """Return all tensors that a layer may save.

    "none" saves what the backward pass reads, "selective" the input and the results of matrix products and of attention,
    "full" the input. Values are part of the projection and need no memory of their own; a tensor that several operations
    save, such as the result of attention, counts once.
    """
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    normed_heads = config.heads + config.kv_heads if config.qk_norm else 0
    unless_full, alone, products = ("none", "selective"), ("none",), ("selective",)
    return [
        LayerTensor("input, of the first norm", width, size, CHECKPOINTING),
        LayerTensor("its norm", width, size, alone),
        LayerTensor("queries, keys and values as projected", queries + 2 * keys, size, unless_full),
        LayerTensor("queries and keys, rotated", queries + keys, size, alone),
        LayerTensor("attention", queries, size, unless_full),
        LayerTensor("its log-sum-exp", config.heads, 4, unless_full),
        LayerTensor("attention as projected", width, size, products),
        LayerTensor("sum, of the second norm", width, size, alone),
        LayerTensor("its norm", width, size, alone),
        LayerTensor("gate and up", 2 * inner, size, unless_full),
        LayerTensor("their product", inner, size, alone),
        LayerTensor("product as projected", width, size, products),
        LayerTensor("inverse roots of the four norms", 2 + normed_heads, 4, alone),
    ]


def layer_bytes(config: ModelConfig, tokens: int, size: int, checkpointing: str) -> int:
    """Return the bytes that one layer saves of a packed sequence of `tokens`."""
    return tokens * sum(part.numbers * part.size for part in layer_tensors(config, size) if checkpointing in part.saved)


def recomputed_bytes(config: ModelConfig, tokens: int, size: int, checkpointing: str) -> int:
    """Return the bytes that one layer's backward pass recomputes: all that it reads and that was not saved."""
    parts = [part for part in layer_tensors(config, size) if "none" in part.saved and checkpointing not in part.saved]
    return tokens * sum(part.numbers * part.size for part in parts)


def layer_backward_bytes(config: ModelConfig, tokens: int, size: int) -> int:
    """Return the most that a layer's backward pass adds to the saved activations, gradients of weights not counted.

    The peak is in the feed-forward, whose tensors are the largest: the gradients of the residual stream, of its norm, of the
    product of gate and up, and of gate and up, while the product itself is freed.
    """
    return tokens * size * (2 * config.hidden_size + 2 * config.intermediate_size)


def most_slab_rows(vocabulary: int, size: int) -> int:
    """Return the rows that fit SLAB_BYTES, or WANTED_SLAB_ROWS as far as they fit MOST_SLAB_BYTES, at least LEAST_SLAB_ROWS."""
    fitting, at_most = (limit // (vocabulary * size) // 128 * 128 for limit in (SLAB_BYTES, MOST_SLAB_BYTES))
    return max(fitting, min(at_most, WANTED_SLAB_ROWS), LEAST_SLAB_ROWS)


def slab_rows(vocabulary: int, rows: int, size: int) -> int:
    """Return the rows of logits that exist at a time: an even part of `rows`, at most `most_slab_rows`."""
    limit = most_slab_rows(vocabulary, size)
    slabs = max(-(-rows // limit), 1)
    return min(limit, -(-rows // (slabs * 128)) * 128, rows)


def panel_columns(vocabulary: int, rows: int, size: int) -> int:
    """Return the columns of the logits' gradient that exist at a time, where no logits are kept."""
    return min(max(PANEL_BYTES // (rows * size * 512), 1), -(-vocabulary // 512)) * 512


def keeps_slabs(vocabulary: int, width: int, size: int) -> bool:
    """Return whether the loss computes its gradients from slabs of logits; otherwise it computes the logits twice."""
    fits = most_slab_rows(vocabulary, size) * vocabulary * size + 4 * vocabulary * width < SLAB_MODE_BYTES
    return fits or width * size % 16 > 0


def loss_bytes(config: ModelConfig, vocabulary: int, rows: int, size: int) -> int:
    """Return the peak memory of the last norm and of the loss of `rows` rows.

    With slabs: the norm's input and result, the gradient of the rows and, in float32, that of the output projection; in the
    forward pass also a slab, in the backward pass also both gradients rounded. Without slabs the peak is in the backward pass:
    the norm's input and result, the gathered rows, both gradients, that of the rows in float32 too, and a panel.
    """
    states, table = rows * config.hidden_size * size, vocabulary * config.hidden_size
    row_figures = 4 * rows  # one float32 number a row
    if keeps_slabs(vocabulary, config.hidden_size, size):
        slab = slab_rows(vocabulary, rows, size) * (-(-vocabulary // 64) * 64 + 2 * config.hidden_size) * size
        return row_figures + 3 * states + 4 * table + max(slab, states + size * table)
    panel = rows * panel_columns(vocabulary, rows, size) * size
    return 5 * row_figures + 4 * states + 4 * rows * config.hidden_size + size * table + panel


def optimizer_bytes(config: ModelConfig, vocabulary: int, optimizer: str) -> int:
    """Return the bytes of state of a registered optimizer, before sharding."""
    return OPTIMIZERS[optimizer].state_bytes(config, vocabulary)


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step by purpose, in bytes on each GPU.

    Attributes:
        weights: this GPU's shard of the weights.
        optimizer: its shard of the optimizer state.
        gradients: gradients of the weights.
        gathered: weights gathered for the layers that compute.
        reduced: gradients of a layer while they are reduced.
        activations: activations saved for the backward pass.
        at_work: peak of what the loss, or the backward pass of one layer, holds besides.
        batch: tokens, targets and layout.
    """

    weights: float
    optimizer: float
    gradients: float
    gathered: float
    reduced: float
    activations: float
    at_work: float
    batch: float

    @property
    def total(self) -> float:
        """Sum of all of them."""
        return sum(asdict(self).values())


def step_memory(config: ModelConfig, vocabulary: int, recipe: TrainConfig, parallel: ParallelConfig, gpus: int) -> StepMemory:
    """Return the memory of a training step on each of `gpus` GPUs; groups of `parallel.shard_processes` share the weights.

    Where a process accumulates the gradients of several packed sequences, FSDP2 keeps them unsharded, in float32, and reduces
    them once.
    """
    size = 4 if recipe.precision == "float32" else 2
    tokens, count = recipe.microbatch_tokens, parameters(config, vocabulary)
    shards = parallel.shard_processes or gpus
    layer, outside = _layer_and_rest(config, vocabulary)
    all_gathered = parallel.gather_once or not parallel.reshard_after_forward
    # the layer that computes, the prefetched ones, and a buffer for one more; what is no layer is never freed
    layers_gathered = config.layers if all_gathered else min(2 + parallel.prefetch_layers, config.layers + 1)
    sharded = gpus > 1 or size < 4  # a single process in float32 computes with the weights themselves
    accumulates = recipe.tokens_per_step > tokens * gpus
    checkpointing = parallel.activation_checkpointing
    one_layer = (
        size * vocabulary * config.hidden_size  # the output projection's gradient waits for the embedding's
        + recomputed_bytes(config, tokens, size, checkpointing)
        + layer_backward_bytes(config, tokens, size)
    )
    return StepMemory(
        weights=4 * count / shards,
        optimizer=optimizer_bytes(config, vocabulary, recipe.optimizer) / shards,
        gradients=4 * count / (1 if accumulates else shards),
        gathered=size * (outside + layers_gathered * layer) if sharded else 0,
        reduced=(size + 4) * layer if sharded else 0,
        activations=config.layers * layer_bytes(config, tokens, size, checkpointing),
        at_work=max(loss_bytes(config, vocabulary, tokens, size), one_layer),
        batch=tokens * (3 * 8 + 2 * 4),  # tokens, targets and rows with loss in int64, two int32 of the layout
    )


def _layer_and_rest(config: ModelConfig, vocabulary: int) -> tuple[int, int]:
    """Return the number of weights of one layer, and of all parts that are no layer."""
    outside = parameters(config.model_copy(update={"layers": 0}), vocabulary)
    return (parameters(config, vocabulary) - outside) // config.layers, outside
