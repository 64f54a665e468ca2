"""Make Triton's interpreter compute bfloat16 correctly; for tests only.

The interpreter keeps bfloat16 as 16-bit patterns in integer arrays and does integer arithmetic on
them. After `install()` they are widened to float32, and results rounded to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

PATTERNS = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}


def is_bf16(*handles) -> bool:
    return any(getattr(h, "dtype", None) and h.dtype.scalar == tl.bfloat16 for h in handles)


def widen(handle) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 patterns, round to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patch the interpreter of this process, once."""
    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "computes_bf16"):
        return
    binary, unary, ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    dot, cast, fma = builder.create_dot, builder.cast_impl, builder.create_fma

    def binary_op(self, a, b, op):
        if op in PATTERNS or not is_bf16(a, b):
            return binary(self, a, b, op)
        result = op(widen(a), widen(b))
        if result.dtype == bool:
            return Handle(result, tl.int1)
        return Handle(narrow(result), tl.bfloat16)

    def unary_op(self, a, op):
        return Handle(narrow(op(widen(a))), tl.bfloat16) if is_bf16(a) else unary(self, a, op)

    def ternary_op(self, a, b, c, op):
        if op is not np.clip or not is_bf16(a, b, c):
            return ternary(self, a, b, c, op)
        return Handle(narrow(op(widen(a), widen(b), widen(c))), tl.bfloat16)

    def create_dot(self, a, b, sums, *rest, **options):
        if not is_bf16(a, b):
            return dot(self, a, b, sums, *rest, **options)
        product = np.matmul(widen(a), widen(b)).astype(sums.data.dtype)
        return Handle(product + sums.data, sums.dtype.scalar)

    def create_fma(self, a, b, c):
        if not is_bf16(a, b, c):
            return fma(self, a, b, c)
        return Handle(narrow(widen(a) * widen(b) + widen(c)), tl.bfloat16)

    def cast_impl(self, x, dtype):
        source, target = x.dtype.scalar, dtype.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, x, dtype)
        if target == tl.bfloat16:
            return Handle(narrow(x.data.astype(np.float32)), target)
        return Handle(widen(x).astype(interpreter._get_np_dtype(dtype)), target)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_dot, builder.cast_impl, builder.create_fma = create_dot, cast_impl, create_fma
    builder.computes_bf16 = True
