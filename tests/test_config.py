"""What the two configurations accept and refuse, each refusal with its words."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.config import EngineConfig, ModelConfig, resolve_max_model_len
from tests.helpers.checkpoints import hf_config, mistral_params, tiny_config

# The configurations as published.
NEMO_HF = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 1024000, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 131072,
}  # fmt: skip
NEMO_MISTRAL = {
    "dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "rope_theta": 1000000.0, "norm_eps": 1e-05, "vocab_size": 131072,
}  # fmt: skip
MINITRON_HF = NEMO_HF | {"hidden_size": 4096, "intermediate_size": 11520, "max_position_embeddings": 8192}


def test_nemo_from_both_layouts() -> None:
    hf, mistral = ModelConfig.from_hf(NEMO_HF), ModelConfig.from_mistral(NEMO_MISTRAL)
    assert (hf.q_size, hf.kv_size, hf.hidden_size, hf.head_dim) == (4096, 1024, 5120, 128)
    assert hf.kv_bytes_per_token(2) == 163840
    assert (hf.dtype, hf.bos_token_id, hf.eos_token_ids) == ("bfloat16", 1, (2,))
    assert dataclasses.replace(hf, max_position_embeddings=131072) == mistral


def test_siblings() -> None:
    minitron = ModelConfig.from_hf(MINITRON_HF)
    assert (minitron.hidden_size, minitron.intermediate_size, minitron.q_size) == (4096, 11520, 4096)
    seven = {k: v for k, v in NEMO_HF.items() if k != "head_dim"} | {"hidden_size": 4096, "vocab_size": 32768}
    with pytest.raises(ValueError, match=r'config.json has no head_dim: .*add "head_dim"'):
        ModelConfig.from_hf(seven)
    assert ModelConfig.from_hf(seven | {"head_dim": 128}).vocab_size == 32768


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"bos_token_id": None, "eos_token_ids": ()}])
def test_round_trip(overrides: dict[str, Any]) -> None:
    config = tiny_config(**overrides)
    assert ModelConfig.from_hf(hf_config(config)) == config
    mistral = ModelConfig.from_mistral(mistral_params(config))
    assert dataclasses.replace(mistral, dtype="float32", bos_token_id=config.bos_token_id,
                               eos_token_ids=config.eos_token_ids) == config  # fmt: skip


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in NEMO_HF.items() if key not in keys}


@pytest.mark.parametrize(
    "data",
    [
        without("rope_theta") | {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},
        without("torch_dtype") | {"dtype": "bfloat16"},
        NEMO_HF | {"rope_scaling": None, "quantization_config": None, "layer_types": ["full_attention"] * 40},
        NEMO_HF | {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 1e6}},
        NEMO_HF | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False},
        without("architectures", "model_type", "hidden_act", "tie_word_embeddings", "sliding_window", "bos_token_id",
                "eos_token_id"),
        NEMO_HF | {"torch_dtype": "torch.bfloat16"},
    ],
)  # fmt: skip
def test_other_ways_to_write_nemo(data: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(data) == ModelConfig.from_hf(NEMO_HF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window is not supported: .*got 4096"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias is not supported, got True"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"architectures": ["MixtralForCausalLM"]}, r"architectures must hold MistralForCausalLM, got \['Mixtral"),
        ({"model_type": "mixtral"}, "model_type must be mistral"),
        ({"num_local_experts": 8}, "num_local_experts is not supported, got 8"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters has .*: full_attention"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is given twice and differs"),
        ({"rope_parameters": 7}, "rope_parameters must be an object, got 7"),
        ({"rope_theta": None}, "config.json has no rope_theta, neither"),
        ({"rope_theta": "1e6"}, "rope_theta must be a number, got '1e6'"),
        ({"rope_theta": 0}, "rope_theta must be finite and greater than 0, got 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be finite"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": True}, "hidden_size must be an integer, got True"),
        ({"hidden_size": 5120.0}, "hidden_size must be an integer, got 5120.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"num_key_value_heads": 5}, r"num_heads must be a multiple of num_kv_heads \(5\), got 32"),
        ({"head_dim": 127}, "head_dim must be even"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"torch_dtype": "int8"}, "dtype must be one of .*got 'int8'"),
        ({"eos_token_id": 131072}, "config.json: eos_token_id must be from 0 to 131071, got 131072"),
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id must be an integer, got '</s>'"),
        ({"bos_token_id": -1}, "bos_token_id must be from 0 to 131071, got -1"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must all be full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported, got 0.5"),
    ],
)
def test_refused_hf(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_hf(NEMO_HF | change)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 4096}, "params.json: sliding_window is not supported, got 4096"),
        ({"_sliding_window": 32768}, "params.json: _sliding_window is not supported"),
        ({"moe": {"num_experts": 8}}, "params.json: moe is not supported"),
        ({"head_dim": None}, "params.json has no head_dim"),
        ({"rope_theta": None}, "params.json has no rope_theta"),
        ({"n_layers": "40"}, "params.json: n_layers must be an integer, got '40'"),
        ({"max_seq_len": 0}, "params.json: max_seq_len must be at least 1"),
    ],
)
def test_refused_mistral(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_mistral(NEMO_MISTRAL | change)


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [9, 2]}, (2, 9)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {}, ()),
    ],
)
def test_end_of_sequence_ids(own: Any, generation: dict[str, Any] | None, expected: tuple[int, ...]) -> None:
    config = ModelConfig.from_hf(NEMO_HF | {"eos_token_id": own}, generation_config=generation)
    assert config.eos_token_ids == expected


@pytest.mark.parametrize("data", [[], "text", None])
def test_not_an_object(data: Any) -> None:
    with pytest.raises(ValueError, match="config.json must hold a JSON object"):
        ModelConfig.from_hf(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of 'auto', 'bfloat16', .*got 'int8'"),
        ({"dtype": None}, "dtype must be one of .*got None"),
        ({"max_model_len": 0}, 'max_model_len must be at least 1, or "auto", got 0'),
        ({"max_model_len": "long"}, "max_model_len must be an integer, got 'long'"),
        ({"max_model_len": True}, "max_model_len must be an integer, got True"),
        ({"max_model_len": 2048.0}, "max_model_len must be an integer, got 2048.0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 63},
         r"max_num_batched_tokens must be at least max_num_seqs \(64\).*got 63"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens must be at least 1, got -1"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be true or false, got 1"),
        ({"enforce_eager": None}, "enforce_eager must be true or false"),
        ({"skip_tokenizer_init": "yes"}, "skip_tokenizer_init must be true or false"),
        ({"page_size": 8}, "page_size must be from 16 to 256, got 8"),
        ({"page_size": 512}, "page_size must be from 16 to 256, got 512"),
        ({"page_size": 48}, "page_size must be a power of two from 16 to 256, got 48"),
        ({"page_size": 64.0}, "page_size must be an integer, got 64.0"),
        ({"kv_cache_gib": 0}, "kv_cache_gib must be finite and greater than 0, got 0"),
        ({"kv_cache_gib": float("inf")}, "kv_cache_gib must be finite"),
        ({"kv_cache_gib": "4"}, "kv_cache_gib must be a number, got '4'"),
        ({"kv_cache_gib": 1.0, "num_kv_pages": 8}, "kv_cache_gib and num_kv_pages both set .*got 1.0 and 8"),
        ({"num_kv_pages": 0}, "num_kv_pages must be at least 1, got 0"),
        ({"num_kv_pages": True}, "num_kv_pages must be an integer, got True"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of 'auto', 'fp8', .*, got 'int4'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype must be one of .*, got 'fp8_e5m2'"),
        ({"quantization": "awq"}, "quantization must be one of None, 'fp8', 'fp8_block', got 'awq'"),
        ({"quantize_lm_head": 1}, "quantize_lm_head must be true or false, got 1"),
        ({"load_format": "pt"}, "load_format must be one of 'auto', 'dummy', got 'pt'"),
        ({"device": "tpu"}, "device must be one of 'auto', 'cpu', 'cuda', got 'tpu'"),
        ({"prefer": ["rms_norm"]}, "prefer must map names of operations"),
        ({"prefer": {"rms_norm": 1}}, "prefer must map names of operations"),
        ({"pipeline_depth": 3}, "pipeline_depth must be from 1 to 2, got 3"),
        ({"pipeline_depth": 0}, "pipeline_depth must be from 1 to 2, got 0"),
        ({"seed": -1}, "seed must be from 0 to 18446744073709551615, got -1"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"max_logprobs": -2}, "max_logprobs must be at least 0, or -1 for the whole vocabulary, got -2"),
        ({"tokenizer": ""}, "tokenizer must be a non-empty string"),
        ({"revision": 3}, "revision must be a non-empty string, got 3"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy must be one of 'fcfs', 'priority', got 'lifo'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size above 1 is not supported yet, got 2"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("options", "tokens", "on_cpu", "on_cuda"),
    [
        ({}, 2048, 1, 2),
        ({"max_num_seqs": 5000}, 5000, 1, 2),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 8, "pipeline_depth": 2}, 8, 2, 2),
        ({"max_num_batched_tokens": 100_000, "pipeline_depth": 1}, 100_000, 1, 1),
    ],
)
def test_defaults_of_a_step(options: dict[str, Any], tokens: int, on_cpu: int, on_cuda: int) -> None:
    config = EngineConfig(**options)
    assert (config.tokens_per_step, config.steps_in_flight("cpu")) == (tokens, on_cpu)
    assert config.steps_in_flight("cuda") == on_cuda


def test_unknown_options_and_changes() -> None:
    with pytest.raises(ValueError, match="gpu_memory_utilization.*kv_cache_gib"):
        EngineConfig(gpu_memory_utilization=0.9)  # type: ignore[call-arg]
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    prefer = {"rms_norm": "torch"}
    config = EngineConfig(prefer=prefer, tokenizer=Path("a/tekken.json"))  # type: ignore[arg-type]
    prefer["rms_norm"] = "triton"
    assert (config.prefer, config.tokenizer) == ({"rms_norm": "torch"}, "a/tekken.json")


@pytest.mark.parametrize(
    ("claim", "asked", "expected", "warned"),
    [
        (1024000, None, 131072, True),
        (1024000, "auto", 131072, True),
        (1024000, 4096, 4096, False),
        (1024000, 131073, 131073, False),
        (1024000, 1024000, 1024000, False),
        (131072, None, 131072, False),
        (8192, None, 8192, False),
        (8192, 8192, 8192, False),
    ],
)
def test_context(claim: int, asked: Any, expected: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_config(max_position_embeddings=claim)
    with caplog.at_level(logging.WARNING, "nemo_engine"):
        assert resolve_max_model_len(model, EngineConfig(max_model_len=asked)) == expected
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == warned
    if warned:
        assert "1024000" in warnings[0] and "131072" in warnings[0]


def test_context_above_the_claim() -> None:
    with pytest.raises(ValueError, match=r"max_model_len must be at most .*\(8192\), got 8193"):
        resolve_max_model_len(tiny_config(max_position_embeddings=8192), EngineConfig(max_model_len=8193))
