"""``nemo-engine quantize``: what it writes is what transformers and compressed-tensors read, and never half of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_engine.checkpoint import export
from nemo_engine.checkpoint.calibration import Calibration, calibrate
from nemo_engine.checkpoint.checkpoint import BUNDLED, open_checkpoint
from nemo_engine.checkpoint.export import export_fp8
from nemo_engine.checkpoint.loader import load_weights, read_tensor
from nemo_engine.cli import main
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.nemo import Nemo
from nemo_engine.model.sequence import Sequence
from nemo_engine.ops import Ops, Site
from nemo_engine.quantize import quantize_checkpoint
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf, write_mistral
from tests.helpers.fp8_checkpoints import FP8, dequantise, quantise

CONFIG = tiny_config(num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=128, intermediate_size=256, dtype="bfloat16")
PROMPT = [1, 5, 60, 7, 33, 9, 20, 11, 90, 44, 2, 71, 3, 18, 6, 50, 13]
CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "in", CONFIG, random_state_dict(CONFIG, seed=4, dtype=torch.bfloat16))


def scales_for(path: Path) -> Calibration:
    checkpoint = open_checkpoint(path)
    config = checkpoint.model_config
    weights = load_weights(checkpoint, config, dtype=torch.float32, progress=False)
    ops = Ops.select(Site.of(config, 64, torch.float32, CPU), {})
    return calibrate(config, weights, ops, [PROMPT, PROMPT[:3], list(range(1, 90))])


def our_logits(path: Path, kv_dtype: torch.dtype) -> Tensor:
    checkpoint = open_checkpoint(path)
    config = checkpoint.model_config
    weights = load_weights(
        checkpoint, config, dtype=torch.float32, progress=False, needs_kv_scales=True, is_widened=True
    )
    model = Nemo(config, weights, Ops.select(Site.of(config, 64, torch.float32, CPU, kv_dtype), {}), 64)
    sequence = Sequence(model, 64, 64, kv_dtype)
    return sequence.logits(sequence.feed(PROMPT))


def their_cache(path: Path) -> Any:
    """transformers' cache, whose keys and values compressed-tensors rounds by the scheme and the scales that are in
    ``path``.

    Its own hook does the same, but knows attention by an argument that transformers has renamed (5.24); rounding twice
    changes nothing.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from transformers import DynamicCache

    read = QuantizationConfig.model_validate(json.loads((path / "config.json").read_text())["quantization_config"])
    stored = load_file(path / "model.safetensors")

    class Rounding(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            if read.kv_cache_scheme is not None:
                k, v = (stored[f"model.layers.{layer}.self_attn.{letter}_scale"] for letter in "kv")
                keys = fake_quantize(keys, k, torch.zeros_like(k), read.kv_cache_scheme)
                values = fake_quantize(values, v, torch.zeros_like(v), read.kv_cache_scheme)
            return super().update(keys, values, layer, *args, **kwargs)

    return Rounding()


@pytest.mark.parametrize("quantize_lm_head", [False, True])
@pytest.mark.parametrize(
    ("scheme", "kv_scales"),
    [("dynamic", "none"), ("static", "none"), ("block", "none"), ("dynamic", "tensor"), ("static", "head")],
)
def test_transformers_computes_the_same(
    scheme: Any, kv_scales: Any, quantize_lm_head: bool, source: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    needs = scheme == "static" or kv_scales != "none"
    out = tmp_path / "out"
    export_fp8(
        open_checkpoint(source),
        out,
        scheme=scheme,
        calibration=scales_for(source) if needs else None,
        kv_scales=kv_scales,
        quantize_lm_head=quantize_lm_head,
    )
    model = transformers.MistralForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT]), past_key_values=their_cache(out)).logits[0]
    found = our_logits(out, torch.float32 if kv_scales == "none" else FP8)
    error = (found - expected).abs().amax(1)  # a value beside the middle of two FP8 numbers may fall to the other
    assert error.median() < 1e-4 * expected.abs().max() and error.max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("scheme", ["dynamic", "block"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
def test_numbers_are_those_of_the_scheme(layout: str, scheme: Any, shard_bytes: int, tmp_path: Path) -> None:
    state = random_state_dict(CONFIG, seed=4, dtype=torch.bfloat16)
    source = (write_hf if layout == "hf" else write_mistral)(tmp_path / "in", CONFIG, state)
    (source / "tekken.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    export_fp8(open_checkpoint(source), out, scheme=scheme, shard_bytes=shard_bytes)
    written = open_checkpoint(out)
    assert (out / "tekken.json").exists() and written.layout == "hf"
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes < 1 << 30)
    for name, tensor in state.items():
        stored = read_tensor(written.tensors[name])
        if not name.endswith("_proj.weight"):
            assert stored.equal(tensor)
            continue
        numbers, scales = quantise(tensor, "block" if scheme == "block" else "channel")
        assert stored.view(torch.uint8).equal(numbers.view(torch.uint8))
        assert read_tensor(written.tensors[f"{name}_scale"]).equal(scales)
        assert torch.allclose(dequantise(stored, scales), tensor.float(), rtol=0.07, atol=float(scales.max()))
    weights = load_weights(written, written.model_config, dtype=torch.float32, progress=False)
    assert isinstance(weights.layers[0].qkv, Fp8Linear)


def test_calibrated_scales_are_the_largest_magnitudes(source: Path) -> None:
    found = scales_for(source)
    checkpoint = open_checkpoint(source)
    weights = load_weights(checkpoint, CONFIG, dtype=torch.float64, progress=False)
    x = weights.embed_tokens[torch.tensor([*PROMPT, *range(1, 90)])]
    normed = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + CONFIG.rms_norm_eps) * weights.layers[0].input_layernorm
    torch.testing.assert_close(found.inputs[0, "qkv"].double(), normed.abs().max() / 448, rtol=1e-5, atol=0)
    values = (normed @ weights.layers[0].qkv.weight.T)[:, -CONFIG.kv_size :].abs().amax(0).view(2, -1).amax(1)
    torch.testing.assert_close(found.values[0].double(), values / 448, rtol=1e-5, atol=0)
    assert found.num_tokens == len(PROMPT) + 3 + 89


def test_calibration_without_text_or_with_overflow_is_refused(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    ops = Ops.select(Site.of(CONFIG, 64, torch.float32, CPU), {})
    weights = load_weights(checkpoint, CONFIG, dtype=torch.float32, progress=False)
    with pytest.raises(ValueError, match="needs text"):
        calibrate(CONFIG, weights, ops, [[]])
    weights.layers[1].down.weight[3] = 3e38
    weights.layers[1].o.weight[3] = 3e38
    with pytest.raises(ValueError, match="NaN or infinity in layer"):
        calibrate(CONFIG, weights, ops, [PROMPT])


# ---- nothing half


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "in")


def test_out_of_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*args: Any, **options: Any) -> None:
        calls.append(1)
        Path(args[1]).write_bytes(b"half")
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_fp8(open_checkpoint(source), tmp_path / "out", shard_bytes=50_000)
    assert leftovers(tmp_path) == []


def test_interrupted_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_fp8(open_checkpoint(source), tmp_path / "out", advance=interrupt)
    assert leftovers(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from nemo_engine.checkpoint import export
from nemo_engine.checkpoint.checkpoint import open_checkpoint
export._copy_beside = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
export.export_fp8(open_checkpoint(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_leaves_nothing_that_loads(source: Path, tmp_path: Path) -> None:
    """All weights are written by then, and the configuration is not."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = leftovers(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        open_checkpoint(tmp_path / left)


def test_what_is_there_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        export_fp8(open_checkpoint(source), source)
    out = tmp_path / "out"
    export_fp8(open_checkpoint(source), out)
    with pytest.raises(ValueError, match="is quantised already"):
        export_fp8(open_checkpoint(out), tmp_path / "again")
    assert os.stat(out).st_mode & 0o777 == 0o755


def test_not_finite_weights_are_refused_by_name(tmp_path: Path) -> None:
    state = random_state_dict(CONFIG, dtype=torch.bfloat16)
    state["model.layers.1.mlp.gate_proj.weight"][2, 3] = torch.inf
    with pytest.raises(ValueError, match="gate_proj.weight holds NaN or infinity"):
        export_fp8(open_checkpoint(write_hf(tmp_path / "in", CONFIG, state)), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_tied_head_in_fp8_becomes_its_own(tmp_path: Path) -> None:
    """Untied, as the embeddings stay what they are."""
    config = tiny_config(tie_word_embeddings=True, dtype="bfloat16")
    state = random_state_dict(config, dtype=torch.bfloat16)
    source = open_checkpoint(write_hf(tmp_path / "in", config, state))
    export_fp8(source, tmp_path / "out", quantize_lm_head=True)
    written = open_checkpoint(tmp_path / "out")
    assert not written.model_config.tie_word_embeddings
    numbers, scales = quantise(state["model.embed_tokens.weight"], "channel")
    weights = load_weights(written, written.model_config, dtype=torch.bfloat16, progress=False)
    assert isinstance(weights.lm_head, Fp8Linear) and weights.lm_head.scales.equal(scales)
    assert weights.lm_head.weight.view(torch.uint8).equal(numbers.view(torch.uint8))
    export_fp8(source, tmp_path / "dense head")
    assert open_checkpoint(tmp_path / "dense head").model_config.tie_word_embeddings


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"head_dim": 32, "num_heads": 6},
            "needs whole blocks of 128 rows in what is fused, and .*q_proj.weight has 192",
        ),
        ({"hidden_size": 200}, "needs rows of whole blocks of 128, and .*q_proj.weight has 200 columns"),
    ],
)
def test_sizes_that_no_blocks_fit_are_refused(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    config = replace(CONFIG, **sizes)
    source = write_hf(tmp_path / "in", config, random_state_dict(config, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=f"scheme 'block' {message}"):
        export_fp8(open_checkpoint(source), tmp_path / "out", scheme="block")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_real_failure_to_write_is_one_line(source: Path, tmp_path: Path) -> None:
    """The library that writes has exceptions of its own."""
    command = f"ulimit -f 100; exec {sys.executable} -m nemo_engine quantize {source} {tmp_path / 'out'}"
    run = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "cannot be written" in run.stderr
    assert leftovers(tmp_path) == []


def test_scales_of_keys_and_values_are_not_lost(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.{x}_scale" for layer in range(2) for x in "kv"]
    state = random_state_dict(CONFIG, dtype=torch.bfloat16) | {name: torch.tensor([0.5]) for name in names}
    source = write_hf(tmp_path / "in", CONFIG, state)
    with pytest.raises(
        ValueError, match=r"kv_scales 'none' would lose .*model.layers.0.self_attn.k_scale\): calibrate"
    ):
        quantize_checkpoint(source, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_where_it_goes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to an empty directory, the working directory; not below a file, which is noticed before anything is
    computed.
    """
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    quantize_checkpoint(source, tmp_path / "link")
    assert (tmp_path / "real" / "config.json").exists() and (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "FP8 weights" in quantize_checkpoint(source, ".")
    assert (tmp_path / "here" / "config.json").exists()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "real" / "config.json"
    with pytest.raises(ValueError, match=f"{file / 'out'} cannot be made: {file} is not a directory"):
        quantize_checkpoint(source, file / "out")


def test_calibration_keeps_to_the_models_context_and_vocabulary(tmp_path: Path) -> None:
    tekken = BUNDLED["nemo-tiny"] / "tekken.json"
    short = tiny_config(vocab_size=6144, max_position_embeddings=32)
    source = write_hf(tmp_path / "in", short, random_state_dict(short))
    with pytest.raises(ValueError, match="has no tokenizer, which calibration needs: give tokenizer"):
        quantize_checkpoint(source, tmp_path / "out", scheme="static", texts=["text " * 100])
    line = quantize_checkpoint(source, tmp_path / "out", scheme="static", texts=["text " * 100], tokenizer=tekken)
    tokens = int(line.partition("calibrated on ")[2].split()[0])
    assert 100 < tokens - len(range(0, tokens, 32)) <= 200  # each piece of 32 begins with one that is not text
    small = write_hf(tmp_path / "small", tiny_config(), random_state_dict(tiny_config()))
    with pytest.raises(ValueError, match=r"makes token \d+, and the model's vocab_size is 97"):
        quantize_checkpoint(small, tmp_path / "not", scheme="static", texts=["text"], tokenizer=tekken)


# ---- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.md"
    text.write_text("The standard library of Python is large. " * 50)
    out = tmp_path / "out"
    args = ["quantize", "nemo-tiny", str(out), "--scheme", "static", "--kv-scales", "head", "--calibrate", str(text)]
    assert main(args) == 0
    assert "static scales of inputs, FP8 keys and values, calibrated on" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"
    assert (out / "tekken.json").read_bytes() == (BUNDLED["nemo-tiny"] / "tekken.json").read_bytes()
    assert main(["generate", str(out), "--prompt", "The function returns", "--max-tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--scheme", "static"], "needs text to calibrate on, and there is none"),
        (["--kv-scales", "tensor"], "needs text to calibrate on, and there is none"),
        (["--calibrate", "/etc/hostname"], "needs no text to calibrate on, and there is some"),
        (["--scheme", "static", "--calibrate", "/nowhere"], "--calibrate /nowhere cannot be read: No such file"),
        (["--scheme", "static", "--calibrate", "/dev/null"], "texts must have at least 1 token to calibrate on, got 0"),
        (["--scheme", "static", "--calibrate", sys.executable], "--calibrate must be text in UTF-8"),
        (
            ["--calibration-tokens", "0", "--scheme", "static", "--calibrate", "/etc/hostname"],
            "max_tokens must be at least 1",
        ),
    ],
)
def test_bad_commands(extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "nemo-tiny", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
