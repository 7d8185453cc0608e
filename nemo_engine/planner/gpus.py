"""The GPUs that plans are made for: what their data sheets promise, and what of their memory a process is given.

Rates are dense (data sheets like to print those with sparsity, twice as high) and of tensor cores that add in fp32.
Marketing gigabytes are neither 1e9 bytes nor what is usable, so ``memory_gib`` is the total that the driver reports to
a process on such a card.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

# What a CUDA context and the libraries' kernels take before anything is allocated; an H200 then has 139 GiB free.
CONTEXT_GIB = 0.6


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. ``fp8_flops_per_s`` is None where tensor cores know no FP8.

    ``link_bytes_per_s``: to the other cards of a machine, one way.

    ``source`` is where rates and bandwidth can be read.
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
        """What is free for an engine that has the card to itself."""
        return int((self.memory_gib - CONTEXT_GIB) * (1 << 30))


_IMAGES, _CENTER = "https://images.nvidia.com/aem-dam", "https://www.nvidia.com/en-us/data-center"
_AMPERE = f"{_IMAGES}/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"
_ADA = f"{_IMAGES}/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = f"{_IMAGES}/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
# As built, 180 GB at 7.7 TB/s; what was announced, 192 GB at 8 TB/s, was never sold.
_B200 = "https://lenovopress.lenovo.com/lp2226-thinksystem-nvidia-b200-180gb-1000w-gpu"
# GeForce cards: products that add in fp32, half of what they do with fp16 sums. The pages of H200, H100 and L4 print
# rates with sparsity, which are halved here. The A10G is another card than the A10 and has not its 125 TFLOP/s.
_ALL = (
    Gpu("h200", "NVIDIA H200 SXM", 141, 139.8, "HBM3e", 4.8e12, 989e12, 1979e12, 450e9, f"{_CENTER}/h200"),
    Gpu("h100", "NVIDIA H100 SXM", 80, 79.1, "HBM3", 3.35e12, 989e12, 1979e12, 450e9, f"{_CENTER}/h100"),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", 80, 79.1, "HBM2e", 2.0e12, 756e12, 1513e12, 64e9,
        "NVIDIA H100 data sheet, column PCIe; https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html"),
    Gpu("a100", "NVIDIA A100 80GB SXM", 80, 79.1, "HBM2e", 2.039e12, 312e12, None, 300e9, f"{_CENTER}/a100"),
    Gpu("a100-40", "NVIDIA A100 40GB SXM", 40, 39.4, "HBM2", 1.555e12, 312e12, None, 300e9,
        f"{_IMAGES}/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"),
    Gpu("l40s", "NVIDIA L40S", 48, 44.4, "GDDR6", 864e9, 362e12, 733e12, 32e9, f"{_CENTER}/l40s"),
    Gpu("l4", "NVIDIA L4", 24, 22.0, "GDDR6", 300e9, 121e12, 242e12, 32e9, f"{_CENTER}/l4"),
    Gpu("a10g", "NVIDIA A10G", 24, 22.0, "GDDR6", 600e9, 70e12, None, 32e9, _A10G),
    Gpu("rtx3090", "NVIDIA GeForce RTX 3090", 24, 23.6, "GDDR6X", 936e9, 71e12, None, 32e9, _AMPERE),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24, 23.6, "GDDR6X", 1.008e12, 165.2e12, 330.3e12, 32e9, _ADA),
    Gpu("rtx5090", "NVIDIA GeForce RTX 5090", 32, 31.3, "GDDR7", 1.792e12, 209.5e12, 419e12, 64e9, _BLACKWELL),
    Gpu("b200", "NVIDIA B200 SXM", 180, 178.3, "HBM3e", 7.7e12, 2250e12, 4500e12, 900e9, _B200),
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
