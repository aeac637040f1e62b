"""How many thread blocks fit on one multiprocessor at once: arithmetic over the limits that vendors publish."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a streaming multiprocessor (NVIDIA) or compute unit (AMD), which has four partitions.

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
    """Blocks of `warps` warps, `registers` a thread, that run at once; 0 where not one can be launched."""
    limits = MULTIPROCESSORS[target]
    per_warp = max(1, -(-registers * limits.warp // limits.granule)) * limits.granule
    resident = min(limits.warps, limits.registers // per_warp) * PARTITIONS
    fits = [limits.blocks, resident // warps]
    if shared_bytes + limits.reserved:
        fits.append(limits.shared // (shared_bytes + limits.reserved))
    if tensor_memory_columns:
        fits.append(limits.tensor_memory // tensor_memory_columns)
    return min(fits)
