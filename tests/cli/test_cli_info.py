"""``nemo-engine info``: numbers of the bundled model, and the table of what fits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_engine.cli import info, main
from nemo_engine.config import ModelConfig
from nemo_engine.model.checkpoint import BUNDLED

NEMO_12B = ModelConfig(
    vocab_size=131072, hidden_size=5120, num_layers=40, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336,
    rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=1024000, dtype="bfloat16",
    bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nemo-tiny", "--gib", "0.5", "--gib", "0.001"]) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line[:20] and not line.startswith(" "))
    assert rows["heads"].strip() == "8 query, 2 KV, of 128"
    # embedding and head; per layer norms, q, k, v, o and the MLP; the last norm
    expected = 2 * 6144 * 256 + 4 * (2 * 256 + 256 * (1024 + 2 * 256) + 1024 * 256 + 3 * 256 * 640) + 256
    assert rows["parameters"].strip().startswith(f"{expected:,} in 39 tensors")
    assert f"({2 * expected:,} bytes)" in rows["weights"]
    assert rows["KV cache"].strip().startswith("4,096 bytes per token in bf16; 512.00 MiB for 131072")
    assert "v3" in rows["tokenizer"] and "fingerprint" in rows["tokenizer"]
    assert "weights do not fit" in out.splitlines()[-1]
    assert f"{((1 << 29) - 2 * expected) // 4096:,}" in out.splitlines()[-2]
    assert err == ""


def test_sizes_without_weights_follow_from_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(BUNDLED["nemo-tiny"] / "config.json", tmp_path)
    assert main(["info", "nemo-tiny"]) == 0
    whole = capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "(by the configuration)" in out and "(by the file headers)" in whole
    assert "none: token ids only" in out

    def sizes(text: str) -> list[str]:
        return [line.partition(" (by")[0] for line in text.splitlines() if line.startswith(("parameters", "weights"))]

    assert sizes(out) == sizes(whole)


def test_what_fits_for_nemo_12b() -> None:
    weights = 24_495_564_800
    lines = info.fits(NEMO_12B, weights, [16, 24, 80])
    assert lines[2].split() == ["16", "-", "weights", "do", "not", "fit", "-"]
    tokens = (80 * info.GIB - weights) // 163840
    assert lines[4].split() == ["80", f"{80 - weights / info.GIB:.2f}", f"{tokens:,}", f"{tokens / 131072:.2f}"]
    assert info.context_of(NEMO_12B) == 131072


@pytest.mark.parametrize("gib", ["0", "-1", "inf", "nan", "x"])
def test_bad_memory(gib: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["info", "nemo-tiny", f"--gib={gib}"])
    assert "--gib" in capsys.readouterr().err


def test_a_path_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "nothing")]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "nothing") in err and err.count("\n") == 1
