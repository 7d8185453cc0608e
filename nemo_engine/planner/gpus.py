"""The GPUs that plans are made for: the rates of their data sheets, and the memory that a process gets.

Rates are dense (data sheets like to print those with sparsity, twice as high) and of tensor cores that add in fp32.
Marketing gigabytes are neither 1e9 bytes nor what is usable, so ``memory_gib`` is the total that the driver reports to
a process on such a card.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

# The memory that a CUDA context and the libraries' kernels take before any allocation; an H200 then has 139 GiB free.
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
    memory: str  # its kind
    bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None
    link_bytes_per_s: float
    source: str

    @property
    def free_bytes(self) -> int:
        """Bytes that are free for an engine that has the card to itself."""
        return int((self.memory_gib - CONTEXT_GIB) * (1 << 30))


_ADA = "NVIDIA Ada architecture white paper"
_BLACKWELL = "NVIDIA RTX Blackwell architecture white paper"
# GeForce cards: products that add in fp32, half of what they do with fp16 sums.
_ALL = (
    Gpu("h200", "NVIDIA H200 SXM", 141, 139.8, "HBM3e", 4.8e12, 989e12, 1979e12, 450e9, "NVIDIA H200 data sheet"),
    Gpu("h100", "NVIDIA H100 SXM", 80, 79.1, "HBM3", 3.35e12, 989e12, 1979e12, 450e9, "NVIDIA H100 data sheet, SXM"),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", 80, 79.1, "HBM2e", 2.0e12, 756e12, 1513e12, 64e9, "NVIDIA H100 PCIe brief"),
    Gpu("a100", "NVIDIA A100 80GB SXM", 80, 79.1, "HBM2e", 2.039e12, 312e12, None, 300e9,
        "NVIDIA A100 data sheet, 80GB SXM"),
    Gpu("a100-40", "NVIDIA A100 40GB SXM", 40, 39.4, "HBM2", 1.555e12, 312e12, None, 300e9,
        "NVIDIA A100 data sheet, 40GB"),
    Gpu("l40s", "NVIDIA L40S", 48, 44.4, "GDDR6", 864e9, 362e12, 733e12, 32e9, "NVIDIA L40S data sheet"),
    Gpu("l4", "NVIDIA L4", 24, 22.0, "GDDR6", 300e9, 121e12, 242e12, 32e9, "NVIDIA L4 data sheet, halved for dense"),
    Gpu("a10g", "NVIDIA A10G", 24, 22.0, "GDDR6", 600e9, 70e12, None, 32e9,
        "NVIDIA A10G data sheet, 35 to 70 TFLOP/s; the A10's 125 is of another card"),
    Gpu("rtx3090", "NVIDIA GeForce RTX 3090", 24, 23.6, "GDDR6X", 936e9, 71e12, None, 32e9,
        "NVIDIA GA102 white paper"),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24, 23.6, "GDDR6X", 1.008e12, 165.2e12, 330.3e12, 32e9, _ADA),
    Gpu("rtx5090", "NVIDIA GeForce RTX 5090", 32, 31.3, "GDDR7", 1.792e12, 209.5e12, 419e12, 64e9, _BLACKWELL),
    # 8 TB/s by the data sheet; drivers report a bus of 7680 bits, that is 7.7 TB/s.
    Gpu("b200", "NVIDIA B200 SXM", 180, 178.3, "HBM3e", 8.0e12, 2250e12, 4500e12, 900e9,
        "NVIDIA Blackwell and HGX B200 data sheets"),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _ALL}
ALIASES = {
    "h100-sxm": "h100", "h200-sxm": "h200", "b200-sxm": "b200", "a100-80": "a100", "a100-80gb": "a100",
    "a100-40gb": "a100-40", "3090": "rtx3090", "4090": "rtx4090", "5090": "rtx5090", "rtx-3090": "rtx3090",
    "rtx-4090": "rtx4090", "rtx-5090": "rtx5090",
}  # fmt: skip


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The GPU called ``name``, with ``memory_gib`` in place of its own memory if given.

    Raises ``ValueError`` listing those that are known.
    """
    gpu = GPUS.get(ALIASES.get(name.lower(), name.lower()))
    if gpu is None:
        near = difflib.get_close_matches(name.lower(), [*GPUS, *ALIASES], 1, 0.6)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}{hint}")
    return gpu if memory_gib is None else replace(gpu, memory_gib=memory_gib)
