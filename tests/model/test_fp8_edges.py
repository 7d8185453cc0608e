"""FP8 checkpoints at the edges: scales that are no scales, shapes and keys that tools have used, keys and values alone
in FP8.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_engine import Engine, SamplingParams
from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.quant_config import quantization_of
from nemo_engine.model.linear import DenseLinear, Fp8Linear
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import Ops, Site
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.fp8_checkpoints import FP8, quantise, quantization_config, write_fp8

SMALL = tiny_config()
OUT = "model.layers.0.self_attn.o_proj"
KEYS = "model.layers.0.self_attn.k_scale"
KV_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
CPU: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "num_kv_pages": 8}


def load(path: Path, **options: Any) -> NemoWeights:
    checkpoint = open_checkpoint(path)
    return load_weights(checkpoint, checkpoint.model_config, dtype=torch.float32, progress=False, **options)


def change(path: Path, tensors: dict[str, Tensor]) -> None:
    file = path / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def change_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((path / "config.json").read_text())
    edit(data)
    (path / "config.json").write_text(json.dumps(data))


# ---- scales


@pytest.mark.parametrize("name", [f"{OUT}.input_scale", KEYS])
def test_a_scale_of_zero_is_refused(name: str, tmp_path: Path) -> None:
    """What is divided by it would be NaN or 448 everywhere."""
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "fp8 static", kv="tensor")
    change(tmp_path, {name: torch.zeros(())})
    with pytest.raises(ValueError, match=rf"{name} must be finite and greater than 0, got \[0.0\]"):
        load(tmp_path, needs_kv_scales=True)


@pytest.mark.parametrize("flavour", ["compressed-tensors dynamic", "compressed-tensors weights only"])
def test_a_weight_scale_of_zero_is_for_rows_of_zeros(flavour: str, tmp_path: Path) -> None:
    state = random_state_dict(SMALL)
    write_fp8(tmp_path, SMALL, state, flavour)
    numbers, scales = quantise(state[f"{OUT}.weight"], "channel")
    scales[3] = 0
    change(tmp_path, {f"{OUT}.weight_scale": scales})
    with pytest.raises(ValueError, match=f"{OUT}.weight_scale is 0 for row 3 of {OUT}.weight, whose numbers are not 0"):
        load(tmp_path)
    numbers.view(torch.uint8)[3] = 0x80  # the other zero
    change(tmp_path, {f"{OUT}.weight": numbers})
    linear = load(tmp_path).layers[0].o
    assert isinstance(linear, DenseLinear) or linear.scales[3] == 0  # type: ignore[attr-defined]


def test_a_block_scale_of_zero_is_refused(tmp_path: Path) -> None:
    config = tiny_config(num_heads=2, num_kv_heads=1, head_dim=128, hidden_size=200, intermediate_size=256)
    write_fp8(tmp_path, config, random_state_dict(config), "fp8 block")
    scales = load_file(tmp_path / "model.safetensors")[f"{OUT}.weight_scale_inv"]
    scales[1, 1] = 0
    change(tmp_path, {f"{OUT}.weight_scale_inv": scales})
    with pytest.raises(ValueError, match=f"{OUT}.weight_scale_inv is 0 for row 128 of"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, FP8])
@pytest.mark.parametrize("name", [f"{OUT}.weight_scale", f"{OUT}.input_scale", KEYS])
def test_scales_that_are_not_floating_point_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "fp8 static", kv="tensor")
    change(tmp_path, {name: torch.ones(()).to(dtype)})
    with pytest.raises(ValueError, match=f"{name}: expected bfloat16, float16, float32 or float64, found "):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_of_other_dtypes_mean_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "fp8 static", kv="head")
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("_scale")]
    change(tmp_path, {name: torch.tensor(0.0625, dtype=dtype) for name in names})
    layer = load(tmp_path, needs_kv_scales=True).layers[1]
    assert isinstance(layer.qkv, Fp8Linear) and (layer.qkv.scales == 0.0625).all() and layer.qkv.input_scale == 0.0625
    assert layer.v_scale is not None and layer.v_scale.tolist() == [0.0625] * 2


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1), (2,), (2, 1), (1, 2), (2, 1, 1)])
def test_shapes_of_scales_of_keys(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "fp8 static", kv="tensor")
    change(tmp_path, {KEYS: torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)})
    scale = load(tmp_path, needs_kv_scales=True).layers[0].k_scale
    assert scale is not None and scale.tolist() == ([1, 2] if 2 in shape else [1, 1])


FORMS = {
    "compressed-tensors": ("{}.{}_scale",),
    "compressed-tensors before 0.13": ("{}.{}_proj.output_scale",),
    "ModelOpt": ("{}.{}_proj.{}_scale",),
    "vLLM": ("{}.attn.{}_scale",),
    "one for both": ("{}.kv_scale",),
}


@pytest.mark.parametrize("form", FORMS)
def test_spellings_of_scales_of_keys_and_values(form: str, tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "compressed-tensors static")
    scales = {
        name.format(f"model.layers.{layer}.self_attn", x, x): torch.tensor([0.25 if x == "k" else 0.5])
        for layer in range(2)
        for x in "kv"
        for name in FORMS[form]
    }
    change(tmp_path, scales)
    layer = load(tmp_path, needs_kv_scales=True).layers[1]
    assert layer.k_scale is not None and layer.v_scale is not None
    assert (
        layer.k_scale.tolist() == [0.5 if form == "one for both" else 0.25] * 2 and layer.v_scale.tolist() == [0.5] * 2
    )


def test_scales_of_mistrals_quantisers(tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "mistral static")
    file = tmp_path / "consolidated.safetensors"
    names = [f"layers.{layer}.attention.{x}_fake_quantizer.qscale_act" for layer in range(2) for x in "qkv"]
    save_file(load_file(file) | {name: torch.tensor(0.25) for name in names}, file)
    scale = load(tmp_path, needs_kv_scales=True).layers[0].k_scale
    assert scale is not None and scale.tolist() == [0.25] * 2


def test_a_scheme_for_keys_without_scales_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "compressed-tensors static", kv="tensor")
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(kept, tmp_path / "model.safetensors")
    assert load(tmp_path, needs_kv_scales=True).layers[0].k_scale is None
    assert "is for FP8 keys and values and has no scales of them: 1 is taken" in caplog.text


def test_inputs_beyond_a_static_scale_saturate(tmp_path: Path) -> None:
    """As 448 times the scale with their sign, and nothing becomes NaN; an input that is not finite gives NaN in its row
    alone.
    """
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "fp8 static")
    linear = load(tmp_path).layers[0].o
    assert isinstance(linear, Fp8Linear) and linear.input_scale is not None
    ops = Ops.select(Site.of(SMALL, 16, torch.float32, torch.device("cpu")), {})
    largest = 448 * float(linear.input_scale)
    x = torch.tensor([1.0, 3.0, 1e30, -1e30, torch.inf]).unsqueeze(1) * largest * torch.ones(5, linear.in_features)
    found = linear(x, ops)
    assert found[1].equal(found[0]) and found[2].equal(found[0]) and found[3].equal(-found[0])
    assert found[:4].isfinite().all() and found[4].isnan().all()


# ---- configurations


def test_the_key_of_early_compressed_tensors(tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "compressed-tensors static")
    expected = load(tmp_path).layers[0].qkv.weight
    change_config(tmp_path, lambda data: data.update(compression_config=data.pop("quantization_config")))
    assert load(tmp_path).layers[0].qkv.weight.view(torch.uint8).equal(expected.view(torch.uint8))


def test_linear_in_the_ignore_list_is_all_of_them(tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "compressed-tensors static")
    change_config(tmp_path, lambda data: data["quantization_config"].update(ignore=["lm_head", "Linear"]))
    with pytest.raises(ValueError, match=r"q_proj.weight: found float8_e4m3fn .* the configuration leaves it out"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "with transform_config"),
        ({"kv_cache_scheme": KV_SCHEME | {"symmetric": False}}, "kv_cache_scheme of FP8, asymmetric"),
        ({"kv_cache_scheme": KV_SCHEME | {"dynamic": True}}, "kv_cache_scheme of FP8, dynamic"),
        ({"config_groups": {}}, "has no config_groups"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    block = quantization_config("compressed-tensors static", "tensor", True, False)
    with pytest.raises(ValueError, match=message):
        quantization_of({"quantization_config": block | change})


@pytest.mark.parametrize("flavour", ["compressed-tensors", "modelopt"])
def test_keys_and_values_alone_in_fp8(flavour: str, tmp_path: Path) -> None:
    """Weights are as in an unquantised checkpoint, so they may be quantised while they load."""
    scales = {f"model.layers.{layer}.self_attn.{x}_scale": torch.tensor([0.03]) for layer in range(2) for x in "kv"}
    write_hf(tmp_path, SMALL, random_state_dict(SMALL) | scales)
    if flavour == "modelopt":
        inner = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    else:
        block = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": KV_SCHEME}
        change_config(tmp_path, lambda data: data.update(quantization_config=block))
    assert f"FP8 keys and values ({flavour}), weights not quantised" in open_checkpoint(tmp_path).describe()
    for quantization, word in ((None, "load weights"), ("fp8", "quantised to FP8, a scale per channel")):
        with Engine(tmp_path, quantization=quantization, **CPU) as engine:
            engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2))
            names = [row.name for row in engine.startup_log.rows]
        assert any(word in name for name in names) and "allocate KV cache (FP8, scales of the checkpoint)" in names


def test_modelopt_that_quantised_nothing() -> None:
    assert quantization_of({}, {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}) is None


# ---- conflicts


def test_online_quantisation_of_weights_whose_inputs_stay_is_a_conflict(tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "compressed-tensors weights only")
    with pytest.raises(ValueError, match="quantization 'fp8' conflicts with .* inputs not quantised"):
        Engine(tmp_path, quantization="fp8", **CPU)


def test_a_tied_head_in_fp8_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    state = random_state_dict(config)
    write_fp8(tmp_path, config, state, "fp8 dynamic")
    numbers, scale = quantise(state["model.embed_tokens.weight"], "tensor")
    change(tmp_path, {"lm_head.weight": numbers, "lm_head.weight_scale": scale})
    change_config(tmp_path, lambda data: data["quantization_config"].update(ignored_layers=["re:nothing"]))
    with pytest.raises(ValueError, match="lm_head.weight: found float8_e4m3fn .* ties it to the embeddings"):
        load(tmp_path)


def test_rows_that_fill_no_blocks_are_named_with_the_option(tmp_path: Path) -> None:
    write_hf(tmp_path, SMALL, random_state_dict(SMALL))
    with pytest.raises(ValueError, match="gate_proj.weight: its 40 rows .* of 128, so it cannot be .* 'fp8_block'"):
        Engine(tmp_path, quantization="fp8_block", **CPU)


# ---- memory

PEAK = """
import sys
from pathlib import Path
import torch
from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.ops.quantize import quantize_channels

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
config = checkpoint.model_config
is_widened = sys.argv[2] == "widened"
quantize_channels(torch.ones(1000, 1000, dtype=torch.bfloat16))[0].float()  # torch's own code comes into memory
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
weights = load_weights(checkpoint, config, dtype=torch.bfloat16, progress=False, online=ONLINE["fp8"], is_widened=is_widened)
print(status("VmHWM") - before, weights.num_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["fp8", "widened"])
def test_peak_memory_of_quantising_while_loading(kind: str, tmp_path: Path) -> None:
    """The final size and one tensor; a layer where numbers are widened afterwards."""
    config = tiny_config(
        vocab_size=512, hidden_size=1024, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=128,
        intermediate_size=3072, dtype="bfloat16",
    )  # fmt: skip
    write_hf(tmp_path, config, random_state_dict(config, dtype=torch.bfloat16), shards=2)
    # What is freed goes back at once: the C library would else keep now this, now that.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, str(tmp_path), kind]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, num_bytes = map(int, run.stdout.split())
    tensor, layer = 2 * 1024 * 3072, 4 * 1024 * 1024 + 3 * 1024 * 3072
    copies = 20 << 20  # in fp32, of a part of a tensor; they are as large for a model of any size
    allowed = tensor + copies + (2 * layer if kind == "widened" else 0)
    assert peak < num_bytes + allowed, (peak, num_bytes)
