"""Matrix products and elementwise steps of the `transform` codec, as vectors.

Covers: tiles of 8 tokens (8-bit integers with exact 32-bit sums; floats), packing, quantising, rounding to bfloat16.
Does not cover: in which order (`kvstore.codecs.transform_decode`).

A product is `accumulator[8, V * 16] = start[V * 16] + a[8, k] @ b[k, V * 16]`, where one k is 32 bits of a: one float,
or four unsigned bytes. `b` is stored by vectors of 16 columns: `[V, k, 16 columns, 4 bytes]`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstore.compiled import compiled

VECTOR: Final = 16
"""Columns of one vector."""
TILE_TOKENS: Final = 8
_TILE_VECTORS: Final = 3
"""24 sums, 3 columns and a factor fit 32 registers. The more tokens use what is read of the matrix, the better: it
does not fit the first-level cache."""
_BYTES: Final = 64

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32: Final = ir.FloatType()
_V8, _V16, _V32, _VF = (ir.VectorType(kind, VECTOR) for kind in (_I8, _I16, _I32, _F32))
_W16, _W32 = ir.VectorType(_I16, 2 * VECTOR), ir.VectorType(_I32, 2 * VECTOR)
_PTR: Final = ir.PointerType()


def _has_byte_products() -> bool:
    """Whether this machine multiplies four bytes and adds them in one instruction, and code is compiled for it."""
    features = llvm.get_host_cpu_features()
    return numba.config.CPU_NAME is None and bool(features.get("avx512vnni") and features.get("avx512f"))


def _declare(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name=name)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(single, single, zeros)


def _byte_products(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """`total` plus four products of an unsigned byte of `a` with a signed byte of `b`, per lane; exact."""
    if _has_byte_products():
        function = _declare(builder, "llvm.x86.avx512.vpdpbusd.512", _V32, [_V32] * 3)
        return builder.call(function, [total, a, b])
    eight = ir.Constant(_W16, [8] * (2 * VECTOR))
    a16, b16 = builder.bitcast(a, _W16), builder.bitcast(b, _W16)
    low_a, high_a = builder.lshr(builder.shl(a16, eight), eight), builder.lshr(a16, eight)
    low_b, high_b = builder.ashr(builder.shl(b16, eight), eight), builder.ashr(b16, eight)
    for one, other in ((low_a, low_b), (high_a, high_b)):
        product = builder.mul(builder.sext(one, _W32), builder.sext(other, _W32))
        halves = [ir.Constant(_V32, [2 * lane + half for lane in range(VECTOR)]) for half in (0, 1)]
        even, odd = (builder.shuffle_vector(product, product, half) for half in halves)
        total = builder.add(total, builder.add(even, odd))
    return total


def _float_products(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """`total + a * b`; fused where the machine can: encoders need not agree to the bit."""
    function = _declare(builder, "llvm.fmuladd.v16f32", _VF, [_VF] * 3)
    return builder.call(function, [a, b, total])


def _tile(kind: Any, vectors: int, products: Any) -> Any:
    element = kind.element

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        a, a_bytes, b, b_bytes, start, out, out_bytes, count = args
        bd = builder

        def at(base: Any, *offsets: Any) -> Any:
            for offset in offsets:
                base = bd.add(base, offset)
            return bd.inttoptr(base, _PTR)

        starts = [bd.load(at(start, _I64(v * _BYTES)), align=4, typ=kind) for v in range(vectors)]
        before = bd.block
        loop, done = bd.append_basic_block("k"), bd.append_basic_block("stored")
        bd.branch(loop)
        bd.position_at_end(loop)
        index = bd.phi(_I64)
        sums = [[bd.phi(kind) for _ in range(vectors)] for _ in range(TILE_TOKENS)]
        columns = [
            bd.load(at(b, bd.mul(b_bytes, _I64(v)), bd.mul(index, _I64(_BYTES))), align=4, typ=kind)
            for v in range(vectors)
        ]
        totals = []
        for token in range(TILE_TOKENS):
            address = at(a, bd.mul(a_bytes, _I64(token)), bd.mul(index, _I64(4)))
            broadcast = _splat(bd, bd.load(address, align=4, typ=element), kind)
            totals.append([products(bd, sums[token][v], broadcast, columns[v]) for v in range(vectors)])
        following = bd.add(index, _I64(1))
        index.add_incoming(_I64(0), before)
        index.add_incoming(following, loop)
        for token in range(TILE_TOKENS):
            for v in range(vectors):
                sums[token][v].add_incoming(starts[v], before)
                sums[token][v].add_incoming(totals[token][v], loop)
        bd.cbranch(bd.icmp_signed("<", following, count), loop, done)
        bd.position_at_end(done)
        for token in range(TILE_TOKENS):
            for v in range(vectors):
                bd.store(totals[token][v], at(out, bd.mul(out_bytes, _I64(token)), _I64(v * _BYTES)), align=4)
        return context.get_dummy_value()

    return emit


_TILE_TYPES: Final = (
    types.uintp,
    types.intp,
    types.uintp,
    types.intp,
    types.uintp,
    types.uintp,
    types.intp,
    types.intp,
)


def _tile_of(kind: Any, vectors: int, products: Any) -> Any:
    """A tile as a function that compiled code calls."""

    @intrinsic
    def tile(
        _context: Any, a: Any, a_bytes: Any, b: Any, b_bytes: Any, start: Any, out: Any, out_bytes: Any, k: Any
    ) -> Any:
        del a, a_bytes, b, b_bytes, start, out, out_bytes, k
        return types.void(*_TILE_TYPES), _tile(kind, vectors, products)

    return tile


_bytes_wide, _bytes_narrow = (_tile_of(_V32, vectors, _byte_products) for vectors in (_TILE_VECTORS, 1))
_floats_wide, _floats_narrow = (_tile_of(_VF, vectors, _float_products) for vectors in (_TILE_VECTORS, 1))


@compiled("void(boolean, uintp, intp, uintp, intp, uintp, uintp, intp, intp, intp, intp)")
def product(
    is_bytes: bool,
    a: int,
    a_bytes: int,
    b: int,
    b_bytes: int,
    start: int,
    out: int,
    out_bytes: int,
    k: int,
    tokens: int,
    vectors: int,
) -> None:
    """`out[tokens, vectors * 16] = start + a @ b`; tokens a multiple of 8, k > 0.

    Addresses, and bytes from row to row. Of bytes, in exact 32-bit integers: `a` u8[tokens, 4 * k], `b`
    i8[vectors, k, 16, 4], `start` i32[vectors * 16], `out` i32[tokens, vectors * 16]. Else of floats: `a`
    f32[tokens, k], `b` f32[vectors, k, 16], the others f32.
    """
    for token in range(0, tokens, TILE_TOKENS):
        row, target = a + token * a_bytes, out + token * out_bytes
        vector = 0
        while vector < vectors:
            columns, at = b + vector * b_bytes, vector * _BYTES
            if vector + _TILE_VECTORS <= vectors:
                if is_bytes:
                    _bytes_wide(row, a_bytes, columns, b_bytes, start + at, target + at, out_bytes, k)
                else:
                    _floats_wide(row, a_bytes, columns, b_bytes, start + at, target + at, out_bytes, k)
                vector += _TILE_VECTORS
                continue
            if is_bytes:
                _bytes_narrow(row, a_bytes, columns, b_bytes, start + at, target + at, out_bytes, k)
            else:
                _floats_narrow(row, a_bytes, columns, b_bytes, start + at, target + at, out_bytes, k)
            vector += 1


def _constants(kind: Any, value: Any) -> Any:
    return ir.Constant(kind, [value] * VECTOR)


@intrinsic
def pack_row(_context: Any, values: Any, out: Any) -> Any:
    """16 magnitudes with sign at `values` (i16) become midpoints `2 v +- 1`, plus 128, at `out` (u8).

    Those that do not fit are cut; a non-zero result has a bit for each.
    """
    del values, out
    return types.uint16(types.uintp, types.uintp), _emit_pack


def _emit_pack(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
    values, out = args
    value = b.load(b.inttoptr(values, _PTR), align=2, typ=_V16)
    zero = _constants(_V16, 0)
    sign = b.sub(b.zext(b.icmp_signed(">", value, zero), _V16), b.zext(b.icmp_signed("<", value, zero), _V16))
    midpoint = b.add(b.shl(value, _constants(_V16, 1)), sign)
    highest = b.call(_declare(b, "llvm.smin.v16i16", _V16, [_V16, _V16]), [midpoint, _constants(_V16, 127)])
    fitting = b.call(_declare(b, "llvm.smax.v16i16", _V16, [_V16, _V16]), [highest, _constants(_V16, -128)])
    shifted = b.trunc(b.add(fitting, _constants(_V16, 128)), _V8)
    b.store(shifted, b.inttoptr(out, _PTR), align=1)
    return b.bitcast(b.icmp_signed("!=", fitting, midpoint), _I16)


@intrinsic
def bfloat16_bits(_context: Any, value: Any) -> Any:
    """Bits of the bfloat16 nearest to a finite float32, ties to even."""
    del value
    return types.uint16(types.float32), _emit_bfloat16


def _emit_bfloat16(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
    return _rounded(b, args[0], _I32, wide=_I32, narrow=_I16)


def _rounded(b: Any, value: Any, constant: Callable[[int], Any], *, wide: Any, narrow: Any) -> Any:
    """Bits of the bfloat16 nearest to finite float32, ties to even; one or a vector of them."""
    bits = b.bitcast(value, wide)
    odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    return b.trunc(b.lshr(b.add(b.add(bits, constant(0x7FFF)), odd), constant(16)), narrow)


@intrinsic
def quantise_16(_context: Any, values: Any, inverse: Any, rounding: Any, dead_zone: Any, limits: Any, out: Any) -> Any:
    """16 values (f32) at an address to symbols (i16) at another one.

    With x = value * inverse, `sign(x) * min(floor(|x| + rounding), limit)`; 0 below `dead_zone`.
    Limits (f32) < 2^15; NaN gives 0.
    """
    del values, inverse, rounding, dead_zone, limits, out
    single = types.float32
    return types.void(types.uintp, single, single, single, types.uintp, types.uintp), _emit_quantise


def _emit_quantise(context: Any, b: Any, _signature: Any, args: Any) -> Any:
    values, inverse, rounding, dead_zone, limits, out = args
    inverse, rounding, dead_zone = (_splat(b, each, _VF) for each in (inverse, rounding, dead_zone))
    value = b.fmul(b.load(b.inttoptr(values, _PTR), align=4, typ=_VF), inverse)
    limit = b.load(b.inttoptr(limits, _PTR), align=4, typ=_VF)
    size = b.call(_declare(b, "llvm.fabs.v16f32", _VF, [_VF]), [value])
    raised = b.fadd(size, rounding)
    # Ordered comparisons: a NaN is neither below the limit nor above the dead zone.
    bounded = b.select(b.fcmp_ordered("<", raised, limit), raised, limit)
    whole = b.fptosi(bounded, _V32)
    kept = b.select(b.fcmp_ordered(">=", size, dead_zone), whole, _constants(_V32, 0))
    negative = b.fcmp_ordered("<", value, ir.Constant(_VF, [0.0] * VECTOR))
    signed = b.select(negative, b.sub(_constants(_V32, 0), kept), kept)
    b.store(b.trunc(signed, _V16), b.inttoptr(out, _PTR), align=2)
    return context.get_dummy_value()


def _finish_of(*, is_half: bool) -> tuple[Any, Any]:
    """Two ways from 16 (or 2 * 16) sums to values at addresses, in bfloat16 or float32; each operation is rounded.

    One vector: `sums * (scale * factor) + bias`. Two of them, `apart` channels from each other, rotated with the same
    cosines and sines: separate products and sums, nothing fused.
    """

    @intrinsic
    def one(_context: Any, sums: Any, scale: Any, bias: Any, factor: Any, out: Any) -> Any:
        del sums, scale, bias, factor, out
        return types.void(*[types.uintp] * 3, types.float32, types.uintp), emit_one

    def emit_one(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        *places, factor, out = args
        _store_rounded(b, _scaled(b, places, factor, _I64(0)), out, is_half=is_half)
        return context.get_dummy_value()

    @intrinsic
    def pair(
        _context: Any, sums: Any, scale: Any, bias: Any, factor: Any, cosine: Any, sine: Any, apart: Any, out: Any
    ) -> Any:
        del sums, scale, bias, factor, cosine, sine, apart, out
        return types.void(*[types.uintp] * 3, types.float32, *[types.uintp] * 2, types.intp, types.uintp), emit_pair

    def emit_pair(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        *places, factor, cosine_at, sine_at, apart, out = args
        low, high = (_scaled(b, places, factor, offset) for offset in (_I64(0), b.mul(apart, _I64(4))))
        cosine, sine = (b.load(b.inttoptr(each, _PTR), align=4, typ=_VF) for each in (cosine_at, sine_at))
        _store_rounded(b, b.fsub(b.fmul(low, cosine), b.fmul(high, sine)), out, is_half=is_half)
        high_out = b.add(out, b.mul(apart, _I64(2 if is_half else 4)))
        _store_rounded(b, b.fadd(b.fmul(high, cosine), b.fmul(low, sine)), high_out, is_half=is_half)
        return context.get_dummy_value()

    return one, pair


def _scaled(b: Any, places: Any, factor: Any, offset: Any) -> Any:
    """16 channels in float32, from the addresses of sums, scale and bias."""
    sums_at, *rest = (b.inttoptr(b.add(place, offset), _PTR) for place in places)
    total = b.sitofp(b.load(sums_at, align=4, typ=_V32), _VF)
    scale, bias = (b.load(place, align=4, typ=_VF) for place in rest)
    return b.fadd(b.fmul(total, b.fmul(scale, _splat(b, factor, _VF))), bias)


def _store_rounded(b: Any, value: Any, out: Any, *, is_half: bool) -> None:
    """16 finite float32 as they are, or as the nearest bfloat16, ties to even."""
    if is_half:
        value = _rounded(b, value, partial(_constants, _V32), wide=_V32, narrow=_V16)
    b.store(value, b.inttoptr(out, _PTR), align=2 if is_half else 4)


_one_half, _pair_half = _finish_of(is_half=True)
_one_single, _pair_single = _finish_of(is_half=False)


@compiled("void(uintp, uintp, uintp, float32, uintp, uintp, intp, intp, uintp, boolean)")
def finish_head(
    sums: int,
    scale: int,
    bias: int,
    factor: float,
    cosine: int,
    sine: int,
    half: int,
    dim: int,
    out: int,
    is_half: bool,
) -> None:
    """Sums of one head's `dim` channels to values in bfloat16 (`is_half`) or float32, all at addresses.

    The first `2 * half` channels are rotated, halves apart; 0: none. Both numbers are multiples of 16.
    """
    item = 2 if is_half else 4
    for channel in range(0, half, VECTOR):
        at, to = 4 * channel, out + item * channel
        if is_half:
            _pair_half(sums + at, scale + at, bias + at, factor, cosine + at, sine + at, half, to)
        else:
            _pair_single(sums + at, scale + at, bias + at, factor, cosine + at, sine + at, half, to)
    for channel in range(2 * half, dim, VECTOR):
        at, to = 4 * channel, out + item * channel
        if is_half:
            _one_half(sums + at, scale + at, bias + at, factor, to)
        else:
            _one_single(sums + at, scale + at, bias + at, factor, to)


@intrinsic
def copy_bytes(_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy bytes from address to address."""
    del target, source, count
    return types.void(types.uintp, types.uintp, types.intp), _emit_copy


def _emit_copy(context: Any, b: Any, _signature: Any, args: Any) -> Any:
    target, source = (b.inttoptr(address, _PTR) for address in args[:2])
    function = _declare(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [_PTR, _PTR, _I64, _I1])
    b.call(function, [target, source, args[2], _I1(0)])
    return context.get_dummy_value()
