"""Number of thread blocks that fit on one multiprocessor at once, from the capacities that vendors publish."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Capacities of a streaming multiprocessor (NVIDIA) or compute unit (AMD), which has four partitions.

    Attributes:
        registers: of 32 bits, per partition, for all threads of its warps.
        granule: registers of a warp come in multiples of this.
        warp: threads in one.
        warps: at most, per partition.
        blocks: at most, per multiprocessor.
        shared: bytes of shared memory, per multiprocessor.
        reserved: bytes of it that the system takes per block.
        tensor_memory: columns of tensor memory, where there is such.
    """

    registers: int
    granule: int
    warp: int
    warps: int
    blocks: int
    shared: int
    reserved: int
    tensor_memory: int = 0


PARTITIONS = 4
KIB = 1024

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD Instinct MI300 (CDNA 3) ISA guide.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(16 * KIB, 256, 32, 16, 32, 164 * KIB, KIB),
    "sm_90": Multiprocessor(16 * KIB, 256, 32, 16, 32, 228 * KIB, KIB),
    "sm_100": Multiprocessor(16 * KIB, 256, 32, 16, 32, 228 * KIB, KIB, tensor_memory=512),
    "gfx942": Multiprocessor(32 * KIB, 512, 64, 8, 16, 64 * KIB, 0),
}


def blocks_per_multiprocessor(
    target: str, *, warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int = 0
) -> int:
    """Return how many blocks of `warps` warps, `registers` a thread, run at once; 0 where none can be launched."""
    capacity = MULTIPROCESSORS[target]
    per_warp = max(1, -(-registers * capacity.warp // capacity.granule)) * capacity.granule
    resident = min(capacity.warps, capacity.registers // per_warp) * PARTITIONS
    fits = [capacity.blocks, resident // warps]
    if shared_bytes + capacity.reserved:
        fits.append(capacity.shared // (shared_bytes + capacity.reserved))
    if tensor_memory_columns:
        fits.append(capacity.tensor_memory // tensor_memory_columns)
    return min(fits)
