"""A request of exactly 131,072 tokens: chunked prefill, decode, and logits equal to a dense computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemo_engine.engine import Engine
from nemo_engine.sampling_params import SamplingParams
from tests.checkpoints import StateDict, random_state_dict, tiny_config, write_hf

CONTEXT = 131072
NEW_TOKENS = 3
CONFIG = tiny_config(num_layers=2, num_heads=1, num_kv_heads=1, head_dim=8, hidden_size=16, intermediate_size=24)


def dense_last_logits(state: StateDict, token_ids: list[int]) -> torch.Tensor:
    """Logits (V,) after the last token, written out directly: the whole sequence at once, no cache, no pages."""
    config = CONFIG

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * state[name]

    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(len(token_ids), dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (heads, S, D)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = state["model.embed_tokens.weight"][torch.tensor(token_ids)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        y = norm(x, prefix + "input_layernorm.weight")
        q, k, v = (
            F.linear(y, state[f"{prefix}self_attn.{name}_proj.weight"])
            .view(len(token_ids), -1, config.head_dim)
            .transpose(0, 1)
            for name in "qkv"
        )
        q, k = rotate(q), rotate(k)
        is_last = layer == config.num_layers - 1
        if is_last:  # of the last layer, only the last token's output counts
            q, x = q[:, -1:], x[-1:]
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=not is_last)[0]
        x = x + F.linear(attended.transpose(0, 1).flatten(1), state[prefix + "self_attn.o_proj.weight"])
        y = norm(x, prefix + "post_attention_layernorm.weight")
        gate, up = (F.linear(y, state[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, state[prefix + "mlp.down_proj.weight"])
    return F.linear(norm(x[-1], "model.norm.weight"), state["lm_head.weight"])


def test_a_request_of_131072_tokens(tmp_path: Path) -> None:
    state = random_state_dict(CONFIG, seed=2)
    write_hf(tmp_path, CONFIG, state)
    prompt = torch.randint(0, 97, (CONTEXT - NEW_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1)
    with Engine(tmp_path, device="cpu", dtype="float32", max_logprobs=-1, max_num_batched_tokens=8192) as engine:
        assert engine.max_model_len == CONTEXT
        (output,) = engine.generate({"prompt_token_ids": prompt}, params)
        with pytest.raises(ValueError, match="131073 tokens: more than max_model_len 131072"):
            engine.generate({"prompt_token_ids": [*prompt, 5]}, params)
        assert engine.stats().num_free_pages == engine.stats().num_pages
    completion = output.outputs[0]
    assert len(output.prompt_token_ids) + len(completion.token_ids) == CONTEXT
    # The last token was chosen from the logits at position 131070, the last one whose key and value are computed.
    expected = dense_last_logits(state, prompt + completion.token_ids[:-1]).log_softmax(-1)
    assert completion.logprobs is not None
    ours = torch.tensor([completion.logprobs[-1][token_id].logprob for token_id in range(97)])
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)
    assert completion.token_ids[-1] == int(expected.argmax())
