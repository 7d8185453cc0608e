"""Triton's interpreter, made to compute what a GPU computes.

Triton 3.6 interprets bf16 and FP8 wrongly: fp32 -> bf16 truncates, other narrowing rounds halves up and loses the
carry, an integer becomes the bits of a bf16, and ``tl.dot`` multiplies the bits of bf16 as integers. Here narrow floats
are converted by torch (to nearest, ties to even; FP8 saturates, as the hardware's conversion does) and products are of
the values, in the accumulator's dtype.

It also spends most of its time on what never changes: this is computed once. And it checks whether integers overflow
only after it has computed each operation three times, and only with options that nothing sets: here each signed
operation is checked (see ``hasten``).
"""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch


def install() -> None:
    """Change the interpreter of this process. Triton must have been imported with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime import interpreter

    narrow = {
        tl.bfloat16: (torch.bfloat16, np.uint16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, np.uint8, torch.uint8),
    }

    def to_values(data: np.ndarray, dtype: Any) -> np.ndarray:
        """Numbers in fp32 of what the interpreter holds as bits; other dtypes as they are."""
        if dtype not in narrow:
            return data
        value, bits, _ = narrow[dtype]
        return torch.from_numpy(np.ascontiguousarray(data).view(bits)).view(value).float().numpy()

    def from_values(data: np.ndarray, dtype: Any) -> np.ndarray:
        if dtype not in narrow:
            return data.astype(interpreter._get_np_dtype(dtype))
        value, bits, torch_bits = narrow[dtype]
        wide = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        if dtype != tl.bfloat16:
            largest = torch.finfo(value).max
            wide = wide.clamp(-largest, largest)
        return wide.to(value).view(torch_bits).numpy().view(bits).reshape(data.shape)

    def convert(self: Any, src: Any, dst_type: Any, *unused: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        return interpreter.TensorHandle(from_values(to_values(src.data, source), target), target)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = to_values(a.data, a.dtype.scalar), to_values(b.data, b.dtype.scalar)
        product = np.matmul(left, right, dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    builder = interpreter.InterpreterBuilder
    builder.create_dot = dot
    builder.create_fp_to_fp = convert
    builder.cast_impl = convert
    hasten()


def hasten() -> None:
    """Replace what Triton's interpreter computes again at each operation by what it computed the first time; check 32
    bits.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    # The language stays patched between calls; the interpreter looks through all of it at every call of a function.
    interpreter._patch_lang(types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    unchanged = types.SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: unchanged
    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if dtype.scalar.is_ptr() else numpy_dtype(dtype.scalar)
    )

    @functools.cache
    def sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(np.prod(shape, dtype=object))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes(tuple(type.shape) if type.is_block() else ())

    block = functools.cache(tl.block_type)

    wide = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
        scalar = left.type.scalar
        if scalar.is_int_signed() and scalar.int_bitwidth < 64:  # unsigned ones are hashed with, and wrap
            result = wide[operation.__name__](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
            fits = scalar.get_int_min_value() <= result.min() and result.max() <= scalar.get_int_max_value()
            assert fits, f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}"

    tl.tensor.__init__ = make_tensor
    tl.block_type.with_element_ty = lambda self, scalar: (tl.block_type if scalar.is_ptr() else block)(
        scalar, self.shape
    )
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
