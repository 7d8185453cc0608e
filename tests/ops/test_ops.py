"""Every implementation that can run here, against its operation's definition, on every case.

Triton's rows join when ``TRITON_INTERPRET=1`` is set before the interpreter starts; ``test_triton`` does that.
"""

from __future__ import annotations

import pytest
import torch

from nemo_engine.ops import ALL_OPS, Op, Site
from nemo_engine.ops.op import Case, Impl
from tests.ops.proofs import prove, tensors

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def site(dtype: torch.dtype = torch.float32, device_type: str = "cpu", hidden_size: int = 64) -> Site:
    return Site(
        device_type=device_type,
        capability=(9, 0) if device_type == "cuda" else None,
        dtype=dtype,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        page_size=16,
        hidden_size=hidden_size,
        intermediate_size=64,
    )


PROOFS = [
    pytest.param(op, impl, case, dtype, id=f"{op.name}-{impl.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op in ALL_OPS
    for impl in op.impls
    for dtype in DTYPES
    if impl.name in ("triton", "torch") and impl.supports(site(dtype)) is None
    for case in op.cases()
]


@pytest.mark.parametrize(("op", "impl", "case", "dtype"), PROOFS)
def test_implementation(op: Op, impl: Impl, case: Case, dtype: torch.dtype) -> None:
    prove(op, impl.load(), case, dtype)


@pytest.mark.parametrize("op", ALL_OPS, ids=lambda op: op.name)
def test_definition_reads_no_poison(op: Op) -> None:
    costs = []
    for case in op.cases():
        args = case.make(torch.float64)
        costs.append(op.cost(*args))
        for tensor in tensors(op.semantics(*args)):
            assert not tensor.isnan().any(), case.name
    assert all(num_bytes >= 0 and flops >= 0 for num_bytes, flops in costs)
    assert max(costs) > (0, 0) and any(num_bytes > 0 and flops > 0 for num_bytes, flops in costs)
