"""The accuracy contract: what FP8 costs on the bundled model, and that a fault in FP8 would not pass."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_engine.checkpoint.checkpoint import BUNDLED, open_checkpoint
from nemo_engine.checkpoint.export import export_fp8
from nemo_engine.cli import main
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.weights import NemoWeights
from nemo_engine.text import load_tokenizer
from nemo_engine.verify import Limits, Measured, report, verify
from nemo_engine.verify import measure as verify_module
from nemo_engine.verify.material import make_material
from nemo_engine.verify.measure import Hidden, compare, judge
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.fp8_checkpoints import write_fp8

ANY = Limits(100, 100, 0)


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of the stored prompts, where figures are compared with each other and not with limits."""
    material_for = verify_module.material_for

    def first(*args: Any) -> Any:
        material = material_for(*args)
        return replace(material, prompts=material.prompts[:8])

    monkeypatch.setattr(verify_module, "material_for", first)


SHORT = (
    "The module provides functions for reading and writing files. If the file does not exist, an error is raised. " * 4
)


def test_the_contract_holds_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP8 weights: 1 % of perplexity, 97 % of the likeliest tokens; keys and values: half a percent more."""
    files = [tmp_path / "out.json", tmp_path / "out.png", tmp_path / "out.svg"]
    args = ["verify", "nemo-tiny", "--device", "cpu", "--max-context", "512", "--json", str(files[0])]
    assert main([*args, "--plot", str(files[1])]) == 0
    found = json.loads(files[0].read_text())
    reference, weights, kv, both = found["configurations"]
    assert reference["max_error"] == 0 and reference["top1"] == 1 and reference["mean_kl"] == 0
    assert 0 < weights["perplexity_change"] < 1 and 0.97 <= weights["top1"] < 1
    assert abs(kv["perplexity_change"]) < 0.5 and both["perplexity"] < 1.005 * weights["perplexity"]
    assert 0 < kv["mean_kl"] < weights["mean_kl"] < both["mean_kl"] < 0.01
    assert (
        set(reference["retrieval"]) == {"512"} and abs(both["retrieval"]["512"] - reference["retrieval"]["512"]) < 0.3
    )
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "FP8 weights, keys and values" in capsys.readouterr().out


def test_the_stored_results_meet_the_contract() -> None:
    stored = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "verify-nemo-tiny.json").read_text())
    reference, weights, kv, both = stored["configurations"]
    assert stored["commit"] and not any(each["faults"] for each in stored["configurations"])
    assert weights["perplexity"] < 1.01 * reference["perplexity"] and weights["top1"] >= 0.97
    assert kv["perplexity"] < 1.005 * reference["perplexity"] and both["perplexity"] < 1.005 * weights["perplexity"]
    assert len(reference["retrieval"]) == len(both["retrieval"]) == 3


@pytest.mark.usefixtures("few_prompts")
def test_a_checkpoint_that_is_fp8_is_measured_against_its_dequantised_weights(tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    export_fp8(open_checkpoint("nemo-tiny"), out)
    stored = verify(out, text=SHORT, max_context=1, device="cpu", limits=Limits(100, 100, 0))
    online = verify("nemo-tiny", text=SHORT, max_context=1, device="cpu", limits=Limits(100, 100, 0))
    assert stored[1].perplexity == pytest.approx(online[1].perplexity, rel=1e-5), "the same FP8 numbers"
    assert stored[0].perplexity != online[0].perplexity, "another reference"
    assert stored[1].mean_kl < online[1].mean_kl, "only the inputs' rounding is between them"
    # Against what it was made of, figures are those of that checkpoint quantised while it loads.
    made_of = verify(out, against="nemo-tiny", text=SHORT, max_context=1, device="cpu", limits=ANY)
    assert made_of[0].name == "bfloat16 of nemo-tiny"
    assert [replace(each, name="") for each in made_of] == [replace(each, name="") for each in online]


def test_a_fault_in_fp8_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Some rows of one projection of one layer beside their scales' rows."""
    load = verify_module.load_weights

    def broken(*args: Any, **options: Any) -> NemoWeights:
        weights = load(*args, **options)
        linear = weights.layers[1].down
        if not isinstance(linear, Fp8Linear):
            return weights
        order = torch.arange(linear.out_features)
        order[:100] = order[:100].roll(1)
        fixed = Fp8Linear(linear.weight[order], linear.scales)
        layers = list(weights.layers)
        layers[1] = replace(layers[1], down=fixed)
        return replace(weights, layers=tuple(layers))

    monkeypatch.setattr(verify_module, "load_weights", broken)
    code = main(["verify", "nemo-tiny", "--device", "cpu", "--max-context", "1"])
    output = capsys.readouterr().out
    assert code == 1 and "FAILED FP8 weights: " in output


def test_figures_against_worked_out_ones() -> None:
    """Two sequences over a vocabulary of three, worked out by hand."""
    tokenizer = load_tokenizer(BUNDLED["nemo-tiny"])
    assert tokenizer is not None
    material = replace(
        make_material(tokenizer, SHORT, 1, 1), prompts=[[0, 1]], texts=[[2, 0, 1]], retrieval=[(8, [0, 1, 2], 1)]
    )
    wanted = [torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]] * 3), torch.zeros(3, 3)]
    ours = [wanted[0].clone(), wanted[1].clone(), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])]
    ours[1][2] = torch.tensor([2.0, 0.0, 1.0])
    states = [[torch.stack([x, x]) for x in part] for part in (ours, wanted)]
    hidden, reference = (Hidden(part, lambda x: x[0]) for part in states)
    found = compare("x", hidden, reference, material, 3)
    assert (found.num_tokens, found.max_error, found.top1) == (5, 2.0, 0.8)
    assert found.mean_error == pytest.approx(2 / 15)
    p, q = wanted[1][2].softmax(0), ours[1][2].softmax(0)
    kl = float((p * (p / q).log()).sum())
    assert found.max_kl == pytest.approx(kl, rel=1e-5) and found.mean_kl == pytest.approx(kl / 5, rel=1e-5)
    nll = -(wanted[1][0].log_softmax(0)[0] + wanted[1][1].log_softmax(0)[1]) / 2
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    # One of the three numbers; what is left is divided among three.
    assert found.retrieval == {8: pytest.approx(float(ours[2][1].log_softmax(0)[2]) / 3)}


def test_limits() -> None:
    def judged(*perplexities: float, top1: float = 0.99) -> list[list[str]]:
        results = [Measured(str(index), perplexity=value, top1=top1) for index, value in enumerate(perplexities)]
        judge(results, Limits())
        return [found.faults for found in results]

    assert judged(10, 10.09, 10.04, 10.13) == [[], [], [], []]
    assert [bool(faults) for faults in judged(10, 10.11, 10.04, 10.13)] == [False, True, False, False]
    assert [bool(faults) for faults in judged(10, 10.09, 10.06, 10.13)] == [False, False, True, False]
    assert [bool(faults) for faults in judged(10, 10.09, 10.04, 10.15)] == [False, False, False, True]
    assert [bool(faults) for faults in judged(10, 10, 10, 10, top1=0.969)] == [False, True, True, False]


def random_model(path: Path, *, has_tokenizer: bool = True, scale: float = 1.0, **changes: Any) -> Path:
    """A random model, with the bundled one's tokenizer; scale: of what the last layer's values are multiplied by."""
    config = tiny_config(**{"vocab_size": 6145, "bos_token_id": 1} | changes)
    state = random_state_dict(config)
    state["model.layers.1.self_attn.v_proj.weight"] *= scale
    write_hf(path, config, state)
    if has_tokenizer:
        shutil.copy(BUNDLED["nemo-tiny"] / "tekken.json", path)
    return path


def test_the_reference_by_its_dtype(tmp_path: Path) -> None:
    path = random_model(tmp_path, max_position_embeddings=64)
    found = verify(path, against="bf16", text=SHORT, max_context=1, device="cpu", limits=ANY)
    assert found[0].name == "bfloat16" and found[0].max_error == 0 and found[1].max_error > 0


def test_blocks_of_a_checkpoint_without_them_are_a_conflict(tmp_path: Path) -> None:
    config = tiny_config()
    write_fp8(tmp_path, config, random_state_dict(config), "fp8 dynamic")
    with pytest.raises(ValueError, match="quantization 'fp8_block' conflicts with .* a scale per tensor"):
        verify(tmp_path, quantization="fp8_block", device="cpu")


@pytest.mark.usefixtures("few_prompts")
def test_scales_of_keys_and_values_are_the_models(tmp_path: Path) -> None:
    """An FP8 checkpoint is measured, also where its weights are those of the reference."""
    config = tiny_config(vocab_size=6145, head_dim=64)
    state = random_state_dict(config, seed=1)
    write_hf(tmp_path / "dense", config, state)
    write_fp8(tmp_path / "fp8", config, state, "fp8 dynamic", kv="tensor")
    for name in ("dense", "fp8"):
        shutil.copy(BUNDLED["nemo-tiny"] / "tekken.json", tmp_path / name)
    ones = load_file(tmp_path / "fp8" / "model.safetensors")
    ones |= {name: torch.tensor(1e-4) for name in ones if name.endswith(("k_scale", "v_scale"))}
    options: dict[str, Any] = {"text": SHORT, "max_context": 1, "device": "cpu", "limits": ANY}
    fitting = verify(tmp_path / "fp8", against=tmp_path / "dense", **options)[2]
    save_file(ones, tmp_path / "fp8" / "model.safetensors")
    saturated = verify(tmp_path / "fp8", against=tmp_path / "dense", **options)[2]
    assert 0 < fitting.mean_kl < 0.01 < saturated.mean_kl


def test_a_short_context_and_an_odd_vocabulary(tmp_path: Path) -> None:
    path = random_model(tmp_path, max_position_embeddings=300)
    found = verify(path, device="cpu", limits=ANY)
    assert all(each.num_tokens > 1900 and math.isfinite(each.perplexity) and not each.retrieval for each in found)
    assert "found at" not in report(found)


@pytest.mark.usefixtures("few_prompts")
def test_without_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = random_model(tmp_path, has_tokenizer=False, vocab_size=97)
    found = verify(path, device="cpu", limits=ANY, max_context=512)
    assert "has no tokenizer: words become tokens" in caplog.text
    assert found[0].num_tokens > 1000 and set(found[1].retrieval) == {512} and 0 < found[1].mean_kl < 0.1
    given = verify(
        random_model(tmp_path / "other", has_tokenizer=False), text=SHORT, device="cpu", limits=ANY, max_context=1,
        tokenizer=BUNDLED["nemo-tiny"],
    )  # fmt: skip
    assert given[0].num_tokens < found[0].num_tokens


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"makes token \d+, and the model's vocab_size is 97: give its own"):
        verify(random_model(tmp_path, vocab_size=97), device="cpu")


def test_another_model_as_the_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="against: vocab_size of .* must be that of .*, 6144, got 6145"):
        verify("nemo-tiny", against=random_model(tmp_path), device="cpu")
    with pytest.raises(
        ValueError, match="against must be one of auto, bf16, .* or a checkpoint: model 'bf17' does not"
    ):
        verify("nemo-tiny", against="bf17", device="cpu")


@pytest.mark.usefixtures("few_prompts")
def test_what_overflows_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN in the reference; and in FP8 alone, beside which the reference has figures, retrieval among them."""
    path = random_model(tmp_path / "in", scale=1e38)
    json_file = tmp_path / "out.json"
    args = ["verify", str(path), "--device", "cpu", "--max-context", "512", "--json", str(json_file)]
    assert main([*args, "--plot", str(tmp_path / "out.svg")]) == 1
    assert "FAILED FP8 keys and values: the reference's logits hold NaN or infinity" in capsys.readouterr().out
    found = json.loads(json_file.read_text(), parse_constant=pytest.fail)
    assert found["configurations"][0]["mean_kl"] is None and found["configurations"][0]["faults"]
    reference = Measured("bf16", 9, 0, 0, 0, 0, 1, 10.0, retrieval={512: -1.0})
    broken = Measured("FP8", faults=["logits hold NaN or infinity"])
    results = [reference, broken, replace(reference, faults=[]), broken]
    judge(results, Limits())
    assert broken.faults == ["logits hold NaN or infinity"] and not results[2].faults
    assert "nan" in report(results)


def test_a_perplexity_beyond_all_numbers(tmp_path: Path) -> None:
    path = random_model(tmp_path)
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] *= 1e5
    save_file(state, path / "model.safetensors")
    found = verify(path, text=SHORT, device="cpu", max_context=1)
    assert found[0].perplexity == math.inf and any("perplexity is nan %" in fault for fault in found[1].faults)


def test_a_change_is_told_beside_a_fault() -> None:
    results = [Measured(str(index), perplexity=value, top1=0.9) for index, value in enumerate((10, 10.05, 10.04, 10.2))]
    judge(results, Limits())
    assert results[3].perplexity_change == pytest.approx(2) and "above that of 1" in results[3].faults[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perplexity": math.nan}, "limit perplexity must be at least 0 and finite, got nan"),
        ({"kv_perplexity": -1.0}, "limit kv_perplexity must be at least 0 and finite, got -1.0"),
        ({"top1": 97.0}, "limit top1 must be at least 0 and at most 1, got 97.0"),
    ],
)
def test_limits_that_limit_nothing_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**changes)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: there is no directory /nowhere"),
        (["--json", "/tmp"], "--json must be a file, and /tmp is a directory"),
        (["--plot", "/nowhere/out.svg"], "--plot /nowhere/out.svg: there is no directory /nowhere"),
        (["--text", sys.executable], "--text must be text in UTF-8"),
        (["--tokenizer", "/nowhere"], "tokenizer '/nowhere' does not exist"),
        (["--max-perplexity", "nan"], "limit perplexity must be at least 0 and finite"),
        (["--text", "/dev/null"], "text must have at least 2 tokens"),
        (["--max-context", "0"], "max_context must be at least 1"),
        (["--plot", "x.pdf"], "--plot must end in .png or .svg"),
        (["--text", "/nowhere"], "--text /nowhere cannot be read: No such file"),
        (["--device", "cuda"], "device 'cuda' is not there"),
    ],
)
def test_bad_commands(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "nemo-tiny", *extra]) == 2
    assert message in capsys.readouterr().err
