"""Loading puts every number where it belongs, refuses what does not fit before it allocates, and holds no second
copy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_engine.checkpoint import loader as weights_module
from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.inventory import FAULTS_SHOWN
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.progress import progress_bar
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.checkpoint.read_ahead import Part, ReadAhead
from nemo_engine.checkpoint.safetensors_files import TensorInfo
from nemo_engine.config import ModelConfig
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.weights import NemoWeights, dummy_weights
from nemo_engine.ops import Ops, Site
from nemo_engine.startup_log import StartupLog
from tests.helpers.checkpoints import StateDict, random_state_dict, tiny_config, write_hf, write_mistral

CONFIGS = {
    "odd layers": tiny_config(num_layers=3),
    "1:1": tiny_config(num_layers=1, num_heads=3, num_kv_heads=3, head_dim=6),
    "8:1": tiny_config(num_layers=1, num_heads=8, num_kv_heads=1, head_dim=2, hidden_size=10),
    "tied": tiny_config(tie_word_embeddings=True),
    "wide heads": tiny_config(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=64, hidden_size=5, vocab_size=11),
}


def all_tensors(weights: NemoWeights) -> Iterator[torch.Tensor]:
    yield from (weights.embed_tokens, weights.norm, weights.lm_head.weight)
    for layer in weights.layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm)
        yield from (linear.weight for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> NemoWeights:
    checkpoint = open_checkpoint(path)
    return load_weights(checkpoint, checkpoint.model_config, dtype=dtype, **options)


def assert_same(left: NemoWeights, right: NemoWeights) -> None:
    pairs = list(zip(all_tensors(left), all_tensors(right), strict=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def expected_weights(config: ModelConfig, state: StateDict, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """What ``all_tensors`` should give, put together from the state dict."""
    yield state["model.embed_tokens.weight"].to(dtype)
    yield state["model.norm.weight"].to(dtype)
    yield state["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].to(dtype)
    for layer in range(config.num_layers):
        part = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in state.items()}
        yield part["input_layernorm.weight"].to(dtype)
        yield part["post_attention_layernorm.weight"].to(dtype)
        yield torch.cat([part[f"self_attn.{name}_proj.weight"] for name in "qkv"]).to(dtype)
        yield part["self_attn.o_proj.weight"].to(dtype)
        yield torch.cat([part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]]).to(dtype)
        yield part["mlp.down_proj.weight"].to(dtype)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_layouts_are_bit_equal(name: str, shards: int, stored: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[name]
    state = random_state_dict(config, seed=5, dtype=stored)
    write_hf(tmp_path / "hf", config, state, shards=shards)
    write_mistral(tmp_path / "mistral", config, state, shards=shards)
    for dtype in (stored, torch.float64, torch.bfloat16):
        weights = load(tmp_path / "hf", dtype)
        for found, expected in zip(all_tensors(weights), expected_weights(config, state, dtype), strict=True):
            assert found.dtype == dtype and torch.equal(found, expected)
        assert_same(weights, load(tmp_path / "mistral", dtype))


def test_interleaved_rows_turn_as_half_split_ones(tmp_path: Path) -> None:
    """Whatever order of rows the helper assumes: rotated either way, queries and keys give the same scores."""
    config = tiny_config(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=6)
    write_mistral(tmp_path, config, random_state_dict(config))
    stored = load_file(tmp_path / "consolidated.safetensors")
    loaded = load(tmp_path, torch.float64).layers[0].qkv.weight.split(6)
    x = torch.randn(config.hidden_size, dtype=torch.float64)

    def interleaved(name: str, angles: torch.Tensor) -> torch.Tensor:
        pairs = (stored[f"layers.0.attention.{name}.weight"].double() @ x).view(3, 2)
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)).flatten()

    def half_split(weight: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        first, second = (weight @ x).chunk(2)
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])

    at_query, at_key = torch.rand(2, 3, dtype=torch.float64)
    expected = interleaved("wq", at_query) @ interleaved("wk", at_key)
    found = half_split(loaded[0], at_query) @ half_split(loaded[1], at_key)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_tied_embeddings_share_one_tensor(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    state = random_state_dict(config)
    weights = load(write_hf(tmp_path, config, state))
    assert weights.lm_head.weight is weights.embed_tokens
    assert weights.num_bytes == sum(tensor.nbytes for tensor in state.values())
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    assert load(write_hf(tmp_path, config, state)).lm_head.weight.shape == (config.vocab_size, config.hidden_size)
    state["lm_head.weight"][3, 4] += 1
    with pytest.raises(
        ValueError, match=r"ties lm_head .* lm_head.weight in model.safetensors differs from model.embed"
    ):
        load(write_hf(tmp_path, config, state))


def test_linear_and_ledger(tmp_path: Path) -> None:
    config = tiny_config()
    startup_log = StartupLog()
    weights = load(write_hf(tmp_path, config, random_state_dict(config)), startup_log=startup_log)
    qkv = weights.layers[0].qkv
    assert (qkv.out_features, qkv.in_features, qkv.num_bytes) == (64, 24, 64 * 24 * 4)
    x = torch.randn(5, 24)
    ops = Ops.select(Site.of(config, 16, torch.float32, torch.device("cpu")), {})
    assert torch.allclose(qkv(x, ops), x @ qkv.weight.T, atol=1e-6)
    assert [row.name for row in startup_log.rows] == ["check tensors", "load weights"]
    assert startup_log.rows[1].num_bytes == weights.num_bytes == open_checkpoint(tmp_path).num_bytes


# ---- what does not fit


def change(**changes: torch.Tensor | None) -> Callable[[StateDict], StateDict]:
    def apply(state: StateDict) -> StateDict:
        changed = state | {name: tensor for name, tensor in changes.items() if tensor is not None}
        return {name: tensor for name, tensor in changed.items() if changes.get(name, tensor) is not None}

    return apply


Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change(**{Q1: None}), rf"{Q1}: expected \[32, 24\], not found"),
        (change(**{"lm_head.weight": None}), r"lm_head.weight: expected \[97, 24\], not found"),
        (change(**{Q1: torch.zeros(24, 24)}), rf"{Q1}: expected \[32, 24\], found \[24, 24\] in model"),
        (change(**{Q1: torch.zeros(24, 32)}), rf"{Q1}: expected \[32, 24\], found \[24, 32\]"),
        (change(**{"model.norm.weight": torch.zeros(24, 1)}), r"model.norm.weight: expected \[24\], found \[24, 1\]"),
        (change(**{"model.norm.weight": torch.zeros(())}), r"model.norm.weight: expected \[24\], found \[\]"),
        (change(**{Q1: torch.zeros(32, 24, dtype=torch.int8)}), f"{Q1}: expected bfloat16, .*found int8 in model"),
        (
            change(**{Q1: torch.zeros(32, 24).to(torch.float8_e4m3fn)}),
            f"{Q1}: .*found float8_e4m3fn .*has no quantization",
        ),
        (
            change(**{"model.layers.2.mlp.up_proj.weight": torch.zeros(40, 24)}),
            r"layers.2.mlp.up_proj.weight: not expected",
        ),
        (
            change(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            r"q_proj.bias: not expected, found \[32\]",
        ),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_refused_before_anything_is_allocated(
    apply: Callable[[StateDict], StateDict], message: str, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    write_hf(tmp_path, config, apply(random_state_dict(config)), shards=shards)
    monkeypatch.setattr(weights_module, "empty_weights", lambda *args: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    config = tiny_config(num_layers=2)
    write_hf(tmp_path, config, random_state_dict(config), num_hidden_layers=5)
    with pytest.raises(ValueError, match="and 19 more") as caught:
        load(tmp_path)
    assert str(caught.value).count("not found") == FAULTS_SHOWN


def test_mistral_faults_have_mistral_names(tmp_path: Path) -> None:
    config = tiny_config()
    write_mistral(tmp_path, config, random_state_dict(config), hidden_dim=41)
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.w1.weight: expected \[41, 24\], found \[40, 24\]"):
        load(tmp_path)


def test_old_rotary_buffers_are_ignored_by_name(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state_dict(config)
    write_hf(tmp_path / "plain", config, state)
    write_hf(tmp_path / "old", config, state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert_same(load(tmp_path / "plain"), load(tmp_path / "old"))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    config = tiny_config()
    checkpoint = open_checkpoint(write_hf(tmp_path, config, random_state_dict(config)))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is cut off: byte .* cannot be read"):
        load_weights(checkpoint, config, dtype=torch.float32)


def test_a_nan_is_loaded_as_it_is(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state_dict(config)
    state["model.norm.weight"][3] = float("nan")
    assert torch.isnan(load(write_hf(tmp_path, config, state)).norm).nonzero().tolist() == [[3]]


# ---- reading ahead


@pytest.mark.parametrize("part_bytes", [1, 40_000, 1 << 30])
@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_parts_of_any_size_through_the_buffers_make_the_same_weights(
    layout: str, part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose weights no file is read into: dense, and quantised on the way."""
    config = tiny_config(hidden_size=128, intermediate_size=384, head_dim=64, vocab_size=700, dtype="bfloat16")
    state = {name: value.bfloat16() for name, value in random_state_dict(config).items()}
    path = {"hf": write_hf, "mistral": write_mistral}[layout](tmp_path, config, state)
    kinds = [{}, {"online": ONLINE["fp8"]}, {"online": ONLINE["fp8_block"]}]
    direct = [load(path, torch.bfloat16, **kind) for kind in kinds]
    monkeypatch.setattr(weights_module, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(weights_module, "_can_be_read_into", lambda values, info: False)
    for kind, expected in zip(kinds, direct, strict=True):
        weights = load(path, torch.bfloat16, **kind)
        tensors = [[*all_tensors(some), *scales_of(some)] for some in (weights, expected)]
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*tensors, strict=True))


def scales_of(weights: NemoWeights) -> Iterator[torch.Tensor]:
    for layer in weights.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            if isinstance(linear, Fp8Linear):
                yield linear.scales


def test_the_reader_ends_with_its_caller_and_its_errors_are_the_callers(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(100)))
    info = TensorInfo(file, "uint8", (200,), 200, 0)  # the file has fewer
    parts = [Part(info, begin, 10) for begin in range(0, 200, 10)]
    with ReadAhead(parts, is_pinned=False) as ahead:
        assert ahead.take(parts[0]).tolist() == [*range(10)]
        assert ahead.take(parts[1]).tolist() == [*range(10, 20)]
    assert not ahead._thread.is_alive()
    with pytest.raises(ValueError, match="is cut off: byte 100 cannot be read"), ReadAhead(parts, False) as ahead:
        for part in parts:
            ahead.take(part)
    assert not ahead._thread.is_alive()
    file.unlink()
    with pytest.raises(FileNotFoundError), ReadAhead(parts, False) as ahead:
        ahead.take(parts[0])


# ---- memory

PEAK_SCRIPT = """
import sys, torch
from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.inventory import FAULTS_SHOWN
from nemo_engine.checkpoint.loader import load_weights
def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024
path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
checkpoint = open_checkpoint(path)
torch.zeros(1000).to(torch.bfloat16).copy_(torch.zeros(1000))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
weights = load_weights(checkpoint, checkpoint.model_config, dtype=dtype)
print(status("VmHWM") - before, weights.num_bytes)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few tensors of 8 to 16 MiB: large against the slack of the measurement, small beside the whole."""
    path = tmp_path_factory.mktemp("large")
    config = tiny_config(hidden_size=1024, num_heads=32, num_kv_heads=32, head_dim=128, intermediate_size=4096,
                         num_layers=2, vocab_size=4096, dtype="bfloat16")  # fmt: skip
    shapes = random_state_dict(tiny_config(num_layers=2))
    sizes = {
        "q_proj": (4096, 1024),
        "k_proj": (4096, 1024),
        "v_proj": (4096, 1024),
        "o_proj": (1024, 4096),
        "gate_proj": (4096, 1024),
        "up_proj": (4096, 1024),
        "down_proj": (1024, 4096),
        "embed_tokens": (4096, 1024),
        "lm_head": (4096, 1024),
    }
    state = {name: torch.ones(sizes.get(name.split(".")[-2], (1024,)), dtype=torch.bfloat16) for name in shapes}
    write_hf(path / "hf", config, state)
    write_mistral(path / "mistral", config, state)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("layout", "dtype"), [("hf", "bfloat16"), ("hf", "float32"), ("mistral", "bfloat16")])
def test_peak_memory_is_the_weights_and_one_tensor(large: Path, layout: str, dtype: str) -> None:
    run = [sys.executable, "-c", PEAK_SCRIPT, str(large / layout), dtype]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    peak, num_bytes = map(int, output.split())
    largest = max(info.nbytes for info in open_checkpoint(large / layout).tensors.values())
    slack = 6 * 2**20
    assert num_bytes >= 64 * 2**20 and largest == 8 * 2**20
    assert num_bytes - slack < peak < num_bytes + largest + slack


# ---- dummy weights, progress


def test_dummy_weights_are_addressed() -> None:
    config = tiny_config()
    weights = dummy_weights(config, torch.float32, seed=7)
    assert_same(weights, dummy_weights(config, torch.float32, seed=7))
    assert not torch.equal(weights.embed_tokens, dummy_weights(config, torch.float32, seed=8).embed_tokens)
    deeper = dummy_weights(tiny_config(num_layers=5), torch.float32, seed=7)
    assert torch.equal(weights.layers[1].qkv.weight, deeper.layers[1].qkv.weight)
    half = dummy_weights(config, torch.bfloat16, seed=7)
    for wide, narrow in zip(all_tensors(weights), all_tensors(half), strict=True):
        assert torch.equal(wide.bfloat16(), narrow)


@pytest.mark.parametrize("tied", [False, True])
def test_dummy_weights_keep_activations_near_one(tied: bool) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=64, num_layers=6,
                         vocab_size=2500, tie_word_embeddings=tied)  # fmt: skip
    weights = dummy_weights(config, torch.float32)
    ops = Ops.select(Site.of(config, 16, torch.float32, torch.device("cpu")), {})

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()

    x = weights.embed_tokens[:64]
    for layer in weights.layers:  # one token attends to itself: attention gives its value
        qkv = layer.qkv(norm(x), ops)
        v = qkv[:, -config.kv_size :].view(64, 2, 1, 64).expand(64, 2, 4, 64).reshape(64, -1)
        x = x + layer.o(v, ops)
        gate, up = layer.gate_up(norm(x), ops).chunk(2, -1)
        x = x + layer.down(torch.nn.functional.silu(gate) * up, ops)
        assert qkv.std().item() == pytest.approx(1.0, rel=0.1)
        assert 0.05 < x.std().item() < 2.0
    assert weights.lm_head(norm(x), ops).std().item() == pytest.approx(1.0, rel=0.1)
    assert (weights.lm_head.weight is weights.embed_tokens) is tied
    rows = weights.embed_tokens  # 640,000 numbers, more than are drawn: no row may come twice
    assert len({tuple(row[:8].tolist()) for row in rows}) == len(rows)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in (True, False, None):
        with progress_bar("load weights", 100, wanted) as advance:
            advance(60)
            advance(40)
        shown = capsys.readouterr().err
        assert ("load weights: 100%" in shown) is (wanted is True)


def test_the_helpers_write_what_transformers_reads(tmp_path: Path) -> None:
    """The checkpoints of these tests are the format's, not only ours."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(num_layers=1)
    state = random_state_dict(config, seed=2)
    write_hf(tmp_path, config, state, shards=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == "MistralForCausalLM"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    again = open_checkpoint(tmp_path / "again").model_config
    assert again == config
    assert_same(load(tmp_path), load(tmp_path / "again"))
    assert "rope_parameters" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == state.keys()
    save_file(state, tmp_path / "again" / "model.safetensors")  # without metadata
    assert_same(load(tmp_path), load(tmp_path / "again"))
