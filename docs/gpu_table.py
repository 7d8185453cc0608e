"""Which GPU NeMo 12B needs: the README's table, by the planner. ``python docs/gpu_table.py`` prints it."""

from __future__ import annotations

from nemo_engine.config import EngineConfig
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.models import read_model
from nemo_engine.planner.plan import Load, make_plan

# As sold; a GPU of that size, and the GiB that the driver has where that GPU has more.
_SIZES = (
    ("16 GB", "rtx4090", 15.6, "RTX 4080, A4000"),
    ("24 GB", "rtx4090", None, "RTX 4090, L4"),
    ("48 GB", "l40s", None, "L40S, A40"),
    ("80 GB", "h100", None, "A100, H100"),
    ("141 GB", "h200", None, "H200"),
)
_FORMATS: tuple[dict[str, str], ...] = ({}, {"quantization": "fp8", "kv_cache_dtype": "fp8"})
_LOAD = Load(1500, 500)


def table() -> str:
    """The table, in Markdown."""
    model = read_model("nemo")
    lines = [
        "| memory | for example | bf16: longest context, chats at once | FP8 weights and cache |",
        "|---|---|---|---|",
    ]
    for sold, name, memory_gib, examples in _SIZES:
        cells = []
        for formats in _FORMATS:
            options: dict[str, object] = {"max_model_len": "auto", "max_num_seqs": 64, "max_num_batched_tokens": 2048}
            config = EngineConfig(**options, **formats)  # type: ignore[arg-type]
            try:
                plan = make_plan(model, find_gpu(name, memory_gib), config, _LOAD)
            except ValueError:  # the chats are longer than what fits
                plan = None
            if plan is None or plan.shortage is not None:
                cells.append("does not fit")
            else:
                chats = plan.capacity_tokens // (_LOAD.input_tokens + _LOAD.output_tokens)
                cells.append(f"{plan.max_model_len:,} tokens, {chats} chats")
        lines.append(f"| {sold} | {examples} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
