"""The whole engine with every operation in Triton gives the tokens of the torch path: of a small model interpreted, of
nemo-tiny on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine import Engine, SamplingParams
from nemo_engine.ops import ALL_OPS
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf

TINY = Path(__file__).parent.parent / "nemo_engine" / "assets" / "nemo-tiny"
# Asked for by name, each is served or the engine refuses.
TRITON = {op.name: "triton" for op in ALL_OPS if any(impl.name == "triton" for impl in op.impls)}
PROMPTS = ["The function returns", "import torch\n\n\ndef main() -> None:\n    ", "A"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=4, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=3, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, seed=4, max_tokens=4, logit_bias={5: -1.0}),
]


def run(model: Path = TINY, prompts: Any = PROMPTS, **options: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of the prompts, prefilled in chunks beside each other's decode steps."""
    engine = Engine(str(model), page_size=16, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=16, **options)
    try:
        outputs = [output.outputs[0] for output in engine.generate(prompts, PARAMS)]
    finally:
        engine.close()
    return [
        (
            list(output.token_ids),
            [entry[token].logprob for entry, token in zip(output.logprobs or [], output.token_ids, strict=False)],
        )
        for output in outputs
    ]


# In FP8 a sum in another order may round to the other of two neighbours, which lie an eighth apart.
@pytest.mark.interpreted
@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-4), ({"quantization": "fp8", "kv_cache_dtype": "fp8"}, 0.1)],
    ids=["fp32", "fp8"],
)
def test_interpreted_engine_equals_the_torch_path(options: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    config = tiny_config(
        num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, intermediate_size=48, eos_token_ids=()
    )
    write_hf(tmp_path, config, random_state_dict(config, seed=6))
    prompts = [{"prompt_token_ids": [(7 * i + length) % 97 for i in range(length)]} for length in (5, 22, 1)]
    ours = run(tmp_path, prompts, device="cpu", dtype="float32", prefer=TRITON, **options)
    expected = run(tmp_path, prompts, device="cpu", dtype="float32", **options)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in expected]
    assert [len(tokens) for tokens, _ in expected] == [4, 3, 4]
    torch.testing.assert_close(torch.tensor(ours[0][1]), torch.tensor(expected[0][1]), rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_engine_on_a_gpu_equals_the_cpu(enforce_eager: bool) -> None:
    ours = run(device="cuda", dtype="float32", kv_cache_gib=0.5, enforce_eager=enforce_eager)
    expected = run(device="cpu", dtype="float32")
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in expected]


@pytest.mark.gpu
def test_engines_come_and_go_on_a_gpu() -> None:
    """Memory is given back, two engines fit beside each other, and nothing is compiled once an engine is ready."""
    from triton import knobs

    options: dict[str, Any] = {"device": "cuda", "kv_cache_gib": 0.25, "max_model_len": 256, "max_num_seqs": 8}
    free = []
    for _ in range(3):
        engine, beside = Engine(str(TINY), **options), Engine(str(TINY), **options)
        compiled: list[str] = []
        knobs.runtime.jit_post_compile_hook = lambda into=compiled, **event: into.append(event["repr"])
        try:
            first, second = (each.generate(PROMPTS, PARAMS) for each in (engine, beside))
        finally:
            knobs.runtime.jit_post_compile_hook = None
            engine.close()
            beside.close()
        assert [one.outputs[0].token_ids for one in first] == [one.outputs[0].token_ids for one in second]
        assert compiled == []
        free.append(torch.cuda.mem_get_info()[0])
    assert free[2] >= free[0] - (64 << 20), free


@pytest.mark.gpu
def test_a_budget_that_does_not_fit_is_refused_with_the_plan() -> None:
    with pytest.raises(ValueError, match=r"(?s)does not fit into the device's memory.*KV cache.*what would fit"):
        Engine(str(TINY), device="cuda", kv_cache_gib=100_000.0)
