"""A request of exactly 131,072 tokens: chunked prefill, decode, and log-probabilities equal to a dense computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemo_engine.engine.engine import Engine
from nemo_engine.sampling_params import SamplingParams
from tests.helpers.checkpoints import StateDict, random_state_dict, tiny_config, write_hf

CONTEXT = 131072
NEW_TOKENS = 3
EVERY = 1021  # of the prompt's positions, the last 20 beside them, are looked at
# One layer: what attention gives a position is then seen in that position's log-probabilities, and keys need no
# attention.
CONFIG = tiny_config(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, hidden_size=16, intermediate_size=24)


def dense_logits(state: StateDict, token_ids: list[int], positions: torch.Tensor) -> torch.Tensor:
    """Logits (P, V) after the tokens at ``positions`` (P,), written out directly: no chunks, no cache, no pages."""
    config = CONFIG

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * state[name]

    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)

    def rotate(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:  # (S, D)
        angles = at.float()[:, None] * frequencies
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    prefix = "model.layers.0."
    x = state["model.embed_tokens.weight"][torch.tensor(token_ids)]
    y = norm(x, prefix + "input_layernorm.weight")
    q, k, v = (F.linear(y, state[f"{prefix}self_attn.{name}_proj.weight"]) for name in "qkv")
    everywhere = torch.arange(len(token_ids))
    scores = rotate(q[positions], positions) @ rotate(k, everywhere).T / config.head_dim**0.5
    attended = scores.masked_fill(everywhere > positions[:, None], -torch.inf).softmax(-1) @ v
    x = x[positions] + F.linear(attended, state[prefix + "self_attn.o_proj.weight"])
    y = norm(x, prefix + "post_attention_layernorm.weight")
    gate, up = (F.linear(y, state[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    x = x + F.linear(F.silu(gate) * up, state[prefix + "mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm.weight"), state["lm_head.weight"])


def test_a_request_of_131072_tokens(tmp_path: Path) -> None:
    state = random_state_dict(CONFIG, seed=2)
    write_hf(tmp_path, CONFIG, state)
    prompt = torch.randint(0, 97, (CONTEXT - NEW_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1, prompt_logprobs=0)
    with Engine(tmp_path, device="cpu", dtype="float32", max_logprobs=-1, max_num_batched_tokens=8192) as engine:
        assert engine.max_model_len == CONTEXT
        (output,) = engine.generate({"prompt_token_ids": prompt}, params)
        with pytest.raises(ValueError, match="131073 tokens: more than max_model_len 131072"):
            engine.generate({"prompt_token_ids": [*prompt, 5]}, params)
        assert engine.stats().num_free_pages == engine.stats().num_pages
    completion = output.outputs[0]
    token_ids = prompt + completion.token_ids
    assert len(token_ids) == CONTEXT and completion.logprobs is not None and output.prompt_logprobs is not None
    # The last token was chosen from the logits at position 131070, the last one whose key and value are computed.
    positions = torch.tensor([*range(0, len(prompt) - 20, EVERY), *range(len(prompt) - 20, CONTEXT - 1)])
    expected = dense_logits(state, token_ids, positions).log_softmax(-1)
    for position, values in zip(positions.tolist(), expected, strict=True):
        if position < len(prompt) - 1:
            entry, following = output.prompt_logprobs[position + 1], token_ids[position + 1]
            assert entry is not None and abs(entry[following].logprob - float(values[following])) < 2e-3, position
        else:
            entry = completion.logprobs[position - len(prompt) + 1]
            ours = torch.tensor([entry[token_id].logprob for token_id in range(97)])
            torch.testing.assert_close(ours, values, atol=2e-3, rtol=0)
            assert token_ids[position + 1] == int(values.argmax())
