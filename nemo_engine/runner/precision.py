"""What an engine computes in: dtypes of activations and of the KV cache, and what is quantised while it loads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nemo_engine.checkpoint.checkpoint import Checkpoint
from nemo_engine.checkpoint.quant_config import Quantization, resolve_online
from nemo_engine.config import EngineConfig
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import Ops
from nemo_engine.ops.cpu import products
from nemo_engine.ops.cpu.packed import WIDENED_FROM, linear_widened
from nemo_engine.ops.quantize import FP8

_KV_DTYPES = {"fp8": FP8, "fp8_e4m3": FP8}


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of activations, and of keys and values; ``online``: what becomes FP8 while it loads.

    ``is_fp8``: some product has FP8 operands.
    """

    dtype: torch.dtype
    kv_dtype: torch.dtype
    online: Quantization | None
    is_fp8: bool


def resolve_precision(config: EngineConfig, checkpoint: Checkpoint, device: torch.device) -> Precision:
    """What ``config`` and ``checkpoint`` come to on ``device``. Raises ``ValueError`` where they conflict."""
    stored = checkpoint.quantization
    dtype = resolve_dtype(config.dtype, checkpoint.model_config.dtype, device)
    online = resolve_online(config, stored)
    is_fp8 = online is not None or (stored is not None and stored.activations != "none")
    if is_fp8 and dtype is torch.float64:
        raise ValueError(
            "dtype 'float64' computes nothing in FP8, and the model is quantised: use 'float32' or 'bfloat16'"
        )
    return Precision(dtype, _resolve_kv_dtype(config.kv_cache_dtype, stored, dtype), online, is_fp8)


def use_wide_reductions() -> None:
    """Have cuBLAS add the parts of a split product in fp32, in this process; torch lets it add them in the activations'
    dtype by default.

    Otherwise the rounding of a bf16 product would depend on the algorithm that its number of rows selects.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def bits_depend_on_threads_from(weights: NemoWeights, ops: Ops) -> float:
    """From how many tokens on a CPU multiplies in fp32, whose sums the number of threads splits; infinity if never.

    FP8 is computed so too.
    """
    if weights.embed_tokens.dtype.itemsize > 2 or isinstance(weights.layers[0].qkv, Fp8Linear):
        return 0
    is_plain = ops.linear is products.linear and weights.lm_head.weight is weights.embed_tokens
    return WIDENED_FROM if is_plain or ops.linear is linear_widened else math.inf


def resolve_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of dense weights and activations; "auto" is the checkpoint's."""
    dtype = getattr(torch, checkpoint_dtype if name == "auto" else name)
    assert isinstance(dtype, torch.dtype)
    if dtype is torch.float64 and device.type != "cpu":
        raise ValueError(f"dtype 'float64' works on the CPU only, got device {str(device)!r}")
    return dtype


def _resolve_kv_dtype(name: str, stored: Quantization | None, dtype: torch.dtype) -> torch.dtype:
    """ "auto" is FP8 where the checkpoint was made for it, else the activations' dtype."""
    if name == "auto":
        return FP8 if stored is not None and stored.kv_cache else dtype
    kv_dtype = _KV_DTYPES.get(name) or getattr(torch, name)
    assert isinstance(kv_dtype, torch.dtype)
    if kv_dtype not in (FP8, dtype):
        raise ValueError(
            f"kv_cache_dtype {name!r} conflicts with the dtype of the activations, "
            f"{str(dtype).removeprefix('torch.')}: use 'auto' or 'fp8'"
        )
    return kv_dtype
