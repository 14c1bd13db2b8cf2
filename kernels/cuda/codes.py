"""Codes and values in registers: the arithmetic that all Triton kernels share.

Scales are computed as the references compute them, operation by operation, so that codes are equal
bit for bit. Three things to mind:

- `/` on float32 is approximate in Triton (`div.full`, 2 units in the last place); `div_rn` is the
  division of IEEE 754;
- `minimum` and `maximum` drop a NaN; what is not finite is found by its exponent bits instead;
- a product next to a sum may become one fused operation. None here would change by it: every
  product that a sum takes is exact. The cast kernels turn fusion off all the same.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# What Triton compiles has no types that Python could check, and constants in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from qnn.kernels.formats import float8, nvfp4

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
NAN_CODE = tl.constexpr(0x7F)  # of e4m3 and e5m2
E4M3_ONE = tl.constexpr(0x38)
FLT_MAX = tl.constexpr(float(torch.finfo(torch.float32).max))
MAX_RECIPROCAL = tl.constexpr(float8.MAX_RECIPROCAL)
SIXTH = tl.constexpr(1 / 6)
# Bit i is set where the i-th of 16 neighbours changes its sign before the Hadamard transform.
NEGATIVE = tl.constexpr(sum((sign < 0) << i for i, sign in enumerate(nvfp4._SIGNS)))


def exact(device: torch.device) -> bool:
    """Whether float8 is converted by integer arithmetic (`EXACT` in the kernels).

    GPUs from 8.9 on have an instruction that rounds to nearest, ties to even; older ones have none.
    Triton's interpreter has one that does not round to nearest, and one for bfloat16 that cuts off.
    """
    return INTERPRETED or torch.cuda.get_device_capability(device) < (8, 9)


@triton.jit
def widened(x):
    """A float32 of the same value. bfloat16 by its bits, which is what a GPU does anyway: the
    interpreter's own conversion spoils subnormal numbers.
    """
    if x.dtype == tl.bfloat16:
        word = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        result = word.to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def finite(x):
    """Whether a float32 is neither NaN nor infinite."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def magnitude(x):
    """`|x|`, and 0 where `x` is not finite."""
    return tl.where(finite(x), tl.abs(x), 0.0)


@triton.jit
def inverse(x):
    """1 / x, correctly rounded."""
    return tl.math.div_rn(1.0, x)


@triton.jit
def over(TOP: tl.constexpr, amax):
    """`TOP / amax`, correctly rounded."""
    return tl.math.div_rn(TOP, amax)


@triton.jit
def reciprocal_scale(amax, QMAX: tl.constexpr):
    """`float8.reciprocal_scale`."""
    r = tl.minimum(over(QMAX, tl.where(amax == 0, 1.0, amax)), MAX_RECIPROCAL)
    return tl.where(amax == 0, 1.0, r)


@triton.jit
def power_of_two(r):
    """`r` rounded down to a power of two."""
    return (r.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def exponent_byte(amax):
    """`mxfp8.exponent_byte`."""
    bits = tl.math.div_rn(amax, 448.0).to(tl.int32, bitcast=True)
    up = (bits >> 23) + ((bits & 0x007FFFFF) != 0).to(tl.int32)
    return tl.where(amax == 0, 127, tl.where(bits <= 0x00400000, 0, up))


@triton.jit
def power(byte):
    """2^(byte - 127) of an int32; NaN for 255."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    bits = tl.where(byte == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode8(x, E4M3: tl.constexpr, EXACT: tl.constexpr):
    """The float8 code of a float32 within the format's range, uint8: to nearest, ties to even."""
    if EXACT:
        MANTISSA: tl.constexpr = 3 if E4M3 else 2
        BIAS: tl.constexpr = 7 if E4M3 else 15
        # Below the smallest normal number a sum with this one rounds to the format's last place.
        UNIT: tl.constexpr = 1 - BIAS - MANTISSA + 23
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        unit = ((127 + UNIT) << 23) + tl.zeros_like(size)
        small = tl.abs(x) + unit.to(tl.float32, bitcast=True)
        small = small.to(tl.int32, bitcast=True) - unit
        half = (1 << (22 - MANTISSA)) - 1 + ((size >> (23 - MANTISSA)) & 1)
        normal = ((size + half) >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
        code = tl.where(size < ((128 - BIAS) << 23), small, normal) | ((bits >> 24) & 0x80)
        result = code.to(tl.uint8)
    elif E4M3:
        result = x.to(tl.float8e4nv, fp_downcast_rounding="rtne").to(tl.uint8, bitcast=True)
    else:
        result = x.to(tl.float8e5, fp_downcast_rounding="rtne").to(tl.uint8, bitcast=True)
    return result


@triton.jit
def decode8(code, E4M3: tl.constexpr, EXACT: tl.constexpr):
    """The float32 that a float8 code stands for."""
    if not E4M3:  # the upper byte of a float16
        result = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif EXACT:
        word = code.to(tl.int32)
        # The bits as a float32 that is too small by 2^120; right for subnormal codes too.
        result = ((word & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        result = tl.where((word & 0x7F) == 0x7F, float("nan"), result)
        result = tl.where((word & 0x80) != 0, -result, result)
    else:
        result = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return result


@triton.jit
def cast8(x, r, QMAX: tl.constexpr, E4M3: tl.constexpr, EXACT: tl.constexpr):
    """`float8.cast`: the codes of `x · r`."""
    scaled = tl.minimum(tl.maximum(x * r, -QMAX), QMAX)
    return tl.where(finite(x), encode8(scaled, E4M3, EXACT), NAN_CODE).to(tl.uint8)


@triton.jit
def decode4(code):
    """The float32 that an e2m1 code, int32, stands for: its bits as a float32, times 2^126."""
    value = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def encode4(x, noise, STOCHASTIC: tl.constexpr):
    """`nvfp4.e2m1`, int32."""
    size = tl.abs(x)
    steps = tl.where(size < 2, size * 2, tl.where(size < 4, size, size * 0.5))
    below = tl.where(size < 2, 0, tl.where(size < 4, 2, 4))
    if STOCHASTIC:
        whole = steps.to(tl.int32)
        count = whole + (noise < steps - whole.to(tl.float32)).to(tl.int32)
    else:  # 2^23 + steps is rounded to an integer, which stands in its low bits
        count = (steps + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.minimum(count + below, 7) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def mix(h):
    """One round of the mixing function of `nvfp4.hashed`, on uint32."""
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def hashed(index, seed):
    """`nvfp4.hashed` at the positions `index`; both are int64."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    h = mix(mix((index ^ seed).to(tl.uint32)) + high + mix(low))
    return (h >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def butterfly(x, HALF: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Sums and differences of the elements of `[A, B, 16]` that are `HALF` apart."""
    pairs = tl.reshape(x, (A, B, 8 // HALF, 2, HALF))
    a, b = tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3)), (A, B, 16))


@triton.jit
def hadamard(x, A: tl.constexpr, B: tl.constexpr):
    """`nvfp4.hadamard` of `[A, B, 16]`, in the same order."""
    sign = 1 - 2 * ((NEGATIVE >> tl.arange(0, 16)) & 1)
    x = x * sign.to(tl.float32)[None, None, :]
    x = butterfly(x, 1, A, B)
    x = butterfly(x, 2, A, B)
    x = butterfly(x, 4, A, B)
    return butterfly(x, 8, A, B) * 0.25


@triton.jit
def rounded(y, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """A float32 in the dtype of the result, to nearest, ties to even."""
    if EXACT and tl.bfloat16 == DTYPE:
        bits = y.to(tl.int32, bitcast=True)
        word = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
        word = tl.where(y == y, word, 0x7FC0)
        result = word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = y.to(DTYPE)
    return result
