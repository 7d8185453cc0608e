"""The GPUs that plans are made for: what their data sheets promise, and what of their memory a process is given.

Rates are dense (data sheets like to print those with sparsity, twice as high) and of tensor cores that add in fp32.
Marketing gigabytes are neither 1e9 bytes nor what is usable, so ``memory_gib`` is the total that the driver reports to
a process on such a card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# What a CUDA context and the libraries' kernels take before anything is allocated; an H200 then has 139 GiB free.
CONTEXT_GIB = 0.6


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. ``fp8_flops_per_s`` is None where tensor cores know no FP8.

    ``link_bytes_per_s``: to the other cards of a machine, one way.

    ``source`` says where the numbers are from.
    """

    name: str
    title: str
    marketing_gb: int
    memory_gib: float
    bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None
    link_bytes_per_s: float
    source: str

    @property
    def free_bytes(self) -> int:
        """What is free for an engine that has the card to itself."""
        return int((self.memory_gib - CONTEXT_GIB) * (1 << 30))


_ALL = (
    Gpu("h200", "NVIDIA H200 SXM", 141, 139.8, 4.8e12, 989e12, 1979e12, 450e9, "NVIDIA H200 data sheet"),
    Gpu("h100", "NVIDIA H100 SXM", 80, 79.1, 3.35e12, 989e12, 1979e12, 450e9, "NVIDIA H100 data sheet, SXM"),
    Gpu("a100", "NVIDIA A100 80GB SXM", 80, 79.1, 2.039e12, 312e12, None, 300e9, "NVIDIA A100 data sheet, 80GB SXM"),
    Gpu("l40s", "NVIDIA L40S", 48, 44.4, 864e9, 362e12, 733e12, 32e9, "NVIDIA L40S data sheet"),
    # FP8 with fp32 accumulation, as bf16's: half of what it does with fp16 accumulation.
    Gpu(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        24,
        23.6,
        1.008e12,
        165.2e12,
        330.3e12,
        32e9,
        "NVIDIA Ada architecture white paper",
    ),
    # 8 TB/s by the data sheet; drivers report a bus of 7680 bits, that is 7.7 TB/s.
    Gpu(
        "b200",
        "NVIDIA B200 SXM",
        180,
        178.3,
        8.0e12,
        2250e12,
        4500e12,
        900e9,
        "NVIDIA Blackwell and HGX B200 data sheets",
    ),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
ALIASES = {"h100-sxm": "h100", "a100-80gb": "a100", "4090": "rtx4090", "rtx-4090": "rtx4090", "h200-sxm": "h200"}


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The GPU called ``name``, with ``memory_gib`` in place of its own memory if given.

    Raises ``ValueError`` listing those that are known.
    """
    gpu = GPUS.get(ALIASES.get(name.lower(), name.lower()))
    if gpu is None:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return gpu if memory_gib is None else replace(gpu, memory_gib=memory_gib)
