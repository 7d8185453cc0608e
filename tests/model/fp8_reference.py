"""An FP8 model worked out in float64, step by step, with nothing of the engine: every product of FP8 numbers is
exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_engine.config import ModelConfig
from tests.helpers.checkpoints import StateDict
from tests.helpers.fp8_checkpoints import BLOCK, FP8


def to_fp8(x: Tensor) -> Tensor:
    """The nearest FP8 numbers, ties to even, saturated; in float64. By searching all 256, not by conversion."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    numbers = numbers[numbers.isfinite()].unique()
    x = x.clamp(-448, 448)
    above = torch.searchsorted(numbers, x).clamp(max=len(numbers) - 1)
    below = (above - 1).clamp(min=0)
    up, down = numbers[above] - x, x - numbers[below]
    # The even one of two neighbours has an even code: their codes follow one another within a sign.
    is_even_above = (numbers[above].to(torch.float32).to(FP8).view(torch.uint8) & 1) == 0
    return torch.where((up < down) | ((up == down) & is_even_above), numbers[above], numbers[below])


@dataclass
class Reference:
    """state: what the weights mean. others: static scales by module, of inputs and of keys and values.

    inputs: "static", "token", "block" or "none": how the inputs of projections are quantised. is_kv_fp8: keys and
    values are.
    """

    config: ModelConfig
    state: StateDict
    inputs: str
    others: StateDict = field(default_factory=dict)
    is_kv_fp8: bool = False

    def quantised(self, x: Tensor, module: str) -> Tensor:
        """The input of ``module`` as the product sees it."""
        if self.inputs == "none":
            return x
        if self.inputs == "static":
            scale = self.others[f"{module}.input_scale"].double()
            return to_fp8(x / scale) * scale
        size = BLOCK if self.inputs == "block" else x.shape[1]
        parts = []
        for part in x.split(size, dim=1):
            scale = part.abs().amax(1, keepdim=True) / 448
            parts.append(to_fp8(part / scale) * scale)
        return torch.cat(parts, 1)

    def project(self, x: Tensor, module: str) -> Tensor:
        return self.quantised(x, module) @ self.state[f"{module}.weight"].double().T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.config.rms_norm_eps) * self.state[name].double()

    def logits(self, ids: list[int]) -> Tensor:
        """(T, V) of one prompt."""
        config = self.config
        x = self.state["model.embed_tokens.weight"].double()[ids]
        half = config.head_dim // 2
        angles = torch.arange(len(ids)).double().outer(config.rope_theta ** -(torch.arange(half).double() / half))
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}"
            normed = self.norm(x, f"{name}.input_layernorm.weight")
            q, k, v = (self.project(normed, f"{name}.self_attn.{letter}_proj") for letter in "qkv")
            q, k = (self.rotated(part.view(len(ids), -1, config.head_dim), angles) for part in (q, k))
            k, v = (
                self.cached(k, f"{name}.self_attn.k_scale"),
                self.cached(v.view(len(ids), -1, config.head_dim), f"{name}.self_attn.v_scale"),
            )
            group = config.num_heads // config.num_kv_heads
            k, v = (part.repeat_interleave(group, 1).transpose(0, 1) for part in (k, v))
            scores = q.transpose(0, 1) @ k.transpose(1, 2) * config.head_dim**-0.5
            scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
            x = x + self.project(mixed, f"{name}.self_attn.o_proj")
            normed = self.norm(x, f"{name}.post_attention_layernorm.weight")
            gate, up = (self.project(normed, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            x = x + self.project(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj")
        return self.norm(x, "model.norm.weight") @ self.state["lm_head.weight"].double().T

    def cached(self, x: Tensor, name: str) -> Tensor:
        """Keys or values (T, heads, D) as they come back from the cache."""
        if not self.is_kv_fp8:
            return x
        scale = self.others.get(name, torch.ones(())).double().reshape(-1, 1)
        return to_fp8(x / scale) * scale

    @staticmethod
    def rotated(x: Tensor, angles: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
