"""What a training step holds on each GPU, in bytes, by arithmetic alone.

Weights, their gradients and the optimizer's moments are float32 and sharded by FSDP2, one process being a group of one; what
a layer computes with is gathered in `size` bytes a number, 2 for bfloat16. What its forward pass keeps for the backward pass
is counted tensor by tensor, as the operations of `sbp_kernels` save it in eager mode; compiled layers, whose savings are
Inductor's choice, keep about that or less, and float8 is counted as bfloat16. The total adds up what is there when the
backward pass begins, which is the peak: activations go faster than sharded gradients come.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sbp_fast.config import ModelConfig, ParallelConfig, TrainConfig
from sbp_fast.model.flops import parameters
from sbp_fast.train.optimizer import OPTIMIZERS

CARD_MEMORY = {"a100": 81_920 << 20, "h100": 81_559 << 20, "h200": 143_771 << 20, "b200": 183_359 << 20}
"""Bytes of each card as nvidia-smi shows them, sold as 80, 80, 141 and 180 GB (192 GB of chips, of which 180 are usable)."""

RESERVED_BYTES, RESERVED_SHARE = 2 << 30, 0.05
"""Left free: for the CUDA context, libraries and NCCL's buffers; of the memory, for fragmentation. Assumed, not measured."""

CHECKPOINTING = ("none", "selective", "full")

# of sbp_kernels.linear_cross_entropy, on a GPU
SLAB_BYTES, LEAST_SLAB_ROWS, SLAB_MODE_BYTES, PANEL_BYTES = 256 << 20, 2048, 4 << 30, 128 << 20


def usable_memory(card: str) -> float:
    """Bytes of a card that a training step may take."""
    return CARD_MEMORY[card] * (1 - RESERVED_SHARE) - RESERVED_BYTES


@dataclass(frozen=True)
class LayerTensor:
    """Something that a layer's forward pass makes: so many numbers a token of so many bytes.

    Attributes:
        kept: the choices of activation checkpointing that keep it until the backward pass.
    """

    name: str
    numbers: int
    size: int
    kept: tuple[str, ...]


def layer_tensors(config: ModelConfig, size: int) -> list[LayerTensor]:
    """Whatever a layer may keep.

    "none" keeps what the backward pass reads, "selective" the input and the results of matrix products and of attention,
    "full" the input. Values are a part of the projection and so need no memory of their own; the same goes for what several
    operations save, such as the result of attention.
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
    """What one layer keeps of a stream of `tokens`."""
    return tokens * sum(part.numbers * part.size for part in layer_tensors(config, size) if checkpointing in part.kept)


def recomputed_bytes(config: ModelConfig, tokens: int, size: int, checkpointing: str) -> int:
    """What one layer's backward pass makes again: all that it reads and that was not kept."""
    parts = [part for part in layer_tensors(config, size) if "none" in part.kept and checkpointing not in part.kept]
    return tokens * sum(part.numbers * part.size for part in parts)


def layer_backward_bytes(config: ModelConfig, tokens: int, size: int) -> int:
    """The most that a layer's backward pass adds to what was kept, weights' gradients apart.

    That is in the feed-forward, whose tensors are the largest: the gradients of the stream, of its norm, of the product of
    gate and up, and of these two, while the product itself is gone.
    """
    return tokens * size * (2 * config.hidden_size + 2 * config.intermediate_size)


def slab_rows(vocabulary: int, rows: int, size: int) -> int:
    """Rows of logits that exist at a time: a share of `rows` that fits SLAB_BYTES, but no fewer than LEAST_SLAB_ROWS."""
    limit = max(SLAB_BYTES // (vocabulary * size) // 128 * 128, LEAST_SLAB_ROWS)
    slabs = max(-(-rows // limit), 1)
    return min(limit, -(-rows // (slabs * 128)) * 128, rows)


def panel_columns(vocabulary: int, rows: int, size: int) -> int:
    """Columns of the logits' gradient that exist at a time, where no logits are kept."""
    return min(max(PANEL_BYTES // (rows * size * 512), 1), -(-vocabulary // 512)) * 512


def keeps_slabs(vocabulary: int, width: int, size: int) -> bool:
    """Whether the loss computes its gradients from slabs of logits; otherwise it computes the logits twice."""
    limit = max(SLAB_BYTES // (vocabulary * size) // 128 * 128, LEAST_SLAB_ROWS)
    fits = limit * vocabulary * size + 4 * vocabulary * width < SLAB_MODE_BYTES
    return fits or width * size % 16 > 0


def loss_bytes(config: ModelConfig, vocabulary: int, rows: int, size: int) -> int:
    """The most that the last norm and the loss of `rows` rows hold.

    With slabs: the norm's input and result, the gradients by the rows and, in float32, by the output projection; in the
    forward pass a slab besides, in the backward pass both gradients rounded. Without slabs, in the backward pass: the norm's
    input and result, the rows gathered, the gradients, that by the rows in float32 too, and a panel.
    """
    states, table, few = (
        rows * config.hidden_size * size,
        vocabulary * config.hidden_size,
        4 * rows,
    )  # few: a number for each row
    if keeps_slabs(vocabulary, config.hidden_size, size):
        slab = slab_rows(vocabulary, rows, size) * (-(-vocabulary // 64) * 64 + 2 * config.hidden_size) * size
        return few + 3 * states + 4 * table + max(slab, states + size * table)
    panel = rows * panel_columns(vocabulary, rows, size) * size
    return 5 * few + 4 * states + 4 * rows * config.hidden_size + size * table + panel


def optimizer_bytes(config: ModelConfig, vocabulary: int, optimizer: str) -> int:
    """Return the bytes of state of a registered optimizer, before sharding."""
    return OPTIMIZERS[optimizer].state_bytes(config, vocabulary)


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each GPU."""

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
        return sum(asdict(self).values())


def step_memory(config: ModelConfig, vocabulary: int, recipe: TrainConfig, parallel: ParallelConfig, gpus: int) -> StepMemory:
    """What a step takes on each of `gpus` that train together, the groups of `parallel.shard_processes` sharing the weights.

    Where a process adds up the gradients of several streams FSDP2 keeps them whole, in float32, and exchanges them once.
    """
    size = 4 if recipe.precision == "float32" else 2
    tokens, count = recipe.microbatch_tokens, parameters(config, vocabulary)
    shards = parallel.shard_processes or gpus
    layer, outside = _layer_and_rest(config, vocabulary)
    all_gathered = parallel.gather_once or not parallel.reshard_after_forward
    # a layer at work, those ahead of it, and the buffer in which one more arrives; the rest is never given back
    layers_gathered = config.layers if all_gathered else min(2 + parallel.prefetch_layers, config.layers + 1)
    sharded = gpus > 1 or size < 4  # one process that computes in float32 uses the weights as they lie
    adds_up = recipe.tokens_per_step > tokens * gpus
    checkpointing = parallel.activation_checkpointing
    one_layer = (
        size * vocabulary * config.hidden_size  # the output projection's gradient waits for the embedding's
        + recomputed_bytes(config, tokens, size, checkpointing)
        + layer_backward_bytes(config, tokens, size)
    )
    return StepMemory(
        weights=4 * count / shards,
        optimizer=optimizer_bytes(config, vocabulary, recipe.optimizer) / shards,
        gradients=4 * count / (1 if adds_up else shards),
        gathered=size * (outside + layers_gathered * layer) if sharded else 0,
        reduced=(size + 4) * layer if sharded else 0,
        activations=config.layers * layer_bytes(config, tokens, size, checkpointing),
        at_work=max(loss_bytes(config, vocabulary, tokens, size), one_layer),
        batch=tokens * (3 * 8 + 2 * 4),  # tokens, targets and rows with loss in int64, two int32 of the layout
    )


def _layer_and_rest(config: ModelConfig, vocabulary: int) -> tuple[int, int]:
    """Weights of one layer, and of what is no layer."""
    outside = parameters(config.model_copy(update={"layers": 0}), vocabulary)
    return (parameters(config, vocabulary) - outside) // config.layers, outside
