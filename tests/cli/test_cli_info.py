"""``nemo-engine info``: numbers of the bundled model, and the table of what fits."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.checkpoint.checkpoint import BUNDLED
from nemo_engine.cli import info, main
from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import plan_kv_cache
from nemo_engine.planner.gpus import GPUS
from nemo_engine.planner.models import BUILT_IN, formats_of, read_model
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nemo-tiny", "--gib", "16", "--gib", "0.001"]) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line[:20] and not line.startswith(" "))
    assert rows["heads"].strip() == "8 query, 2 KV, of 128"
    # embedding and head; per layer norms, q, k, v, o and the MLP; the last norm
    expected = 2 * 6144 * 256 + 4 * (2 * 256 + 256 * (1024 + 2 * 256) + 1024 * 256 + 3 * 256 * 640) + 256
    assert rows["parameters"].strip().startswith(f"{expected:,} in 39 tensors")
    assert f"({2 * expected:,} bytes)" in rows["weights"]
    assert rows["KV cache"].strip().startswith("4,096 bytes per token in bf16; 512.00 MiB for 131072")
    assert "v3" in rows["tokenizer"] and "fingerprint" in rows["tokenizer"]
    assert rows["runs"].strip() == "yes" and rows["bos, eos"].strip() == "1, 2"
    small, large = out.splitlines()[-1], out.splitlines()[-2]
    assert small.startswith("0.001 GiB") and small.count("no, by") == 3
    assert large.startswith("16 GiB") and f"{planned_tokens(16 << 30):,}, context 131,072" in large
    assert err == ""


def planned_tokens(free: int) -> int:
    model, config = read_model("nemo-tiny"), EngineConfig()
    return plan_kv_cache(model.config, config, formats_of(model, config).sizes, free)[0] * config.page_size


def test_sizes_without_weights_follow_from_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(BUNDLED["nemo-tiny"] / "config.json", tmp_path)
    assert main(["info", "nemo-tiny"]) == 0
    whole = capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"no: {tmp_path} holds no checkpoint that can be read: it has no weights at all" in out
    assert "(by the configuration)" in out and "(by the file headers)" in whole
    assert "none: token ids only" in out

    def sizes(text: str) -> list[str]:
        return [line.partition(" (by")[0] for line in text.splitlines() if line.startswith(("parameters", "weights"))]

    assert sizes(out) == sizes(whole)


def test_what_fits_for_nemo_12b(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nemo"]) == 0
    out = capsys.readouterr().out
    table = {line.split()[0]: line for line in out.splitlines() if line.startswith(tuple(GPUS))}
    assert set(table) == set(GPUS)
    # 22.8 GiB of weights and the reserve are more than the card has; in FP8 they are not
    assert "no, by" in table["rtx4090"] and table["rtx4090"].count("context") == 2
    assert table["h100"].count("context 131,072") == 3
    no_fp8 = {name for name, gpu in GPUS.items() if gpu.fp8_flops_per_s is None}
    assert no_fp8 == {name for name, line in table.items() if line.count("no FP8 here") == 2} and "a100" in no_fp8
    assert info.context_of(BUILT_IN["nemo"]) == 131072


def test_an_answer_needs_no_torch(tmp_path: Path) -> None:
    config = tiny_config()
    write_hf(tmp_path / "good", config, random_state_dict(config))
    write_hf(tmp_path / "bad", config, random_state_dict(config), intermediate_size=41)
    for model, code, words in (
        ("nemo-tiny", 0, "yes"),
        ("good", 0, "yes"),
        ("bad", 1, "expected [41, 24], found [40, 24]"),
    ):
        script = (
            f"import sys; from nemo_engine.cli import main; print(main(['info', {model!r}]), 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"{code} False"
        assert words in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "Qwen has biases or norms .*serve it with vLLM",
        ),
        ({"sliding_window": 4096}, "sliding_window is not supported"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "4-bit integers by AWQ; take the unquantised"),
    ],
)
def test_what_would_be_refused_and_why(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    write_hf(tmp_path, config, random_state_dict(config), **change)
    assert main(["info", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert re.search(f"runs +no: .*{words}", out) and err == ""


@pytest.mark.parametrize("gib", ["0", "-1", "inf", "nan", "x"])
def test_bad_memory(gib: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["info", "nemo-tiny", f"--gib={gib}"])
    assert "--gib" in capsys.readouterr().err


def test_a_path_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "nothing")]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "nothing") in err and err.count("\n") == 1
