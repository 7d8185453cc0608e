"""What a benchmark's MODEL may be: a checkpoint's directory, the bundled model, or a published shape that gets random
weights.

Benchmarks of speed need a model's shape and not its weights, so a shape is enough: a folder with nothing but its
config.json.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemo_engine.config import ModelConfig
from nemo_engine.planner.models import BUILT_IN

TINY = ModelConfig(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128,
    rope_theta=1e6, rms_norm_eps=1e-5, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
    bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip
SHAPES = {**BUILT_IN, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class BenchModel:
    """``path`` holds a config.json; weights too, unless ``is_dummy``."""

    name: str
    path: Path
    vocab_size: int
    is_dummy: bool


def open_model(name: str) -> BenchModel:
    """What ``name`` says. The folder of a shape lives as long as the process.

    ``ValueError`` for what is none of the three.
    """
    if name in SHAPES:
        folder = Path(tempfile.mkdtemp(prefix=f"nemo-engine-{name}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / "config.json").write_text(json.dumps(config_json(SHAPES[name])))
        return BenchModel(name, folder, SHAPES[name].vocab_size, True)
    path = Path(str(files("nemo_engine") / "assets" / "nemo-tiny")) if name == "nemo-tiny" else Path(name).expanduser()
    if not (path / "config.json").is_file():
        shapes = ", ".join(SHAPES)
        raise ValueError(
            f"model must be nemo-tiny, a directory with a config.json, or a shape with random weights ({shapes}), got "
            f"{name!r}"
        )
    return BenchModel(name, path, int(json.loads((path / "config.json").read_text())["vocab_size"]), False)


def config_json(model: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json, as transformers and other engines read it."""
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "sliding_window": None,
        "vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size, "rope_theta": model.rope_theta, "rms_norm_eps":
        model.rms_norm_eps, "max_position_embeddings": model.max_position_embeddings, "tie_word_embeddings":
        model.tie_word_embeddings, "torch_dtype": model.dtype, "bos_token_id": model.bos_token_id, "eos_token_id":
        list(model.eos_token_ids)[0],
    }  # fmt: skip
