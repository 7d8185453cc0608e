"""The accuracy contract: what FP8 costs on the bundled model, and that a fault in FP8 would not pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine import verify as verify_module
from nemo_engine.cli import main
from nemo_engine.model.checkpoint import BUNDLED, open_checkpoint
from nemo_engine.model.export import export_fp8
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.weights import NemoWeights
from nemo_engine.verify import Hidden, Limits, Measured, compare, judge, make_material, verify

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


def test_a_checkpoint_that_is_fp8_is_measured_against_its_dequantised_weights(tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    export_fp8(open_checkpoint("nemo-tiny"), out)
    stored = verify(out, text=SHORT, max_context=1, device="cpu", limits=Limits(100, 100, 0))
    online = verify("nemo-tiny", text=SHORT, max_context=1, device="cpu", limits=Limits(100, 100, 0))
    assert stored[1].perplexity == pytest.approx(online[1].perplexity, rel=1e-5), "the same FP8 numbers"
    assert stored[0].perplexity != online[0].perplexity, "another reference"
    assert stored[1].mean_kl < online[1].mean_kl, "only the inputs' rounding is between them"


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
    tokenizer = verify_module.load_tokenizer(BUNDLED["nemo-tiny"])
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


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--text", "/dev/null"], "text must have at least 2 tokens"),
        (["--max-context", "0"], "max_context must be at least 1"),
        (["--plot", "x.pdf"], "--plot must end in .png or .svg"),
        (["--text", "/nowhere"], "No such file"),
        (["--device", "cuda"], "device 'cuda' is not there"),
    ],
)
def test_bad_commands(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "nemo-tiny", *extra]) == 2
    assert message in capsys.readouterr().err
