"""Greedy generation equals transformers' token for token, on the bundled model in fp32."""

from __future__ import annotations

import inspect
import json
import textwrap

import pytest
import torch

from nemo_engine.engine.engine import Engine
from nemo_engine.sampling_params import SamplingParams

NUM_PROMPTS = 64
NEW_TOKENS = 24


def make_prompts(engine: Engine) -> list[list[int]]:
    """64 prompts of 1 to 192 tokens: code and prose of the standard library, and every length around a page
    boundary.
    """
    assert engine.tokenizer is not None
    source = engine.tokenizer.encode(inspect.getsource(textwrap) + inspect.getsource(json), bos=False)
    page = engine.config.page_size
    lengths = [1, 2, 3, page - 1, page, page + 1, 2 * page - 1, 2 * page, 2 * page + 1, 3 * page]
    lengths += [4 + 3 * index for index in range(NUM_PROMPTS - len(lengths))]
    return [[1, *source[17 * i : 17 * i + length - 1]] for i, length in enumerate(lengths)]


def test_greedy_tokens_of_nemo_tiny_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    with Engine("nemo-tiny", device="cpu", dtype="float32", max_model_len=512, num_kv_pages=200) as engine:
        prompts = make_prompts(engine)
        assert len(prompts) == NUM_PROMPTS
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        model = transformers.MistralForCausalLM.from_pretrained(engine.model_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        for ids, output in zip(prompts, outputs):
            expected = model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=2,
            )[0, len(ids) :].tolist()  # fmt: skip
            assert output.outputs[0].token_ids == expected
