"""The machine code of our kernels, read on a machine without a GPU; and steps on tensors without data."""

from __future__ import annotations

import dataclasses
import os
import random
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)


from nemo_engine.benchmarks import kernel_report  # noqa: E402
from nemo_engine.config import EngineConfig  # noqa: E402
from nemo_engine.memory_plan import wide_graph_sizes  # noqa: E402
from nemo_engine.ops.attention import AttentionMeta  # noqa: E402
from nemo_engine.ops.paged_kv import PagedKV  # noqa: E402
from nemo_engine.ops.rope import RopeMeta  # noqa: E402
from nemo_engine.sampling_params import SamplingParams  # noqa: E402
from nemo_engine.step import PrefillRow, SlotFill, StepPlan  # noqa: E402


@pytest.fixture(scope="module")
def current() -> tuple[list[str], dict[tuple[str, str], Any]]:
    """The report of these sources: the stored one if it has their digest, or else a new one. And what was compiled of
    it now: one kernel, another for each digest; none where all are new.
    """
    stored = kernel_report.STORED.read_text().splitlines()
    kernels = sorted({line.split()[0] for line in stored[1:]})
    chosen = kernels[int(stored[0].split()[-1], 16) % len(kernels)]
    digest, variants = kernel_report.launches(f"_{chosen}")
    if stored != kernel_report.titled(digest, stored[1:]):
        return kernel_report.report(), {}
    return stored, {key: code for key, code in variants.items() if key[0] == f"_{chosen}"}


@pytest.fixture(scope="module")
def lines(current: tuple[list[str], Any]) -> list[str]:
    return current[0]


def test_the_machine_code_is_the_one_that_was_reviewed(current: tuple[list[str], dict[tuple[str, str], Any]]) -> None:
    lines, compiled = current
    stored = kernel_report.STORED.read_text().splitlines()
    version, own = (title.rpartition(" ")[0] for title in (stored[0], lines[0]))
    if version != own:
        pytest.skip(f"the stored report is of {version}, this is {own}")
    changed = sorted(set(lines) ^ set(stored))
    assert not changed, "run `make kernel-report` and review its difference:\n" + "\n".join(changed)
    new = [kernel_report.inspect(*key, code).line() for key, code in compiled.items()]
    assert new and set(new) == set(of(stored, new[0].split()[0]))


def of(lines: list[str], kernel: str) -> list[str]:
    found = [line for line in lines[1:] if line.split()[0] == kernel]
    assert found, kernel
    return found


def count(line: str, name: str) -> int:
    found = re.search(rf" {re.escape(name)}:(\d+)", line)
    return int(found.group(1)) if found else 0


OF_A_LAYER = (
    "rms_norm_kernel", "split_kernel", "persistent_kernel", "rope_kernel", "decode_kernel", "prefill_kernel",
    "quantize_kernel", "silu_mul_kernel",
)  # fmt: skip


def test_nothing_spills(lines: list[str]) -> None:
    assert len(lines) > 100
    for line in lines[1:]:
        assert "spills 0 " in line and not count(line, "LDL") and not count(line, "STL"), line


def test_tensor_cores_are_used_as_meant(lines: list[str]) -> None:
    for line in of(lines, "prefill_kernel"):
        assert count(line, "HGMMA") and not count(line, "HMMA") and count(line, "LDGSTS"), line
    for line in of(lines, "decode_kernel"):  # a tile of 16 rows: smaller than Hopper's instruction
        assert count(line, "HMMA") and count(line, "LDGSTS"), line
    for line in [*of(lines, "split_kernel"), *of(lines, "persistent_kernel")]:
        is_fp8 = "SCALES=none" not in line
        assert count(line, "QGMMA" if is_fp8 else "HGMMA") and count(line, "UTMALDG"), line
        assert not count(line, "HGMMA" if is_fp8 else "QGMMA"), line


def test_attention_widens_two_fp8_numbers_at_a_time(lines: list[str]) -> None:
    """To bf16 each takes an instruction of its own, of which an SM does 16 a cycle: as many cycles as the products."""
    for kernel in ("prefill_kernel", "decode_kernel"):
        assert [line for line in of(lines, kernel) if "fp8e4nv" in line]
        assert not [line for line in of(lines, kernel) if count(line, "F2F.BF16")]


@pytest.mark.parametrize("kernel", OF_A_LAYER)
def test_kernels_of_a_layer_begin_before_the_one_before_has_ended_and_touch_nothing_until_then(
    lines: list[str], kernel: str
) -> None:
    for line in of(lines, kernel):
        assert " early -  | " in line and "DEPENDENT=True" in line, line


@pytest.mark.parametrize(
    "kernel", ["rms_norm_kernel", "silu_mul_kernel", "quantize_kernel", "rope_kernel", "prefill_kernel"]
)
def test_dense_rows_move_16_bytes_a_thread(lines: list[str], kernel: str) -> None:
    for line in of(lines, kernel):
        assert count(line, "LDG.E.128") and count(line, "STG.E.128"), line


@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [("rms_norm_kernel", 2), ("silu_mul_kernel", 2), ("rope_kernel", 16), ("decode_kernel", 2), ("survey_kernel", 2)],
)
def test_as_many_blocks_share_an_sm_as_meant(lines: list[str], kernel: str, blocks: int) -> None:
    for line in of(lines, kernel):
        found = re.search(r"blocks/SM +(\d+)", line)
        assert found and int(found.group(1)) >= blocks, line


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_decode_layer_in_fp8_is_ten_launches(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of its attention, which is made once a step, is the eleventh here."""
    launches: list[str] = []
    empty, fp8, fp32, model = kernel_report._empty, torch.float8_e4m3fn, torch.float32, kernel_report.NEMO
    run = triton.runtime.jit.JITFunction.run

    def count_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", count_run)
    hidden, inner, q_size = model.hidden_size, model.intermediate_size, model.q_size
    ops = kernel_report.select_ops(model, EngineConfig(device="cpu"), 90)
    weights = [
        (empty(out, width, dtype=fp8), empty(out, 1, dtype=fp32), None)
        for out, width in ((q_size + 2 * model.kv_size, hidden), (hidden, q_size), (2 * inner, hidden), (hidden, inner))
    ]
    ints, x = empty(rows, dtype=torch.int64), empty(rows, hidden)
    cache = empty(100, model.num_kv_heads, 64, model.head_dim)
    kv = PagedKV(cache, cache, None, None)
    meta = AttentionMeta(rows, empty(rows + 1, dtype=torch.int64), ints, empty(9, 9, dtype=torch.int64), ints, 64, 9, 1)
    with kernel_report.compile_only(90), kernel_report.listed(90):
        qkv, residual = ops.norm_linear_fp8(x, x, empty(hidden), 1e-5, *weights[0])
        q, k, v = (part.unflatten(1, (-1, 128)) for part in qkv.split([q_size, model.kv_size, model.kv_size], 1))
        q = ops.rope_and_append_kv_(q, k, v, kv, RopeMeta(empty(9, 2, 64, dtype=fp32), ints, ints))
        heads = ops.paged_attention(q, kv, meta, 0.1).flatten(1)
        x, residual = ops.quantize_linear_fp8(heads, *weights[1], residual)
        ops.mlp_fp8(x, residual, empty(hidden), 1e-5, *weights[2:])
    assert len(launches) == 11 and launches.count("_plan_kernel") == 1, launches


def test_occupancy() -> None:
    assert kernel_report.blocks_per_sm(registers=32, shared=0, warps=4) == 16
    assert kernel_report.blocks_per_sm(registers=255, shared=0, warps=8) == 1
    assert kernel_report.blocks_per_sm(registers=33, shared=0, warps=1) == 32  # blocks are the limit
    assert kernel_report.blocks_per_sm(registers=40, shared=104448, warps=4) == 2
    assert kernel_report.blocks_per_sm(registers=40, shared=116 << 10, warps=4) == 1


@pytest.mark.parametrize("capability", [80, 89, 100])
def test_the_engine_compiles_for_other_gpus(capability: int) -> None:
    compiled = kernel_report.collect(capability, [1], [kernel_report.run_engine])
    assert len(compiled) >= 20
    for (kernel, variant), code in compiled.items():
        assert ".local" not in code.asm["ptx"], f"{kernel} {variant}: spills"
        assert f"sm_{capability}" in code.asm["ptx"]
        assert (
            ("griddepcontrol" in code.asm["ptx"])
            == code.metadata.launch_pdl
            == (capability >= 90 and kernel.strip("_") in OF_A_LAYER)
        ), kernel
        assert code.metadata.shared <= kernel_report.GPUS[capability].shared, (
            f"{kernel} {variant}: {code.metadata.shared}"
        )


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"page_size": 16}, {}),
        ({"page_size": 32}, {}),
        ({"page_size": 128}, {}),
        ({}, {"hidden_size": 4096, "vocab_size": 32768}),  # Mistral 7B v0.3
        ({}, {"hidden_size": 4096, "intermediate_size": 11520}),  # Minitron 8B
    ],
)
def test_other_pages_and_siblings_compile_as_well(options: dict[str, Any], changes: dict[str, int]) -> None:
    config = EngineConfig(device="cpu", max_num_seqs=4, max_num_batched_tokens=256, **options)
    with kernel_report.compile_only(90) as compiled:
        kernel_report.meta_runner(dataclasses.replace(kernel_report.NEMO, **changes), config, 90).warm_up((4,))
    for (kernel, variant), code in compiled.items():
        usage = kernel_report.usage_of(code)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{kernel} {variant}: {usage}"
        if kernel in ("_decode_kernel", "_prefill_kernel"):
            ptx = code.asm["ptx"]
            assert "cp.async." in ptx and ("mma.sync" if kernel == "_decode_kernel" else "wgmma.mma_async") in ptx, (
                variant
            )


def test_fp8_is_refused_where_the_gpu_has_none() -> None:
    with pytest.raises(ValueError, match=r"prefer\['rms_norm_fp8'\] = 'triton' cannot serve here: FP8 needs .* 8.9"):
        kernel_report.select_ops(
            kernel_report.NEMO, EngineConfig(device="cpu", prefer={"rms_norm_fp8": "triton"}), capability=80
        )


@pytest.mark.parametrize(("sizes", "most_tokens"), [((1, 8, 40), 600), ((), 40)])
def test_nothing_is_compiled_after_the_warm_up_and_no_launch_waits_for_the_device(
    sizes: tuple[int, ...], most_tokens: int
) -> None:
    """Tensors on "meta" have no data: a launch that read a value back would fail.

    What it launches was compiled at start-up.
    """
    config = EngineConfig(
        device="cpu", max_num_seqs=40, max_num_batched_tokens=most_tokens, speculative_config={"method": "ngram"}
    )
    rng = random.Random(0)
    for kernel in kernels().values():
        kernel.device_caches.clear()  # of what other tests compiled
    with kernel_report.compile_only(90) as compiled:
        runner = kernel_report.meta_runner(kernel_report.NEMO, config, 90)
        runner.warm_up(sizes, wide_graph_sizes(config))
        known = set(compiled)
        cached = specialisations()
        slots: list[int] = []
        widths: set[int] = set()
        wants = [{}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.5}, {"logprobs": 5}, {"logit_bias": {7: 1.0}},
                 {"frequency_penalty": 1.0}, {"prompt_logprobs": 2}, {"bad_words": []}, {"min_tokens": 3}]  # fmt: skip
        for step in range(60):
            fills, prefills = [], []
            for _ in range(39 if step == 0 else rng.choice([0, 0, 1, 2])):
                if len(slots) + len(fills) == 40:
                    break
                slot = rng.choice([s for s in range(1, 41) if s not in slots and s not in {f.slot for f in fills}])
                length = rng.choice([1, 2, 63, 64, 65, 200])
                params = SamplingParams(**rng.choice(wants))
                pages = tuple(range(1, 2 + length // 64))
                draft_until = rng.choice([0, 500])
                fills.append(SlotFill(slot, [5] * length, length, 0, pages, params, step, draft_until=draft_until))
                prefills.append(PrefillRow(slot, 0, length, step == 0 or rng.random() < 0.8))
            new_pages = ((slots[0], 9, 77),) if slots and rng.random() < 0.3 else ()
            width = rng.choice([1, *[width for width in config.widths if width * len(slots) <= 256]])
            runner.launch(StepPlan(step, tuple(slots), tuple(prefills), tuple(fills), new_pages, width=width))
            slots += [row.slot for row in prefills if row.samples]
            rng.shuffle(slots)
            slots = slots[: rng.choice([1, 5, 17, 33, 37]) if step > 20 else 40]
            widths.add(len(slots))
        assert max(widths) == 40 and min(widths) == 1
        assert set(compiled) == known
        assert specialisations() == cached


def kernels() -> dict[str, Any]:
    """Every kernel of ours, by name."""
    found = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for name, value in vars(import_module(f"nemo_engine.kernels.{path.stem}")).items():
            if isinstance(value, triton.runtime.jit.JITFunction):
                found[f"{path.stem}.{name}"] = value
    return found


def specialisations() -> set[tuple[str, str]]:
    """What has been compiled so far: (kernel, dtypes and properties of its arguments as Triton tells them apart)."""
    return {
        (name, key)
        for name, kernel in kernels().items()
        for caches in kernel.device_caches.values()
        for key in caches[0]
    }


def test_a_launch_that_reads_a_value_fails_on_meta() -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.empty(3, device="meta").sum().item()
