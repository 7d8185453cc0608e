"""The whole engine on a small model with every operation that has one in CUDA C++, emulated on the CPU, against the
torch path; in bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine import Engine, SamplingParams
from nemo_engine.ops import ALL_OPS
from tests.emulation.library import emulated
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf

CONFIG = tiny_config(
    num_layers=2, num_heads=4, num_kv_heads=1, head_dim=128, hidden_size=128, intermediate_size=256, vocab_size=512,
    dtype="bfloat16", eos_token_ids=(),
)  # fmt: skip
PROMPTS = [{"prompt_token_ids": [(7 * i + length) % 512 for i in range(length)]} for length in (5, 22, 1)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=5, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=4, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, seed=4, max_tokens=5, logit_bias={5: -1.0}),
]
IN_CUDA = {op.name for op in ALL_OPS for impl in op.impls if impl.name == "cuda"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = random_state_dict(CONFIG, seed=6, dtype=torch.bfloat16)
    return write_hf(tmp_path_factory.mktemp("model"), CONFIG, state)


def run(model: Path, **options: Any) -> tuple[list[list[int]], list[float], dict[str, str]]:
    """Tokens, log-probabilities of the first prompt's, and what served each operation; prompts prefilled in chunks of
    16.
    """
    engine = Engine(
        str(model),
        device="cpu",
        dtype="bfloat16",
        page_size=16,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        **options,
    )
    try:
        served = {choice.op: choice.chosen for choice in engine._core.runner._step.ops.choices}
        first, *others = [output.outputs[0] for output in engine.generate(PROMPTS, PARAMS)]
    finally:
        engine.close()
    logprobs = [entry[token].logprob for entry, token in zip(first.logprobs or [], first.token_ids, strict=True)]
    return [list(output.token_ids) for output in (first, *others)], logprobs, served


FP8: dict[str, Any] = {"quantization": "fp8", "kv_cache_dtype": "fp8"}


# In FP8 a sum in another order may round to the other of two neighbours, which lie an eighth apart.
@pytest.mark.parametrize(("options", "tolerance"), [({}, 0.05), (FP8, 0.2)], ids=["bf16", "fp8"])
def test_the_engine_in_cuda_equals_the_torch_path(
    emulated_library: Any, model: Path, options: dict[str, Any], tolerance: float
) -> None:
    expected, expected_logprobs, _ = run(model, **options)
    with emulated(emulated_library):
        emulated_library.emulator.clear_launches()
        ours, logprobs, served = run(model, prefer={"*": "cuda"}, **options)
        launches = emulated_library.emulator.launches()
    assert {name for name, chosen in served.items() if chosen == "cuda"} == IN_CUDA
    assert ours == expected
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), rtol=0, atol=tolerance)
    assert all(launch["is_dependent"] for launch in launches), "a kernel waits for its predecessor as a whole"


@pytest.mark.parametrize("options", [{}, FP8], ids=["bf16", "fp8"])
def test_a_decode_layer_is_six_launches(emulated_library: Any, model: Path, options: dict[str, Any]) -> None:
    """Norm and qkv, rope and append, attention, o, norm and gate_up, activation and down."""
    with emulated(emulated_library):
        engine = Engine(str(model), device="cpu", dtype="bfloat16", max_model_len=64, prefer={"*": "cuda"}, **options)
        try:
            params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
            for name in "abc":
                engine.add_request(name, {"prompt_token_ids": [1, 5, 6]}, params)
            engine.step()
            counts = []
            while engine.has_unfinished_requests():
                emulated_library.emulator.clear_launches()
                engine.step()
                counts.append(len(emulated_library.emulator.launches()))
        finally:
            engine.close()
    # Besides the layers: the split of the keys, once a step; the last norm with lm_head; the choice of the token.
    assert counts and max(counts) <= 6 * CONFIG.num_layers + 3, counts
