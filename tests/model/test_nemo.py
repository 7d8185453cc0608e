"""The forward pass against transformers' ``MistralForCausalLM`` with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.config import ModelConfig
from nemo_engine.model.nemo import Nemo
from nemo_engine.ops import Ops, Site
from nemo_engine.ops.rope import rope_table
from nemo_engine.startup_log import StartupLog
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.model.forward import PAGE, our_logits

CONFIGS: dict[str, dict[str, Any]] = {
    "1:1": dict(num_layers=1, num_heads=3, num_kv_heads=3),
    "2:1, odd layers": dict(num_layers=3, intermediate_size=41, vocab_size=131),
    "4:1, tied": dict(num_heads=4, num_kv_heads=1, head_dim=12, tie_word_embeddings=True),
    "8:1, wide heads, theta 1e6": dict(num_heads=8, num_kv_heads=1, head_dim=32, rope_theta=1e6, rms_norm_eps=1e-6),
}


def wide_norm(self: Any, x: Tensor) -> Tensor:
    """transformers' MistralRMSNorm, with fp64 left as it is instead of narrowed to fp32."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * normed


def load_both(
    path: Path, config: ModelConfig, dtype: torch.dtype, prefer: dict[str, str]
) -> tuple[Nemo, torch.nn.Module]:
    transformers = pytest.importorskip("transformers")
    write_hf(path, config, random_state_dict(config, seed=5))
    reference = transformers.MistralForCausalLM.from_pretrained(path, dtype=dtype).eval()
    site = Site.of(config, PAGE, dtype, torch.device("cpu"))
    weights = load_weights(open_checkpoint(path), config, dtype=dtype, progress=False, startup_log=StartupLog())
    return Nemo(config, weights, Ops.select(site, prefer), max_len=256), reference


def prompts_of(config: ModelConfig) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = (1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5)
    return [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("attention", ["torch", "semantics"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, bound: float, attention: str
) -> None:
    config = tiny_config(**CONFIGS[name])
    model, reference = load_both(tmp_path, config, dtype, {"paged_attention": attention})
    if dtype == torch.float64:
        monkeypatch.setattr("transformers.models.mistral.modeling_mistral.MistralRMSNorm.forward", wide_norm)
    prompts = prompts_of(config)
    for prompt, ours in zip(prompts, our_logits(model, prompts)):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert ours.dtype == dtype and ours.shape == (len(prompt), config.vocab_size)
        torch.testing.assert_close(ours, expected, rtol=0, atol=bound * expected.abs().max().item())


def test_bf16_is_as_accurate_as_transformers(tmp_path: Path) -> None:
    config = tiny_config(num_layers=3, hidden_size=64, num_heads=8, head_dim=16)
    model, reference = load_both(tmp_path, config, torch.bfloat16, {})
    exact = reference.__class__.from_pretrained(tmp_path, dtype=torch.bfloat16).double().eval()
    prompts = prompts_of(config)
    ours_error = theirs_error = 0.0
    for prompt, ours in zip(prompts, our_logits(model, prompts)):
        assert ours.dtype == torch.bfloat16
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            right = exact(ids).logits[0]
            theirs_error += (reference(ids).logits[0] - right).square().sum().item()
        ours_error += (ours - right).square().sum().item()
    assert ours_error <= 1.1 * theirs_error


def test_rope_table_is_exact_to_fp32_over_the_whole_context() -> None:
    table = rope_table(128, 1e6, 131072, torch.device("cpu"))
    assert table.shape == (131072, 2, 64) and table.dtype == torch.float32
    for position in (0, 1, 4095, 131071):
        # The angle is defined in fp32, so that it is transformers' own; its cosine and sine are then exact to rounding.
        frequency = 1.0 / (1e6 ** (torch.arange(0, 128, 2).float() / 128))
        angle = (torch.tensor(float(position)) * frequency).double()
        torch.testing.assert_close(table[position], torch.stack([angle.cos(), angle.sin()]).float(), rtol=0, atol=1e-7)
