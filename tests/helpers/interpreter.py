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

    patch_language_once(tl, interpreter)
    keep_types(tl, interpreter)
    keep_conversions(tl, TritonSemantic)
    wide = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
        scalar = left.type.scalar
        if not scalar.is_int_signed() or scalar.int_bitwidth == 64:  # unsigned ones are hashed with, and wrap
            return
        one, other = left.handle.data, right.handle.data
        if one.size == other.size == 1:
            least = most = getattr(int, f"__{operation.__name__}__")(one.item(), other.item())
        else:
            result = wide[operation.__name__](one, other, dtype=np.int64)
            least, most = result.min(), result.max()
        fits = scalar.get_int_min_value() <= least and most <= scalar.get_int_max_value()
        assert fits, f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow


def patch_language_once(tl: Any, interpreter: Any) -> None:
    """The language stays patched between calls; the interpreter looks through all of it at every call of a function.
    What it puts there calls an operation at once, without asking whether it was given its semantics.
    """
    semantic = interpreter.interpreter_semantic
    asks = tl.core.builtin(lambda: None).__code__

    def patch(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is asks else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch
    interpreter._patch_lang(types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    unchanged = types.SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: unchanged


def keep_types(tl: Any, interpreter: Any) -> None:
    """There is each type of a block once, and what follows from it is computed once."""
    block, constexpr = tl.block_type, tl.constexpr
    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if dtype.scalar.is_ptr() else numpy_dtype(dtype.scalar)
    )
    tl.str_to_ty = functools.cache(tl.str_to_ty)
    known: dict[Any, Any] = {}  # a type holds the type of its elements, whose id therefore stays its own
    make_block = block.__init__

    def numbers(shape: Any) -> tuple[Any, ...]:
        return tuple([size.value if size.__class__ is constexpr else size for size in shape])

    def the_block(cls: Any, element: Any, shape: Any) -> Any:
        key = (id(element), numbers(shape))
        if key not in known:
            known[key] = made = object.__new__(cls)
            make_block(made, element, shape)
        return known[key]

    block.__new__ = the_block
    block.__init__ = lambda self, element, shape: None
    block.with_element_ty = lambda self, scalar: block(scalar, self.shape)
    block.to_ir = lambda self, builder: self

    type_of_values, types_of_values = tl.core._type_for_tuple_values, {}

    def type_for_tuple_values(values: Any, fields: Any = None) -> Any:
        key = numbers(values)
        if fields is not None or any(value.__class__ is not int for value in key):
            return type_of_values(values, fields)
        if key not in types_of_values:
            types_of_values[key] = type_of_values(values)
        return types_of_values[key]

    tl.core._type_for_tuple_values = type_for_tuple_values

    @functools.cache
    def sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.tuple([constexpr(size) for size in shape]), constexpr(np.prod(shape, dtype=object))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes(tuple(type.shape) if type.is_block() else ())

    def make_handle(self: Any, data: Any, dtype: Any) -> None:
        assert dtype.is_ptr() or data.itemsize * 8 <= max(8, dtype.primitive_bitwidth), (data.dtype, dtype)
        self.data, self.dtype, self.attr = data, dtype, {}

    tl.tensor.__init__ = make_tensor
    interpreter.TensorHandle.__init__ = make_handle


def keep_conversions(tl: Any, semantic: Any) -> None:
    """How operands of two types become alike depends on these types alone, and on a number's value."""
    make_alike, tensor = semantic.binary_op_type_checking_impl, tl.tensor
    alike: dict[Any, Any] = {}
    constants: dict[Any, Any] = {}

    def checked(self: Any, left: Any, right: Any, *how: bool) -> Any:
        if left.__class__ is not tensor:
            if right.__class__ is tensor:
                key = (repr(left), None, id(right.type), how)
                if key in constants:
                    return constants[key][0], right
                result = make_alike(self, left, right, *how)
                if result[1] is right:
                    constants[key] = result[0], right.type
                return result
        elif right.__class__ is not tensor:
            key = (id(left.type), repr(right), None, how)
            if key in constants:
                return left, constants[key][0]
            result = make_alike(self, left, right, *how)
            if result[0] is left:
                constants[key] = result[1], left.type
            return result
        else:
            key = (id(left.type), id(right.type), how)
            if key in alike:
                return left, right
            result = make_alike(self, left, right, *how)
            if result[0] is left and result[1] is right:
                alike[key] = left.type, right.type  # held, so that their ids stay theirs
            return result
        return make_alike(self, left, right, *how)

    semantic.binary_op_type_checking_impl = checked
