"""How steps are captured on a GPU, and what the captures' memory comes to, without a GPU: by stand-ins for torch's and
by its allocator's rules.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nemo_engine import AsyncEngine, SamplingParams
from nemo_engine.benchmarks.kernel_report import META, NEMO, _Target
from nemo_engine.checkpoint.inventory import planned_inventory
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import GIB, graph_sizes, mixed_graph_sizes, plan_memory
from nemo_engine.model.weights import all_dense, empty_weights
from nemo_engine.ops import Ops, Site
from nemo_engine.ops.attention import Workspace
from nemo_engine.ops.quantize import FP8
from nemo_engine.runner import graphs
from nemo_engine.runner.graphs import Captured, cuda_capture
from nemo_engine.runner.precision import use_wide_reductions
from nemo_engine.runner.runner import Runner

MIB = 1 << 20


class Pool:
    """The rules of torch's caching allocator for one stream of one memory pool: the best fit, split, joined again when
    it is freed.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._segments: list[tuple[bool, list[list[Any]]]] = []  # (whether of small blocks, blocks of [bytes, is free])

    def allocate(self, num_bytes: int) -> tuple[list[list[Any]], list[Any]]:
        """A segment's blocks, and that of them which was taken."""
        size = max(512, -(-num_bytes // 512) * 512)
        is_small = size <= MIB
        fits = [
            (block, blocks)
            for small, blocks in self._segments
            if small is is_small
            for block in blocks
            if block[1] and block[0] >= size
        ]
        if fits:
            block, blocks = min(fits, key=lambda fit: fit[0][0])
        else:
            whole = 2 * MIB if is_small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.reserved += whole
            block = [whole, True]
            blocks = [block]
            self._segments.append((is_small, blocks))
        rest = block[0] - size
        if rest >= 512 if is_small else rest > MIB:
            blocks.insert(_place(blocks, block) + 1, [rest, True])
            block[0] = size
        block[1] = False
        return blocks, block

    def free(self, blocks: list[list[Any]], block: list[Any]) -> None:
        """Give a block back."""
        block[1] = True
        place = _place(blocks, block)
        if place + 1 < len(blocks) and blocks[place + 1][1]:
            block[0] += blocks.pop(place + 1)[0]
        if place and blocks[place - 1][1]:
            blocks[place - 1][0] += blocks.pop(place)[0]


def _place(blocks: list[list[Any]], block: list[Any]) -> int:
    return next(index for index, other in enumerate(blocks) if other is block)


class Allocations(TorchDispatchMode):
    """Takes the memory of each new tensor from ``pool``, until the tensor is dropped."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                weakref.finalize(storage, self.pool.free, *self.pool.allocate(storage.nbytes()))
        return outputs


@contextlib.contextmanager
def no_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton kernels are neither compiled nor run; what their wrappers allocate is allocated."""
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", _Target(90))
        patch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: None)
        yield


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("seqs", [256, 1024])
def test_the_plan_holds_the_graphs_of_nemo(
    seqs: int, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All captures on one stream with one pool: what torch would reserve for their tensors, against what is planned for
    them.
    """
    kv_dtype = FP8 if quantization else torch.bfloat16
    kind_of = planned_inventory(NEMO, None, ONLINE[quantization]).kind_of if quantization else all_dense
    site = Site.of(NEMO, 64, torch.bfloat16, torch.device("cpu"), kv_dtype)
    ops = Ops.select(dataclasses.replace(site, device_type="cuda", capability=(9, 0)), {})
    config = EngineConfig(device="cpu", max_num_seqs=seqs, max_num_batched_tokens=8192)
    pool = Pool()

    def capture(function: Any) -> Captured[Any]:
        function()  # what stays, the workspace, is not of the pool
        with Allocations(pool):
            return Captured(function(), lambda: None)

    with no_launches(monkeypatch):
        runner = Runner(
            NEMO, config, empty_weights(NEMO, torch.bfloat16, META, kind_of), ops,
            num_pages=100, max_model_len=131072, device=META, kv_dtype=kv_dtype,
        )  # fmt: skip
        runner.capture(graph_sizes(seqs), capture, mixed_sizes=mixed_graph_sizes(config))
    plan = plan_memory(NEMO, config, 131072, 2, 139 * GIB, 10)
    nodes = 26 * MIB * (len(graph_sizes(seqs)) + len(mixed_graph_sizes(config)))
    assert 0.8 * (plan.graphs - nodes) < pool.reserved <= plan.graphs - nodes
    assert {256: 1.3, 1024: 3.9}[seqs] < plan.graphs / GIB < {256: 1.6, 1024: 4.4}[seqs]
    assert plan.cublas == 96 * MIB and ("cuBLAS workspaces", plan.cublas) in plan.items()


class _Stream:
    def __init__(self, device: int | None = None) -> None:
        self.device = device

    def wait_stream(self, other: _Stream) -> None:
        assert other is not self


def test_captures_share_a_stream_and_disturb_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream per device for all engines, one pool per engine, and a mode that lets other threads allocate
    meanwhile.
    """
    current, made, captured = _Stream(), [], []
    handles = iter(range(100))

    def new_stream(device: int) -> _Stream:
        made.append(_Stream(device))
        return made[-1]

    @contextlib.contextmanager
    def graph(_: Any, *, pool: int, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
        captured.append((pool, stream, capture_error_mode))
        yield

    for name, stand_in in {
        "Stream": new_stream,
        "graph": graph,
        "CUDAGraph": lambda: dataclasses.make_dataclass("Graph", [])(),
        "graph_pool_handle": lambda: next(handles),
        "current_stream": lambda _: current,
        "current_device": lambda: 0,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs._capture_stream.cache_clear()
    for cls in (torch.device("cuda"), torch.device("cuda:0"), torch.device("cuda:1")):
        capture = cuda_capture(cls)
        for _ in range(3):
            with contextlib.suppress(AttributeError):  # the stand-in cannot be replayed
                capture(lambda: None)
    graphs._capture_stream.cache_clear()
    assert [stream.device for stream in made] == [0, 1]
    assert [(pool, made.index(stream), mode) for pool, stream, mode in captured] == [
        (pool, stream, "thread_local") for pool, stream in ((0, 0), (1, 0), (2, 1)) for _ in range(3)
    ]


def test_a_frozen_workspace_keeps_what_graphs_write_to() -> None:
    workspace, cpu = Workspace(), torch.device("cpu")
    first = workspace.take("parts", (4, 4), torch.float32, cpu)
    assert workspace.take("parts", (2, 2), torch.float32, cpu).data_ptr() == first.data_ptr()
    workspace.freeze()
    address, memory = first.data_ptr(), weakref.ref(first.untyped_storage())
    del first
    larger = workspace.take("parts", (8, 8), torch.float32, cpu)
    assert larger.data_ptr() != address and memory() is not None
    assert workspace.take("parts", (4, 4), torch.float32, cpu).data_ptr() == larger.data_ptr()


def test_parts_of_products_are_added_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    try:
        use_wide_reductions()
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_serving_thread_has_called_everything_before_it_is_ready(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries keep handles, workspaces and pools per thread: no operation is called for the first time in a thread by
    a served step.
    """
    called: set[tuple[str, int]] = set()
    select = Ops.select

    def noting(site: Site, prefer: Any) -> Ops:
        ops = select(site, prefer)

        def noted(name: str, function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                called.add((name, threading.get_ident()))
                return function(*args, **kwargs)

            return call

        bound = {
            field.name: noted(field.name, function)
            for field in dataclasses.fields(ops)
            if callable(function := getattr(ops, field.name))
        }
        return dataclasses.replace(ops, **bound)

    monkeypatch.setattr(Ops, "select", noting)
    with AsyncEngine("nemo-tiny", device="cpu", dtype=dtype, num_kv_pages=64, max_model_len=256) as engine:
        ready = set(called)
        params = SamplingParams(temperature=0.8, top_p=0.9, logprobs=2, max_tokens=5, ignore_eos=True)

        async def serve() -> None:
            async for _ in engine.generate("def f(x):\n" * 10, params):
                pass

        asyncio.run(serve())
    new = called - ready
    assert not new, f"first called by a served step: {sorted(name for name, _ in new)}"


@pytest.mark.gpu
def test_the_first_served_step_takes_no_memory() -> None:
    """On a GPU: what is kept per thread or compiled at the first call would show as memory."""
    options: dict[str, Any] = {"kv_cache_gib": 0.25, "max_model_len": 256, "max_num_seqs": 8}
    with AsyncEngine("nemo-tiny", device="cuda", skip_tokenizer_init=True, **options) as engine:
        before = torch.cuda.mem_get_info()[0]

        async def serve() -> None:
            async for _ in engine.generate({"prompt_token_ids": list(range(3, 60))}, SamplingParams(max_tokens=5)):
                pass

        asyncio.run(serve())
        assert torch.cuda.mem_get_info()[0] == before
