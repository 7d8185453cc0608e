"""How long a step takes: each matrix product and each attention is bound by the bytes it reads or by its arithmetic.

A step reads all weights once, and every key and value of its requests. Its time is the sum of the layers' products, the
head, attention of decode rows, attention of prefill rows, element-wise work, and fixed costs. A decode step depends on
the number of its rows and the sum of their contexts alone, so a simulator can keep both up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_engine.config import ModelConfig
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import Gpu
from nemo_engine.planner.models import Formats

KERNELS_PER_LAYER = 7  # in a decode step: two norms, qkv, rope and append, attention, o, MLP in fused form
Chunk = tuple[int, int]  # a prefill row: position of its first token, number of tokens


class StepCost(Protocol):
    """The cost of a step in seconds on the device, and on the host, which overlaps if two steps are in flight."""

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        """(seconds, seconds per token of context) of a step of ``num_decodes`` decode rows alone."""

    def step_seconds(self, num_decodes: int, sum_context: int, prefills: Sequence[Chunk], width: int = 1) -> float:
        """Seconds of any step. ``sum_context``: keys that decode rows of ``width`` tokens attend to, their own too."""

    def host_seconds(self, num_rows: int) -> float:
        """Seconds for planning and committing a step."""


def num_pairs(start: int, count: int) -> int:
    """Pairs of a query and a key in causal attention of ``count`` tokens that follow ``start`` computed ones."""
    return count * start + count * (count + 1) // 2


@dataclass(frozen=True, slots=True)
class Roofline:
    """``StepCost`` of one model on one GPU, or on each of several that share it.

    All rates are those that kernels reach, not those of the data sheet.
    """

    linear_params: float
    head_params: float
    linear_bytes: float
    head_bytes: float
    kv_bytes_per_token: float
    flops_per_pair: float
    elementwise_bytes_per_token: float
    weight_bytes_per_s: float
    kv_bytes_per_s: float
    copy_bytes_per_s: float
    linear_flops_per_s: float
    head_flops_per_s: float
    decode_flops_per_s: float
    prefill_flops_per_s: float
    link_seconds_per_token: float = 0.0
    fixed_seconds: float = 0.0
    host_fixed_seconds: float = 0.0
    host_seconds_per_row: float = 0.0

    @classmethod
    def of(
        cls, model: ModelConfig, formats: Formats, gpu: Gpu, efficiencies: Efficiencies, tensor_parallel_size: int = 1
    ) -> Roofline:
        """Raises ``ValueError`` for FP8 on a GPU without it."""
        fp8 = gpu.fp8_flops_per_s
        if fp8 is None and (formats.is_linear_fp8 or formats.is_head_fp8 or formats.is_kv_fp8):
            raise ValueError(
                f"FP8 needs compute capability 8.9, and {gpu.title} has less: use bf16 weights and KV cache"
            )
        ranks, e = tensor_parallel_size, efficiencies
        itemsize, kv_itemsize = formats.sizes.activations, formats.sizes.kv_cache
        hidden, inner = model.hidden_size, model.intermediate_size
        linear = model.num_layers * (hidden * (2 * model.q_size + 2 * model.kv_size) + 3 * hidden * inner)
        head = model.vocab_size * hidden
        width = 1 if formats.is_linear_fp8 else itemsize
        head_width = 1 if formats.is_head_fp8 else itemsize
        kv_bytes = model.kv_bytes_per_token(kv_itemsize) / min(ranks, model.num_kv_heads)
        copy = gpu.bytes_per_s * e.memory.value
        bf16 = gpu.bf16_flops_per_s * e.matmul_bf16.value
        fp8_rate = bf16 if fp8 is None else fp8 * e.matmul_fp8.value
        # Bytes that two norms, the gated activation, and rotary embedding with the write into the cache move through
        # memory.
        passes = 2 * (6 * hidden + hidden * width) + (4 * inner + inner * width) / ranks
        passes += 4 * (model.q_size + 2 * model.kv_size) / ranks
        reductions = 0 if ranks == 1 else 2 * model.num_layers
        kernels = model.num_layers * KERNELS_PER_LAYER * e.launch_us.value
        return cls(
            linear_params=linear / ranks,
            head_params=head / ranks,
            linear_bytes=linear * width / ranks,
            head_bytes=head * head_width / ranks,
            kv_bytes_per_token=kv_bytes,
            flops_per_pair=4 * model.q_size * model.num_layers / ranks,
            elementwise_bytes_per_token=model.num_layers * passes * e.elementwise.value,
            weight_bytes_per_s=copy * e.weights.value,
            kv_bytes_per_s=copy * (e.kv_fp8 if formats.is_kv_fp8 else e.kv_bf16).value,
            copy_bytes_per_s=copy,
            linear_flops_per_s=fp8_rate * e.linear_fp8.value if formats.is_linear_fp8 else bf16 * e.linear.value,
            head_flops_per_s=fp8_rate * e.linear_fp8.value if formats.is_head_fp8 else bf16 * e.linear.value,
            decode_flops_per_s=(fp8_rate if formats.is_kv_fp8 else bf16) * e.attention.value,
            prefill_flops_per_s=bf16 * e.attention.value,
            link_seconds_per_token=reductions * 2 * (ranks - 1) / ranks * hidden * itemsize / gpu.link_bytes_per_s,
            fixed_seconds=(e.gap_us.value + kernels + reductions * e.link_us.value) * 1e-6,
            host_fixed_seconds=e.host_us.value * 1e-6,
            host_seconds_per_row=e.host_us_per_request.value * 1e-6,
        )

    @property
    def context_seconds(self) -> float:
        """Seconds of one more token of context of one decode row."""
        return max(self.kv_bytes_per_token / self.kv_bytes_per_s, self.flops_per_pair / self.decode_flops_per_s)

    def _rows_seconds(self, num_tokens: int, num_sampled: int) -> float:
        """Seconds of everything but attention, for ``num_tokens`` rows of which ``num_sampled`` need logits."""
        linear = max(
            self.linear_bytes / self.weight_bytes_per_s, 2 * self.linear_params * num_tokens / self.linear_flops_per_s
        )
        head = max(
            self.head_bytes / self.weight_bytes_per_s, 2 * self.head_params * num_sampled / self.head_flops_per_s
        )
        traffic = self.elementwise_bytes_per_token / self.copy_bytes_per_s + self.link_seconds_per_token
        return linear + head + num_tokens * traffic + self.fixed_seconds

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        """See ``StepCost``."""
        return self._rows_seconds(num_decodes, num_decodes), self.context_seconds

    def step_seconds(self, num_decodes: int, sum_context: int, prefills: Sequence[Chunk], width: int = 1) -> float:
        """See ``StepCost``. A prefill row counts as one whose logits are computed; a decode row reads its keys once."""
        num_tokens = num_decodes * width
        attention = sum_context * max(
            self.kv_bytes_per_token / self.kv_bytes_per_s, width * self.flops_per_pair / self.decode_flops_per_s
        )
        for start, count in prefills:
            num_tokens += count
            attention += max(
                self.flops_per_pair * num_pairs(start, count) / self.prefill_flops_per_s,
                (start + count) * self.kv_bytes_per_token / self.kv_bytes_per_s,
            )
        return self._rows_seconds(num_tokens, num_decodes * width + len(prefills)) + attention

    def host_seconds(self, num_rows: int) -> float:
        """See ``StepCost``."""
        return self.host_fixed_seconds + num_rows * self.host_seconds_per_row
