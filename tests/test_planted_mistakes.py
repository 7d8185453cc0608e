"""Mistakes planted in the text of the CUDA kernels: the emulation must find each, by name where it is one of order.

All are planted in one copy of the sources, each behind its number, and one library is built of them, in which
``emulator.plant`` makes one come true.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from csrc.build import _tool
from nemo_engine.ops import ALL_OPS
from tests.emulation.library import BUILD, ROOT, build, emulated, open_library, watched, why_not
from tests.ops.proofs import prove

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

FAMILIES = ("attention", "gemm", "linear", "norm", "sampling")
UNORDERED, UNFENCED, UNREAD = "nothing orders the two", "without a fence_async_proxy", "still read"
ANOTHER_BLOCK = "a thread of another block of the cluster"
WRONG_RESULT = "bound|NaN|not what the definition gives|differs from run to run"


@dataclass(frozen=True)
class Mistake:
    """``right`` stands in ``file`` once; ``wrong`` takes its place, or stands there whole if it says MISTAKEN
    itself.
    """

    file: str
    right: str
    wrong: str
    op: str
    case: str
    words: str  # of what must be said: a regular expression
    num_sms: int = 132

    def planted(self, number: int) -> str:
        """The text that is wrong when ``number`` is planted."""
        here = f"::nemo::emulated::planted == {number}"
        if "MISTAKEN" in self.wrong:
            return self.wrong.replace("MISTAKEN", f"({here})")
        if self.right.endswith(";"):
            return f"if ({here}) {{ {self.wrong} }} else {{ {self.right} }}"
        return f"({here} ? ({self.wrong}) : ({self.right}))"


RUNS = "heads of 128, runs of 8, one cut within its queries"
SPLIT, PREFIXES = "heads of 128, one very long decode", "heads of 128, chunks over prefixes"
TILES = "linear_fp8", "257x144x400 channel"
ADDED = "quantize_linear_fp8", "257x400x144 and a residual"
MISTAKES = {
    # decode
    "a key of the next page": Mistake(
        "attention/decode.cuh",
        "(key >> p.page_shift)",
        "(key + 16) >> p.page_shift",
        "paged_attention",
        SPLIT,
        f"past the end|{WRONG_RESULT}",
    ),
    "another row of a fragment": Mistake(
        "attention/decode.cuh",
        "(matrix & 1) * 8 + lane_index() % 8",
        "(matrix >> 1) * 8 + lane_index() % 8",
        "paged_attention",
        SPLIT,
        WRONG_RESULT,
    ),
    "copies not waited for": Mistake(
        "attention/decode.cuh",
        "copy_async_wait<DECODE_STAGES - 2>();",
        "copy_async_wait<DECODE_STAGES - 1>();",
        "paged_attention",
        SPLIT,
        "a cp.async of thread .* not waited for",
    ),
    "other lanes' copies taken for there": Mistake(
        "attention/decode.cuh",
        "warp_sync();  // the other lanes' copies",
        "if (!MISTAKEN) warp_sync();  // the other lanes' copies",
        "paged_attention",
        SPLIT,
        f"reads offset .* in decode_attention, .*|{UNORDERED}",
    ),
    "parts combined by a relaxed atomic": Mistake(
        "attention/decode.cuh",
        "atomic_add_ordered(counter, 1)",
        "atomic_add(counter, 1)",
        "paged_attention",
        SPLIT,
        "race in global memory: .* no release and acquire",
    ),
    "empty rows taken for items": Mistake(
        "attention/decode.cuh",
        "int(load(in.starts + in.first_row + in.num_rows)) - in.first_query",
        "in.num_items",
        "paged_attention",
        "heads of 128, empty decode rows",
        f"of the nearest array|{WRONG_RESULT}",
    ),
    "a draft's key read too early": Mistake(
        "attention/decode.cuh",
        "load(plan.seen + int64_t(part.item) * p.in.width + column / p.group)",
        "1 + load(plan.seen + int64_t(part.item) * p.in.width + column / p.group)",
        "paged_attention",
        "heads of 128, runs of 4 around page and tile ends",
        WRONG_RESULT,
    ),
    "queries of a run that see all of its keys": Mistake(
        "attention/decode.cuh",
        "if (column >= p.columns()) continue;",
        "continue;",
        "paged_attention",
        "heads of 128, runs of 2",
        WRONG_RESULT,
    ),
    "a run as long as its first query": Mistake(
        "attention/decode.cuh",
        "length = maximum(length, seen);",
        "length = seen;",
        "paged_attention",
        RUNS,
        WRONG_RESULT,
    ),
    "queries of a run taken for there": Mistake(
        "attention/decode.cuh",
        "if (IS_SHARED) block_sync();",
        "if (IS_SHARED && !MISTAKEN) block_sync();",
        "paged_attention",
        RUNS,
        UNORDERED,
    ),
    "results of heads taken for those of queries": Mistake(
        "attention/decode.cuh",
        "in.width + column / group) * in.num_heads + head * group + column % group;",
        "in.width + (MISTAKEN ? column % in.width : column / group)) * in.num_heads + head * group +\n"
        "(MISTAKEN ? column / in.width : column % group);",
        "paged_attention",
        RUNS,
        WRONG_RESULT,
    ),
    "a query without keys divided by nothing": Mistake(
        "attention/decode.cuh",
        "all.mass == 0.0f",
        "false",
        "paged_attention",
        "runs of 2, no keys",
        "NaN",
    ),
    # norm
    "no barrier": Mistake(
        "common/rows.cuh",
        "block_sync();\n    return warp_sum",
        "if (!MISTAKEN) block_sync();\n    return warp_sum",
        "rms_norm",
        "2x5120",
        UNORDERED,
    ),
    # gemm
    "a stage released before its products are done": Mistake(
        "gemm/gemm.cuh",
        "            wgmma_wait<0>();\n            keep_in_registers(fresh);\n            if (part",
        "            if (MISTAKEN && part == PARTS - 1) gemm_release(p, &header->empty[at.stage]);\n"
        "            wgmma_wait<0>();\n            keep_in_registers(fresh);\n            if (!MISTAKEN && part",
        *TILES,
        UNREAD,
        1,
    ),
    "the other phase waited for": Mistake(
        "gemm/gemm.cuh",
        "mbarrier_wait(&header->full[at.stage], at.parity);\n#pragma unroll",
        "mbarrier_wait(&header->full[at.stage], MISTAKEN ? at.parity ^ 1 : at.parity);\n#pragma unroll",
        *TILES,
        "multiplies offset .* a copy of the copy engine|deadlock in gemm_fp8, .* at mbarrier_wait",
    ),
    "a fence by one thread for all": Mistake(
        "gemm/gemm.cuh",
        "    fence_async_proxy();\n",
        "    if (!MISTAKEN || threadIdx.x % 128 == 0) fence_async_proxy();\n",
        *TILES,
        UNFENCED,
    ),
    "boxes stored before all have written them": Mistake(
        "gemm/gemm.cuh",
        "    named_barrier_sync(barrier, 128);\n    if (threadIdx.x % 128 == 0) {",
        "    if (!MISTAKEN) named_barrier_sync(barrier, 128);\n    if (threadIdx.x % 128 == 0) {",
        *TILES,
        UNORDERED,
    ),
    "boxes written before they have left": Mistake(
        "gemm/gemm.cuh",
        "if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();",
        "if (!MISTAKEN && threadIdx.x % 128 == 0) tma_store_wait_read<0>();",
        *TILES,
        UNREAD,
        1,
    ),
    "scales read before all have written them": Mistake(
        "gemm/gemm.cuh",
        "    named_barrier_sync(1 + group, 128);\n",
        "    if (!MISTAKEN) named_barrier_sync(1 + group, 128);\n",
        *TILES,
        UNORDERED,
    ),
    "a stage of x released to its own block alone": Mistake(
        "gemm/gemm.cuh",
        "if (lane_index() < p.cluster) mbarrier_arrive_at(empty, lane_index());",
        "if (MISTAKEN) {\n if (lane_index() < p.cluster) mbarrier_arrive(empty);\n } else if (lane_index() < p.cluster) "
        "mbarrier_arrive_at(empty, lane_index());",
        "linear_fp8",
        "130x1200x272 channel",
        f"{ANOTHER_BLOCK} has the copy engine write",
        8,
    ),
    "x sent before the others' barriers are there": Mistake(
        "gemm/gemm.cuh",
        "if (p.cluster > 1) cluster_wait();  // the others' barriers",
        "if (!MISTAKEN && p.cluster > 1) cluster_wait();  // the others' barriers",
        *TILES,
        f"{ANOTHER_BLOCK} uses the mbarrier|not initialised|cluster_arrive twice",
    ),
    "a block that ends before the others have let go of its stages": Mistake(
        "gemm/gemm.cuh",
        "    if (p.cluster > 1) {  // the other blocks arrive",
        "    if (!MISTAKEN && p.cluster > 1) {  // the other blocks arrive",
        *TILES,
        "ends while thread .* arrives at its mbarriers|of the cluster has ended",
    ),
    "x kept to the block that fetches it": Mistake(
        "gemm/gemm.cuh",
        "uint16_t((1 << p.cluster) - 1)",
        "uint16_t(MISTAKEN ? 1 << walk.tiles.rank : (1 << p.cluster) - 1)",
        *TILES,
        "deadlock in gemm_fp8, .* at mbarrier_wait",
    ),
    "a residual read before it has come": Mistake(
        "gemm/gemm.cuh",
        "mbarrier_wait(&header->full[at.stage], at.parity);  // the residual's",
        "if (!MISTAKEN) mbarrier_wait(&header->full[at.stage], at.parity);",
        *ADDED,
        f"copy engine|{UNORDERED}",
    ),
    "the second warpgroup waits for a lead that nobody takes": Mistake(
        "gemm/gemm.cuh",
        "if (step == lead_step) named_barrier_arrive(",
        "if (!MISTAKEN && step == lead_step) named_barrier_arrive(",
        *ADDED,
        "deadlock in gemm_fp8",
        1,
    ),
    "scales of gates for the up projections": Mistake(
        "gemm/gemm.cuh",
        "column += p.in.outputs / 2 - Tile::OUT_COLUMNS;",
        "column -= Tile::OUT_COLUMNS;",
        "mlp_fp8",
        "130x272x400",
        WRONG_RESULT,
    ),
    # linear
    "tokens of a stage released to its own block alone": Mistake(
        "linear/small.cuh",
        "if (lane_index() < p.cluster) mbarrier_arrive_at(&header->empty[at.stage], lane_index());",
        "if (MISTAKEN) {\n if (lane_index() < p.cluster) mbarrier_arrive(&header->empty[at.stage]);\n } else if (lane_index() < "
        "p.cluster) mbarrier_arrive_at(&header->empty[at.stage], lane_index());",
        "linear_fp8",
        "48x3072x40 channel",
        f"{ANOTHER_BLOCK} has the copy engine write",
    ),
    "a block that ends before the others have let go of its tokens": Mistake(
        "linear/small.cuh",
        "    if (HAS_X && p.cluster > 1) {  // the other blocks arrive",
        "    if (!MISTAKEN && HAS_X && p.cluster > 1) {  // the other blocks arrive",
        "linear",
        "17x320x130",
        "ends while thread .* arrives at its mbarriers|of the cluster has ended",
    ),
    "tokens asked for before the kernel before has ended": Mistake(
        "linear/small.cuh",
        "        wait_for_previous_kernel();\n        if (p.shared.x",
        "        if (!MISTAKEN) wait_for_previous_kernel();\n        if (p.shared.x",
        "linear",
        "17x320x130",
        "before wait_for_previous_kernel",
    ),
    "products not waited for": Mistake(
        "linear/small.cuh",
        "        wgmma_wait<0>();\n        keep_in_registers(sum);",
        "        if (!MISTAKEN) wgmma_wait<0>();\n        keep_in_registers(sum);",
        "linear",
        "17x320x130",
        f"before its products of wgmma were done|{UNREAD}",
    ),
    "an input fenced by one warp": Mistake(
        "linear/small_input.cuh",
        "    fence_async_proxy();\n",
        "    if (!MISTAKEN || warp_index() == 0) fence_async_proxy();\n",
        "quantize_linear_fp8",
        "5x1024x40",
        UNFENCED,
    ),
    "rows made for all told of by a relaxed atomic": Mistake(
        "linear/small_input.cuh",
        "atomic_add_ordered(rows_made, 1);",
        "atomic_add(rows_made, 1);",
        "norm_linear",
        "16x256x33",
        "race in global memory: .* no release and acquire",
    ),
    "rows made for all fenced by one warp": Mistake(
        "linear/small_input.cuh",
        "        fence_async_proxy_global();\n",
        "        if (!MISTAKEN || warp_index() == 0) fence_async_proxy_global();\n",
        "norm_linear",
        "9x320x130",
        "without a fence_async_proxy_global",
    ),
    "rows asked for before others have made them": Mistake(
        "linear/small.cuh",
        "            mbarrier_wait(&header->made, 0);\n",
        "            if (!MISTAKEN) mbarrier_wait(&header->made, 0);\n",
        "norm_linear",
        "16x256x33",
        f"race in global memory: .* has the copy engine read|{WRONG_RESULT}",
    ),
    "a row told of before all have written it": Mistake(
        "linear/small_input.cuh",
        "named_barrier_sync(CONSUMER_BARRIER, consumers);  // all of the row",
        "if (!MISTAKEN) named_barrier_sync(CONSUMER_BARRIER, consumers);  // all of the row",
        "norm_linear",
        "16x256x33",
        f"race in global memory|{UNORDERED}",
    ),
    "scales read before others have made them": Mistake(
        "linear/small_input.cuh",
        "    named_barrier_sync(CONSUMER_BARRIER, consumers);  // all know",
        "    if (!MISTAKEN) named_barrier_sync(CONSUMER_BARRIER, consumers);  // all know",
        "norm_linear_fp8",
        "16x256x33",
        "race in global memory: .* no release and acquire",
    ),
    "scratch written while it is read": Mistake(
        "linear/small_input.cuh",
        "named_barrier_sync(CONSUMER_BARRIER, consumers);  // the scratch",
        "if (!MISTAKEN) named_barrier_sync(CONSUMER_BARRIER, consumers);  // the scratch",
        "quantize_linear_fp8",
        "8x256x48",
        UNORDERED,
    ),
    # prefill
    "results written over queries that are read": Mistake(
        "attention/prefill.cuh",
        "named_barrier_sync(PREFILL_BARRIER_ROWS + group, 128);  // all its products",
        "if (!MISTAKEN) named_barrier_sync(PREFILL_BARRIER_ROWS + group, 128);  // all its products",
        "paged_attention",
        PREFIXES,
        UNREAD,
    ),
    "queries fenced by one lane of each warp": Mistake(
        "attention/prefill.cuh",
        "        copy_async_wait<0>();\n        fence_async_proxy();\n",
        "        copy_async_wait<0>();\n        if (!MISTAKEN || lane_index() == 0) fence_async_proxy();\n",
        "paged_attention",
        PREFIXES,
        UNFENCED,
    ),
    "queries of an item fetched over those that are computed": Mistake(
        "attention/prefill.cuh",
        "        mbarrier_wait(&shared->q_empty[group][stage],",
        "        if (!MISTAKEN) mbarrier_wait(&shared->q_empty[group][stage],",
        "paged_attention",
        PREFIXES,
        f"{UNORDERED}|{UNREAD}",
        1,
    ),
    "queries released before the results have left their place": Mistake(
        "attention/prefill.cuh",
        "            compute_item(item);\n            release(&shared->q_empty[group][stage]);\n",
        "            if (MISTAKEN) release(&shared->q_empty[group][stage]);\n            compute_item(item);\n"
        "            if (!MISTAKEN) release(&shared->q_empty[group][stage]);\n",
        "paged_attention",
        PREFIXES,
        f"{UNORDERED}|{UNREAD}",
        1,
    ),
    "weights changed while they are multiplied": Mistake(
        "attention/prefill.cuh",
        "soften<IS_MASKED>(r, decay, tile * PREFILL_KEYS, score_scale);",
        "soften<IS_MASKED>(r, decay, tile * PREFILL_KEYS, score_scale); pack_weights(r);",
        "paged_attention",
        PREFIXES,
        "registers of A have changed before the wait",
    ),
    "scores taken before the wait": Mistake(
        "attention/prefill.cuh",
        "wgmma_wait<1>();",
        "",
        "paged_attention",
        PREFIXES,
        "an accumulator was written before the wait",
    ),
    "values past the end cleared without a fence": Mistake(
        "attention/prefill.cuh",
        "        fence_async_proxy();\n        named_barrier_sync(PREFILL_BARRIER_ALL, PREFILL_CONSUMERS);",
        "        if (!MISTAKEN) fence_async_proxy();\n        named_barrier_sync(PREFILL_BARRIER_ALL, "
        "PREFILL_CONSUMERS);",
        "paged_attention",
        PREFIXES,
        UNFENCED,
    ),
    # sampling
    "pieces combined by a relaxed atomic": Mistake(
        "sampling/sample.cuh",
        "atomic_add_ordered(in.counters + row, 1)",
        "atomic_add(in.counters + row, 1)",
        "sample_",
        "16x6144 all",
        "race in global memory: .* no release and acquire",
    ),
    "the last block's decision not waited for": Mistake(
        "sampling/sample.cuh",
        "    block_sync();\n    if (s->is_last)",
        "    if (!MISTAKEN) block_sync();\n    if (s->is_last)",
        "sample_",
        "6x1001 plain",
        UNORDERED,
    ),
    "a count used before it is cleared": Mistake(
        "sampling/sample.cuh",
        "s->mass_high[i] = 0;\n    block_sync();",
        "s->mass_high[i] = 0;\n    if (!MISTAKEN) block_sync();",
        "sample_",
        "6x1001 top_k",
        UNORDERED,
    ),
    "notes read before the pieces are surveyed": Mistake(
        "sampling/sample.cuh",
        "    block_sync();\n    if (threadIdx.x == 0) s->is_last",
        "    if (!MISTAKEN) block_sync();\n    if (threadIdx.x == 0) s->is_last",
        "sample_",
        "16x6144 plain",
        f"race in global memory|{UNORDERED}",
    ),
}


def plant(csrc: Path) -> None:
    """Put every mistake into the sources, behind its number."""
    for number, (name, mistake) in enumerate(MISTAKES.items(), 1):
        path = csrc / mistake.file
        text = path.read_text()
        assert text.count(mistake.right) == 1, f"{name}: stands {text.count(mistake.right)} times in {mistake.file}"
        path.write_text(text.replace(mistake.right, mistake.planted(number)))
    for file in {mistake.file for mistake in MISTAKES.values()}:
        path = csrc / file
        text = path.read_text()
        path.write_text(
            text.replace("#pragma once\n", "#pragma once\nnamespace nemo::emulated { extern int planted; }\n", 1)
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The emulated library with every mistake planted and none true; what holds no mistake is taken from the right
    one.
    """
    right = build()
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    plant(folder / "csrc")
    said = run([_tool("ninja"), "-C", str(BUILD), "-t", "commands", right.name])
    objects, compiles = {}, []
    for command in said.splitlines()[:-1]:
        words = shlex.split(command)
        source = Path(words[-1])
        if source.suffix != ".cu" or source.parent.name not in FAMILIES:
            continue
        objects[words[words.index("-o") + 1]] = made = str(folder / f"{source.stem}.o")
        flags = [word.replace(f"{ROOT}/csrc", f"{folder}/csrc") for word in words[: words.index("-MD")]]
        compiles.append([*flags, "-O1", "-g0", "-o", made, "-c", f"{folder}/csrc/{source.parent.name}/{source.name}"])
    assert len(compiles) == len([path for name in FAMILIES for path in (ROOT / "csrc" / name).glob("*.cu")])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, compiles))
    link = [word for word in shlex.split(said.splitlines()[-1].split("&&")[1]) if word not in objects]
    at = link.index("-o")  # the planted objects first: of functions in several, the linker takes the first
    run([*link[:at], "-o", str(folder / right.name), *objects.values(), *link[at + 2 :]])
    return open_library(folder / right.name)


def run(command: list[str]) -> str:
    """Run it where the library is built; returns what it says."""
    done = subprocess.run(command, cwd=BUILD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def failure(library: Any, mistake: Mistake, number: int) -> str:
    """What the emulation says of the operation's case with the mistake of that number; empty if it holds."""
    op = next(op for op in ALL_OPS if op.name == mistake.op)
    impl = next(impl for impl in op.impls if impl.name == "cuda")
    case = next(case for case in op.cases() if case.name == mistake.case)
    library.emulator.plant(number)
    library.emulator.set_num_sms(mistake.num_sms)
    try:
        with emulated(library):
            prove(op, watched(library, op, impl.load()), case, torch.bfloat16)
    except (AssertionError, RuntimeError) as error:
        return str(error) or "an assertion"
    finally:
        library.emulator.plant(0)
        library.emulator.set_num_sms(132)
    return ""


def test_without_a_mistake_the_cases_hold(library: Any) -> None:
    for mistake in {(mistake.op, mistake.case, mistake.num_sms): mistake for mistake in MISTAKES.values()}.values():
        assert failure(library, mistake, 0) == "", (mistake.op, mistake.case)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(library: Any, name: str) -> None:
    said = failure(library, MISTAKES[name], list(MISTAKES).index(name) + 1)
    assert re.search(MISTAKES[name].words, said), said
