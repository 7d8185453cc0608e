"""A decoder in float64 and the rules of sampling, written from their definitions in numpy: what every answer of an
engine is held to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from runner.test_sampler import reference_gumbel

from nemo_engine import SamplingParams
from nemo_engine.config import ModelConfig

Array = NDArray[np.float64]

MAX_LEN = 2048  # tokens of a sequence


class Model:
    """Weights of one checkpoint in float64, under Hugging Face's names."""

    def __init__(self, config: ModelConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.config = config
        self.weights = {name: tensor.to(dtype).double().numpy() for name, tensor in state.items()}
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        # Angles in fp32, as the family defines them.
        angles = torch.arange(MAX_LEN).float()[:, None] * (1.0 / (config.rope_theta**exponents))
        self.cos, self.sin = angles.cos().double().numpy()[:, None], angles.sin().double().numpy()[:, None]

    def turned(self, x: Array, first: int) -> Array:
        """Rotary embedding of (T, heads, D) from position ``first`` on; the halves of a head are the pairs."""
        cos, sin = self.cos[first : first + len(x)], self.sin[first : first + len(x)]
        low, high = np.split(x, 2, axis=2)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)

    def norm(self, x: Array, name: str) -> Array:
        """RMSNorm of the last axis."""
        scaled: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return scaled * self.weights[f"{name}.weight"]


class Sequence64:
    """One sequence of tokens: logits after each of them, and the keys and values of each layer, computed once."""

    def __init__(self, model: Model, is_kv_fp8: bool) -> None:
        self.model = model
        self.is_kv_fp8 = is_kv_fp8
        self.token_ids: list[int] = []
        self.logits: list[Array] = []
        shape = (0, model.config.num_kv_heads, model.config.head_dim)
        self.keys = [np.zeros(shape) for _ in range(model.config.num_layers)]  # (T, heads, D) each
        self.values = [np.zeros(shape) for _ in range(model.config.num_layers)]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Compute ``token_ids``, which follow those before."""
        model, config, w = self.model, self.model.config, self.model.weights
        first, count = len(self.token_ids), len(token_ids)
        if not count:
            return
        x = w["model.embed_tokens.weight"][list(token_ids)]
        is_future = np.arange(first + count)[None] > np.arange(first, first + count)[:, None]
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}"
            h = model.norm(x, f"{name}.input_layernorm")
            q, k, v = (
                (h @ w[f"{name}.self_attn.{part}_proj.weight"].T).reshape(count, -1, config.head_dim) for part in "qkv"
            )
            q, k = model.turned(q, first), model.turned(k, first)
            if self.is_kv_fp8:
                k, v = rounded(k), rounded(v)
            self.keys[layer] = keys = np.concatenate([self.keys[layer], k])
            self.values[layer] = values = np.concatenate([self.values[layer], v])
            group = config.num_heads // config.num_kv_heads
            scores = np.einsum("qhgd,khd->hgqk", q.reshape(count, -1, group, config.head_dim), keys)
            scores = np.where(is_future, -np.inf, scores / math.sqrt(config.head_dim))
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            mixed = np.einsum("hgqk,khd->qhgd", scores, values).reshape(count, -1)
            x = x + mixed @ w[f"{name}.self_attn.o_proj.weight"].T
            h = model.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (h @ w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (gate / (1.0 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
        head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        self.logits.extend(model.norm(x, "model.norm") @ head.T)
        self.token_ids.extend(token_ids)


def rounded(x: Array) -> Array:
    """To FP8 (e4m3) and back, saturated."""
    wide = torch.from_numpy(np.clip(x, -448.0, 448.0))
    return wide.to(torch.float8_e4m3fn).double().numpy()


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the probabilities."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def edited(
    logits: Array,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: frozenset[int],
    bad_words: Sequence[tuple[int, ...]],
    allowed: NDArray[np.bool_] | None,
    without_token: range,
) -> Array:
    """The logits as a token is chosen from: masks, biases, penalties. ``allowed`` is a grammar's mask."""
    scores = logits.copy()
    if allowed is not None:
        scores[~allowed] = -np.inf
    if params.allowed_token_ids is not None:
        is_other = np.ones(len(scores), bool)
        is_other[list(params.allowed_token_ids)] = False
        scores[is_other] = -np.inf
    elif allowed is None:
        for token in without_token:
            if token not in (params.logit_bias or {}):
                scores[token] = -np.inf
    for word in bad_words:
        start = len(word) - 1
        if len(output) >= start and tuple(output[len(output) - start :]) == word[:-1]:
            scores[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        scores[list(stop_ids)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    factor = params.repetition_penalty
    for token in {*prompt, *output}:
        if scores[token] > -np.inf:
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return scores


def complaint(scores: Array, token: int, params: SamplingParams, seed: int | None, position: int, slack: float) -> str:
    """Why ``token`` cannot have been chosen from ``scores``, whose logits are known to within ``slack``; "" if it can.

    ``position`` is the index of the token in its request. seed None: only whether the token may be drawn is known.
    """
    best = scores.max()
    if scores[token] == -np.inf:
        return "is masked"
    if params.is_greedy:
        return "" if scores[token] >= best - 2 * slack else f"has {scores[token]}, the likeliest {best}"
    temperature = 1.0 if params.temperature is None else params.temperature
    near = 1e-6 + 2 * slack / temperature
    distance = (best - scores) / temperature
    sure, possible = _kept(distance, params, near)
    if not possible[token]:
        return f"is cut off at a distance of {distance[token]}"
    if seed is None:
        return ""
    values = reference_gumbel(seed, position, len(scores)) - distance
    rival = values[sure].max() if sure.any() else -np.inf
    return "" if values[token] >= rival - 1e-4 - near else f"has the score {values[token]}, another {rival}"


def _kept(distance: Array, params: SamplingParams, near: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The tokens that min_p, top_k and top_p keep for sure, and those that they may keep, if distances are known to
    within ``near``.
    """
    sure, possible = distance < np.inf, distance < np.inf
    limits = [-math.log(params.min_p)] if params.min_p > 0 else []
    if params.top_k and params.top_k < len(distance):
        limits.append(float(np.sort(distance)[params.top_k - 1]))
    for limit in limits:
        sure &= distance < limit - near
        possible &= distance <= limit + near
    if params.top_p < 1:
        mass = np.exp(-distance)
        order = np.argsort(distance)
        far = distance[order]
        before = np.concatenate([[0.0], np.cumsum(mass[order])])  # mass of the nearest i tokens

        def mass_within(limit: Array) -> Array:
            return np.asarray(before[np.searchsorted(far, limit, side="right")])

        most, least = mass[possible].sum(), max(mass[sure].sum(), mass.max())
        possible &= mass_within(distance - near) - mass * 0 < params.top_p * most * (1 + near) + 1e-9
        sure &= mass_within(distance + near) < params.top_p * least * (1 - near) - 1e-9
    return sure, possible
