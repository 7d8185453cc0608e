"""Which implementation an engine gets, and why not another."""

from __future__ import annotations

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_engine.ops import ALL_OPS, Ops, Site, op, select
from nemo_engine.ops.attention import paged_attention
from nemo_engine.ops.cpu import packed
from nemo_engine.ops.cpu.attention import paged_attention as paged_attention_torch
from nemo_engine.ops.norm import RMS_NORM, rms_norm
from nemo_engine.ops.op import Impl, Op, compiled_for_cpu

CPU = Site(
    device_type="cpu",
    capability=None,
    dtype=torch.float32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page_size=16,
    hidden_size=64,
    intermediate_size=64,
)
GPU = dataclasses.replace(CPU, device_type="cuda", capability=(9, 0), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_on_the_cpu_what_is_made_for_it_serves_else_the_definition() -> None:
    ops = Ops.select(CPU, {})
    has_kernels = compiled_for_cpu() is not None
    of_all = {"build_batch_", "embed", "rms_norm", "silu_mul", "rope_and_append_kv_", "paged_attention", "sample_"}
    assert {choice.op for choice in ops.choices if choice.chosen == "cpu"} == (
        of_all | {"advance_", "draft_", "accept_"} if has_kernels else set()
    )
    for change in ({"dtype": torch.float64}, {"kv_dtype": torch.float8_e4m3fn}, {"head_dim": 272}):
        assert Ops.select(dataclasses.replace(CPU, **change), {}).paged_attention is paged_attention_torch


@pytest.mark.skipif(compiled_for_cpu() is None, reason="nemo_engine._cpu is not built: there is no C++ compiler")
def test_products_are_compiled_but_where_onednn_has_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    site = dataclasses.replace(CPU, dtype=torch.bfloat16)

    def chosen(prefer: dict[str, str], site: Site = site) -> list[str]:
        names = {choice.op: choice.chosen for choice in Ops.select(site, prefer).choices}
        return [names[op] for op in ("linear", "norm_linear", "silu_mul_linear")]

    monkeypatch.setattr(packed, "_has_products", lambda: True)
    monkeypatch.setattr(packed, "_has_matrix_units", lambda: True)
    assert chosen({}) == ["onednn", "composed", "composed"]
    monkeypatch.setattr(packed, "_has_matrix_units", lambda: False)
    assert chosen({}) == ["cpu", "cpu", "cpu"]
    assert chosen({"linear": "onednn"}) == ["onednn", "composed", "composed"]
    monkeypatch.setattr(packed, "_has_products", lambda: False)
    assert chosen({}) == ["cpu", "cpu", "cpu"]
    assert chosen({"linear": "widened"}) == ["widened", "composed", "composed"]  # what is preferred is what runs
    assert chosen({"rms_norm": "semantics"}) == ["cpu", "composed", "cpu"]
    assert chosen({"norm_linear": "composed"}) == ["cpu", "composed", "cpu"]
    assert chosen({}, dataclasses.replace(site, intermediate_size=33)) == ["widened", "composed", "composed"]
    monkeypatch.setattr(op, "compiled_for_cpu", lambda: None)
    assert chosen({}) == ["widened", "composed", "composed"]


def test_without_its_library_nothing_is_chosen_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "compiled_for_cpu", lambda: None)
    ops = Ops.select(CPU, {})
    assert ops.rms_norm is rms_norm
    assert ops.paged_attention is paged_attention_torch
    assert {choice.op for choice in ops.choices} == {op.name for op in ALL_OPS}
    table = ops.format()
    assert (
        "rms_norm               semantics  (not triton: Triton runs on a CPU with TRITON_INTERPRET=1 only; not cuda: "
        in table
    )
    assert "not cpu: nemo_engine._cpu is not built here" in table
    assert (
        "paged_attention        torch  (not triton: Triton runs on a CPU with TRITON_INTERPRET=1 only; not cuda: "
        in table
    )
    assert "not flash_attn: runs on NVIDIA GPUs, this is cpu" in table


def test_the_definition_can_be_asked_for() -> None:
    ops = Ops.select(CPU, {"paged_attention": "semantics"})
    assert ops.paged_attention is paged_attention
    assert "not torch: semantics is preferred" in ops.format()


def test_on_a_gpu_triton_serves_where_there_is_a_kernel() -> None:
    choice = select(RMS_NORM, GPU, {})
    assert (choice.chosen, choice.function.__module__) == ("triton", "nemo_engine.kernels.norm")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "computes in fp32, and the model is fp64"),
        ({"capability": (7, 5)}, r"needs an NVIDIA GPU of compute capability 8.0, this is cuda \(7, 5\)"),
        ({"device_type": "xpu", "capability": None}, "needs an NVIDIA GPU of compute capability 8.0, this is xpu"),
        ({"hidden_size": 16385}, "rows of at most 16384 elements, these have 16385"),
        ({"device_type": "cpu", "capability": None}, "Triton runs on a CPU with TRITON_INTERPRET=1 only"),
    ],
)
def test_what_cannot_serve_is_refused_with_its_reason(change: dict[str, object], reason: str) -> None:
    site = dataclasses.replace(GPU, **change)
    with pytest.raises(ValueError, match=rf"prefer\['rms_norm'\] = 'triton' cannot serve here: {reason}$"):
        select(RMS_NORM, site, {"rms_norm": "triton"})
    if site.device_type == "cpu":
        assert select(RMS_NORM, site, {}).chosen in ("cpu", "semantics")
    else:  # the definition on a GPU only if it is asked for
        with pytest.raises(ValueError, match=rf"no kernel for rms_norm here: triton: {reason}; cuda: .+ \(prefer="):
            select(RMS_NORM, site, {})
        assert select(RMS_NORM, site, {"rms_norm": "semantics"}).chosen == "semantics"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 264}, "no kernel for paged_attention here: triton: head_dim of at most 256, this is 264"),
        ({"num_heads": 520}, "at most 64 query heads per KV head, these are 260"),
        ({"head_dim": 15}, "no kernel for rope_and_append_kv_ here: triton: an even head_dim, this is 15"),
        (
            {"capability": (8, 0), "kv_dtype": torch.float8_e4m3fn},  # Triton compiles no conversion of it there
            "no kernel for rope_and_append_kv_ here: triton: FP8 needs an NVIDIA GPU of compute capability 8.9, this",
        ),
    ],
)
def test_a_model_that_no_kernel_serves_is_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Ops.select(dataclasses.replace(GPU, **change), {})


@pytest.mark.parametrize("op", [op for op in ALL_OPS if op.name in ("paged_attention", "rope_and_append_kv_")])
def test_triton_serves_an_fp8_cache_where_the_gpu_converts_it(op: Op) -> None:
    sites = [dataclasses.replace(GPU, capability=(8, minor), kv_dtype=torch.float8_e4m3fn) for minor in (0, 6, 9)]
    reasons = [op.impls[0].supports(site) for site in sites]
    assert all("FP8 needs an NVIDIA GPU of compute" in str(reason) for reason in reasons[:2]) and reasons[2] is None


def test_a_gpu_without_fp8_serves_models_without_fp8() -> None:
    ops = Ops.select(dataclasses.replace(GPU, capability=(8, 0)), {})
    assert {choice.op for choice in ops.choices if choice.chosen == "semantics"} == {
        op.name for op in ALL_OPS if op.is_fp8 and op.composed is None
    }


def test_where_the_cuda_library_is_built_it_runs_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what nothing else serves on a GPU."""
    library = ModuleType("nemo_engine._C")
    library.__spec__ = ModuleSpec("nemo_engine._C", None)
    library.device_type = "cuda"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_engine._C", library)
    nemo = dataclasses.replace(
        GPU, num_heads=32, num_kv_heads=8, head_dim=128, page_size=64, hidden_size=5120, intermediate_size=14336
    )
    alone = {op.name for op in ALL_OPS if [impl.name for impl in op.impls] == ["cuda"] and op.composed is None}
    plain = {choice.op for choice in Ops.select(nemo, {}).choices if choice.chosen == "cuda"}
    asked = {choice.op for choice in Ops.select(nemo, {"*": "cuda"}).choices if choice.chosen == "cuda"}
    assert plain == alone
    assert {"norm_linear", "silu_mul_linear", "rms_norm", "paged_attention", "sample_"} <= asked


def test_unknown_preferences_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"prefer\['rms_norm'\] must be one of triton, cuda, cpu, semantics, got 'cutlass'"
    ):
        Ops.select(CPU, {"rms_norm": "cutlass"})
    with pytest.raises(
        ValueError, match=r"prefer must name operations \(.*, rms_norm, .*\) or all \(\*\), got 'rmsnorm'"
    ):
        Ops.select(CPU, {"rmsnorm": "triton"})


def test_one_name_for_all_operations() -> None:
    """Where it serves: elsewhere, and where another is asked for, it changes nothing."""
    plain, all_torch = Ops.select(CPU, {}), Ops.select(CPU, {"*": "torch", "silu_mul": "semantics"})
    other = {"paged_attention": "torch", "silu_mul": "semantics"}
    assert [c.chosen for c in all_torch.choices] == [other.get(c.op, c.chosen) for c in plain.choices]
    chosen = {choice.op: choice.chosen for choice in Ops.select(GPU, {"*": "triton", "silu_mul": "semantics"}).choices}
    assert chosen["linear"] == "triton" and chosen["silu_mul"] == "semantics"
    with pytest.raises(ValueError, match=r"prefer\['\*'\] must be one of .*triton.*, got 'cutlass'"):
        Ops.select(CPU, {"*": "cutlass"})


def test_the_first_that_supports_the_site_is_taken_and_only_it_is_imported() -> None:
    impls = (
        Impl("never", "no.such.module:function", lambda site: "never"),
        Impl("path", "os.path:join", lambda site: None),
        Impl("later", "no.such.module:function", lambda site: None),
    )
    choice = select(Op("join", min, impls, lambda: iter(()), lambda: (0, 0)), CPU, {})
    assert (choice.chosen, choice.rejected) == ("path", (("never", "never"),))
    assert choice.function("a", "b") == str(Path("a/b"))
