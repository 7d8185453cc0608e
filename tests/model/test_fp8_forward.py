"""The forward pass of FP8 models against float64 worked out step by step, and against transformers on the dequantised
weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.quant_config import ONLINE, Quantization
from nemo_engine.config import ModelConfig
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.nemo import Nemo
from nemo_engine.ops import Ops, Site
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.fp8_checkpoints import BLOCK, FLAVOURS, FP8, dequantise, is_quantised, quantise, write_fp8
from tests.model.forward import PAGE, our_logits
from tests.model.fp8_reference import Reference, to_fp8

SMALL = tiny_config(num_layers=2)
# One layer: a value that falls to the other of two FP8 numbers then changes its own token alone.
BLOCKS = tiny_config(num_heads=2, num_kv_heads=1, head_dim=128, hidden_size=200, intermediate_size=256, num_layers=1)


def nemo(path: Path, online: Quantization | None = None, *, is_kv_fp8: bool = False, is_widened: bool = True) -> Nemo:
    checkpoint = open_checkpoint(path)
    config = checkpoint.model_config
    weights = load_weights(
        checkpoint,
        config,
        dtype=torch.float32,
        progress=False,
        online=online,
        needs_kv_scales=is_kv_fp8,
        is_widened=is_widened,
    )
    kv_dtype = FP8 if is_kv_fp8 else torch.float32
    site = Site.of(config, PAGE, torch.float32, torch.device("cpu"), kv_dtype)
    return Nemo(config, weights, Ops.select(site, {}), max_len=256)


def prompts_of(config: ModelConfig) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in (1, PAGE + 1, 37)]


def assert_near(model: Nemo, reference: Reference, *, is_kv_fp8: bool = False) -> None:
    """In fp32, where a value lies beside the middle of two FP8 numbers it may fall to the other, so a few in a thousand
    may be off.
    """
    prompts = prompts_of(model.config)
    for found, prompt in zip(our_logits(model, prompts, FP8 if is_kv_fp8 else None), prompts, strict=True):
        expected = reference.logits(prompt)
        error = (found.double() - expected).abs().amax(1)
        assert error.median() < 2e-5 * expected.abs().max() and error.max() < 0.02 * expected.abs().max()


def test_rounding_of_the_reference() -> None:
    x = torch.cat([torch.randn(10000) * 10.0**i for i in range(-4, 4)])
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    x = torch.cat([x, numbers, (numbers[1:] + numbers[:-1]) / 2])
    assert to_fp8(x.double()).equal(x.clamp(-448, 448).to(FP8).double())


@pytest.mark.parametrize("kv", [None, "tensor", "head"])
@pytest.mark.parametrize("flavour", [name for name in FLAVOURS if not name.startswith("mistral")])
def test_each_scheme_equals_its_simulation(flavour: str, kv: str | None, tmp_path: Path) -> None:
    kind, is_static = FLAVOURS[flavour]
    config = BLOCKS if kind == "block" else SMALL
    meaning, others = write_fp8(tmp_path, config, random_state_dict(config, seed=6), flavour, kv=kv)
    inputs = "none" if is_static is None else "static" if is_static else "block" if kind == "block" else "token"
    reference = Reference(config, meaning, inputs, others, kv is not None)
    for is_widened in (True, False):
        assert_near(
            nemo(tmp_path, is_kv_fp8=kv is not None, is_widened=is_widened), reference, is_kv_fp8=kv is not None
        )


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block"])
def test_quantised_while_loading_equals_its_simulation(scheme: str, tmp_path: Path) -> None:
    state = random_state_dict(BLOCKS, seed=6)
    write_hf(tmp_path, BLOCKS, state)
    kind = "block" if scheme == "fp8_block" else "channel"
    meaning = {
        name: dequantise(*quantise(tensor, kind)) if is_quantised(name) else tensor for name, tensor in state.items()
    }
    reference = Reference(BLOCKS, meaning, "block" if kind == "block" else "token", is_kv_fp8=True)
    assert_near(nemo(tmp_path, ONLINE[scheme], is_kv_fp8=True), reference, is_kv_fp8=True)


def test_the_simulation_notices_another_scheme(tmp_path: Path) -> None:
    """Else the bounds above would be too wide to mean anything."""
    meaning, others = write_fp8(tmp_path, SMALL, random_state_dict(SMALL, seed=6), "fp8 static", kv="head")
    model = nemo(tmp_path, is_kv_fp8=True)
    for wrong in (
        Reference(SMALL, meaning, "token", others, True),
        Reference(SMALL, meaning, "none", others, True),
        Reference(SMALL, meaning, "static", others, False),
        Reference(SMALL, random_state_dict(SMALL, seed=6), "static", others, True),
    ):
        with pytest.raises(AssertionError):
            assert_near(model, wrong, is_kv_fp8=True)


def test_inputs_that_stay_as_they_are_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    meaning, _ = write_fp8(tmp_path / "fp8", SMALL, random_state_dict(SMALL, seed=6), "compressed-tensors weights only")
    write_hf(tmp_path / "dense", SMALL, meaning)
    reference = transformers.MistralForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    prompts = prompts_of(SMALL)
    with torch.inference_mode():
        for found, prompt in zip(our_logits(nemo(tmp_path / "fp8"), prompts), prompts, strict=True):
            expected = reference(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def coarse(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Magnitudes from 0.05 to 1: as FP8 numbers multiples of 2 up to 448, of which fp32 holds every sum of products
    exactly.
    """
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs * torch.empty(shape).uniform_(0.05, 1.0, generator=generator)


def whole_blocks(x: torch.Tensor) -> torch.Tensor:
    """``x`` with 1.75 in the first place of each 128 of a row, so that scales of blocks are powers of 2."""
    x[:, ::BLOCK] = 1.75
    return x


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float64 of the nearest fp32."""
    return x.float().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flavour", [name for name, (_, is_static) in FLAVOURS.items() if is_static is not None])
def test_each_scheme_is_its_float64_simulation_bit_for_bit(flavour: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounding, scaling and the product of one layer: where no sum rounds, nothing may differ in a single bit."""
    kind, is_static = FLAVOURS[flavour]
    config = BLOCKS if kind == "block" else SMALL
    generator = torch.Generator().manual_seed(3)
    state = random_state_dict(config, seed=6)
    for name in filter(is_quantised, state):
        state[name] = coarse(generator, *state[name].shape)
        if kind == "block":
            whole_blocks(state[name])
    write_fp8(tmp_path, config, state, flavour)
    model = nemo(tmp_path)
    for projection in ("qkv", "o", "gate_up", "down"):
        linear = getattr(model.weights.layers[0], projection)
        assert isinstance(linear, Fp8Linear)
        x = coarse(generator, 9, linear.in_features).to(dtype) * 4
        if kind == "block":
            whole_blocks(x)[:, ::BLOCK] *= 4
            x.mul_(2.0 ** torch.arange(-4, 5).unsqueeze(1))
        wide, numbers, scales = x.double(), linear.weight.double(), linear.scales.double()
        if kind == "block":
            blocks = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in wide.split(BLOCK, 1)], 1)
            x_scales = rounded(blocks / 448)
            w_scales = scales.repeat_interleave(BLOCK, 0)[: len(numbers)].repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
            expected = (to_fp8(rounded(wide / x_scales)) * x_scales) @ (numbers * w_scales).T
        else:
            x_scales = wide.abs().amax(1, keepdim=True)
            x_scales = linear.input_scale.double().reshape(1, 1) if is_static else rounded(x_scales / 448)
            product = to_fp8(rounded(wide / x_scales)) @ numbers.T
            expected = rounded(rounded(product * x_scales) * scales.T)
        found = linear(x, model.ops)
        assert found.dtype == dtype and found.equal(expected.float().to(dtype)), projection
        plain = wide @ (numbers * (w_scales if kind == "block" else scales)).T
        assert not plain.float().to(dtype).equal(found), "inputs are quantised"
