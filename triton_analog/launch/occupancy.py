"""How many programs of a kernel one multiprocessor holds at once, from the limits of its architecture."""

from __future__ import annotations

from dataclasses import dataclass

KB = 1024

SCHEDULERS = 4
"""Per multiprocessor; a warp stays on one. AMD: SIMD units."""

VECTOR_REGISTERS = 512
"""Per scheduler, each of 4 bytes in every lane of a warp. NVIDIA: 16384 registers / 32 lanes."""

REGISTER_GRANULARITY = 8
"""A warp's vector registers come in multiples of this. NVIDIA: 256 registers / 32 lanes."""


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (AMD: compute unit). Sources: CUDA programming guide, section on compute
    capabilities; AMD CDNA 3 instruction set guide and LLVM's AMDGPU target."""

    shared_bytes: int
    """All programs together."""
    warps: int
    programs: int
    reserved_bytes: int = 1 * KB
    """Shared memory of every program that it cannot use."""
    shared_granularity: int = 128
    tensor_columns: int = 0
    """Columns of tensor memory; 0 where there is none."""

    @property
    def shared_bytes_per_program(self) -> int:
        """The most that one program may use."""
        return min(self.shared_bytes - self.reserved_bytes, 227 * KB)


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=164 * KB, warps=64, programs=32),
    "sm_86": Multiprocessor(shared_bytes=100 * KB, warps=48, programs=16),
    "sm_89": Multiprocessor(shared_bytes=100 * KB, warps=48, programs=24),
    "sm_90": Multiprocessor(shared_bytes=228 * KB, warps=64, programs=32),
    "sm_100": Multiprocessor(shared_bytes=228 * KB, warps=64, programs=32, tensor_columns=512),
    "sm_120": Multiprocessor(shared_bytes=100 * KB, warps=48, programs=24),
    "gfx942": Multiprocessor(shared_bytes=64 * KB, warps=32, programs=16, reserved_bytes=0, shared_granularity=512),
}


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(target: str, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0) -> int:
    """Programs that fit one multiprocessor of ``target`` at once; 0 if not even one does.

    Args:
        target: One of ``MULTIPROCESSORS``.
        registers: Per thread.
        shared_bytes: Per program.
        warps: Per program.
        tensor_columns: Columns of tensor memory per program.
    """
    limits = MULTIPROCESSORS[target]
    if shared_bytes > limits.shared_bytes_per_program:
        return 0
    shared = _round_up(shared_bytes + limits.reserved_bytes, limits.shared_granularity)
    warps_by_registers = SCHEDULERS * (VECTOR_REGISTERS // _round_up(max(registers, 1), REGISTER_GRANULARITY))
    fitting = [limits.programs, min(limits.warps, warps_by_registers) // warps]
    if shared:
        fitting.append(limits.shared_bytes // shared)
    if tensor_columns:
        fitting.append(limits.tensor_columns // tensor_columns)
    return min(fitting)
