"""The inner loops of the entropy coder, as vectors of 16 lanes.

Covers: decoding, refining and encoding one row group; LLVM fits the vectors to the processor, whatever it is.
Does not cover: tables (`kvstore.codecs.rans`), the order of row groups (`kvstore.codecs.transform_decode`).

numba does not vectorise a loop with gathers and a shared read position, so the loops are written as LLVM code: a state
per lane in one register, one gather for 16 table entries, one expanding load (or compressing store) for the words.
"""

from functools import partial
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstore.compiled import compiled

LANES: Final = 16
_WORD_BITS: Final = 16
_TABLE_BITS: Final = 12

_I1, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_V1, _V16, _V32, _V64, _VF = (ir.VectorType(kind, LANES) for kind in (_I1, _I16, _I32, _I64, _F32))
_PTR: Final = ir.PointerType()


def _all(value: int) -> Any:
    return ir.Constant(_V32, [value] * LANES)


class _VectorGep(ir.instructions.Instruction):
    """`getelementptr` with a vector of indices, which llvmlite's builder does not know."""

    def __init__(self, parent: Any, base: Any, indices: Any) -> None:
        super().__init__(parent, ir.VectorType(_PTR, LANES), "getelementptr", [base, indices])

    def descr(self, buf: list[str]) -> None:
        """Write the instruction."""
        base, indices = self.operands
        buf.append(f"getelementptr i32, ptr {base.get_reference()}, {indices.type} {indices.get_reference()}\n")


class _Emitter:
    """What the three loops share."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def pointer(self, base: Any, offset: Any = None) -> Any:
        address = base if offset is None else self.builder.add(base, offset)
        return self.builder.inttoptr(address, _PTR)

    def load(self, kind: Any, base: Any, offset: Any = None, *, align: int = 1) -> Any:
        return self.builder.load(self.pointer(base, offset), align=align, typ=kind)

    def gather(self, base: Any, indices: Any) -> Any:
        """`base[indices]`, 32-bit elements; the index is signed, so that one hardware gather does it."""
        wide = self.builder.sext(indices, _V64)
        instruction = _VectorGep(self.builder.block, self.pointer(base), wide)
        self.builder._insert(instruction)
        pointers = ir.VectorType(_PTR, LANES)
        name = "llvm.masked.gather.v16i32.v16p0"
        function = self.declare(name, _V32, [pointers, _I32, _V1, _V32])
        return self.builder.call(function, [instruction, _I32(4), ir.Constant(_V1, [1] * LANES), _all(0)])

    def declare(self, name: str, result: Any, arguments: list[Any]) -> Any:
        known = self.builder.module.globals.get(name)
        return known or ir.Function(self.builder.module, ir.FunctionType(result, arguments), name=name)

    def count(self, mask: Any) -> Any:
        """How many lanes of a mask are set."""
        bits = self.builder.bitcast(mask, ir.IntType(LANES))
        function = self.declare("llvm.ctpop.i16", _I16, [_I16])
        return self.builder.zext(self.builder.call(function, [bits]), _I64)

    def magnitude(self, values: Any) -> Any:
        function = self.declare("llvm.abs.v16i32", _V32, [_V32, _I1])
        return self.builder.call(function, [values, _I1(0)])

    def table(self, tables: list[Any], values: Any) -> Any:
        """The table of each lane: for 0, for a magnitude of 1, for more."""
        b = self.builder
        size = self.magnitude(values)
        known = b.select(b.icmp_unsigned(">", size, _all(1)), tables[2], tables[1])
        return b.select(b.icmp_unsigned(">", size, _all(0)), known, tables[0])

    def step(self, luts: Any, words: Any, at: Any, state: Any, table: Any) -> tuple[Any, Any, Any]:
        """Decode 16 symbols; values, new state, new read position."""
        b = self.builder
        slot = b.and_(state, _all((1 << _TABLE_BITS) - 1))
        entry = self.gather(luts, b.add(table, slot))
        high = b.lshr(state, _all(_TABLE_BITS))
        less = b.and_(b.lshr(entry, _all(_TABLE_BITS)), _all((1 << _TABLE_BITS) - 1))
        offset = b.and_(entry, _all((1 << _TABLE_BITS) - 1))
        # The entry holds the frequency less one.
        state = b.add(b.mul(less, high), b.add(high, offset))
        return b.ashr(entry, _all(24)), *self.refill(words, at, state)

    def cut_step(self, words: Any, at: Any, state: Any, cuts: Any) -> tuple[Any, Any, Any]:
        """As `step`, for symbols -1, 0 and 1 only: comparisons instead of memory. `cuts`: where 0 and 1 begin."""
        b = self.builder
        slot, high = b.and_(state, _all((1 << _TABLE_BITS) - 1)), b.lshr(state, _all(_TABLE_BITS))
        zero, one = b.and_(cuts, _all(0xFFFF)), b.lshr(cuts, _all(16))
        is_minus, is_one = b.icmp_unsigned("<", slot, zero), b.icmp_unsigned(">=", slot, one)
        low = b.select(is_minus, _all(0), b.select(is_one, one, zero))
        top = b.select(is_minus, zero, b.select(is_one, _all(1 << _TABLE_BITS), one))
        value = b.select(is_minus, _all(-1), b.select(is_one, _all(1), _all(0)))
        state = b.add(b.mul(b.sub(top, low), high), b.sub(slot, low))
        return value, *self.refill(words, at, state)

    def refill(self, words: Any, at: Any, state: Any) -> tuple[Any, Any]:
        """Lanes that fell low read the next words; new state, new read position."""
        b = self.builder
        hungry = b.icmp_unsigned("<", state, _all(1 << _WORD_BITS))
        name = "llvm.masked.expandload.v16i32"
        function = self.declare(name, _V32, [_PTR, _V1, _V32])
        address = self.pointer(words, b.mul(at, _I64(4)))
        read = b.call(function, [address, hungry, _all(0)])
        shifted = b.or_(b.shl(state, _all(_WORD_BITS)), read)
        return b.select(hungry, shifted, state), b.add(at, self.count(hungry))

    def push(self, words: Any, at: Any, state: Any, frequency: Any, below: Any) -> tuple[Any, Any]:
        """Encode 16 symbols; lanes that are full write a word first. New state, new write position."""
        b = self.builder
        full = b.icmp_unsigned(">=", b.lshr(state, _all(20)), frequency)
        at = b.sub(at, self.count(full))
        store = self.declare("llvm.masked.compressstore.v16i32", ir.VoidType(), [_V32, _PTR, _V1])
        low = b.and_(state, _all((1 << _WORD_BITS) - 1))
        b.call(store, [low, self.pointer(words, b.mul(at, _I64(4))), full])
        state = b.select(full, b.lshr(state, _all(_WORD_BITS)), state)
        return b.add(_emit_push(b, state, frequency), below), at


_JOB_TYPES: Final = types.void(types.uintp, types.uintp, types.intp)
_JOB_FIELDS: Final = 6
"""Of one stream, 64 bits each: words, read position, number of words, states, tables, out."""


def _loop(*, streams: int, refine: bool) -> Any:
    """The decoder's loop over the tokens of one stream, or of two at once."""

    @intrinsic
    def loop(_context: Any, luts: Any, jobs: Any, count: Any) -> Any:
        del luts, jobs, count
        return _JOB_TYPES, partial(_emit_decoder, streams=streams, refine=refine)

    return loop


class _Stream:
    """What one stream is between two tokens; a step waits for its gather, so that two at once take little longer."""

    def __init__(self, e: _Emitter, jobs: Any, index: int, *, refine: bool) -> None:
        fields = [e.load(_I64, jobs, _I64(8 * (index * _JOB_FIELDS + field))) for field in range(_JOB_FIELDS)]
        self.words, self.first, self.limit, self.states, tables, self.out = fields
        self.tables = [e.load(_V32, tables, _I64(context * 4 * LANES)) for context in range(3)]
        self.start = e.load(_V32, self.states)
        self.refine = refine

    def begin(self, e: _Emitter) -> None:
        """Values that go from token to token."""
        self.at, self.state, self.previous = e.builder.phi(_I64), e.builder.phi(_V32), e.builder.phi(_V32)

    def token(self, e: _Emitter, luts: Any, offset: Any) -> None:
        """One token of 16 rows."""
        b = e.builder
        place = e.pointer(self.out, offset)
        known = b.sext(b.load(place, align=2, typ=_V16), _V32) if self.refine else self.previous
        table = e.table(self.tables, known)
        if self.refine:
            value, self.new_state, self.new_at = e.cut_step(self.words, self.at, self.state, table)
            # Twice the value and the new bit, away from zero; where there was no sign yet, the symbol brings it.
            away = b.select(b.icmp_signed("<", known, _all(0)), b.sub(_all(0), value), value)
            value = b.add(b.shl(known, _all(1)), away)
        else:
            value, self.new_state, self.new_at = e.step(luts, self.words, self.at, self.state, table)
        b.store(b.trunc(value, _V16), place, align=2)
        self.value = value

    def close(self, before: Any, loop: Any) -> None:
        """Where the values that go from token to token come from."""
        for phi, initial, later in (
            (self.at, self.first, self.new_at),
            (self.state, self.start, self.new_state),
            (self.previous, _all(0), self.value),
        ):
            phi.add_incoming(initial, before)
            phi.add_incoming(later, loop)


def _emit_decoder(context: Any, builder: Any, _signature: Any, args: Any, *, streams: int, refine: bool) -> Any:
    """Loop over `count` > 0 tokens; ends early when the words of a stream are used up."""
    luts, jobs, count = args
    e, b = _Emitter(builder), builder
    each = [_Stream(e, jobs, index, refine=refine) for index in range(streams)]
    before = b.block
    loop, done = b.append_basic_block("token"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    token = b.phi(_I64)
    for stream in each:
        stream.begin(e)
    for stream in each:
        stream.token(e, luts, b.mul(token, _I64(2 * LANES)))
    following = b.add(token, _I64(1))
    more = b.icmp_signed("<", following, count)
    for stream in each:
        more = b.and_(more, b.icmp_signed("<=", stream.new_at, stream.limit))
        stream.close(before, loop)
    token.add_incoming(_I64(0), before)
    token.add_incoming(following, loop)
    b.cbranch(more, loop, done)
    b.position_at_end(done)
    for index, stream in enumerate(each):
        b.store(stream.new_state, e.pointer(stream.states), align=4)
        b.store(stream.new_at, e.pointer(jobs, _I64(8 * (index * _JOB_FIELDS + 1))), align=8)
    return context.get_dummy_value()


@intrinsic
def _encode_group(
    _context: Any, entries: Any, words: Any, at: Any, states: Any, tables: Any, symbols: Any, known: Any, count: Any
) -> Any:
    del entries, words, at, states, tables, symbols, known, count
    return types.intp(*[types.uintp] * 2, types.intp, *[types.uintp] * 4, types.intp), _emit_encode


def _emit_encode(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
    """Loop over `count` > 0 tokens from the last to the first; the write position falls. Returns it."""
    entries, words, first, states, tables, symbols, known, count = args
    e, b = _Emitter(builder), builder
    by_context = [e.load(_V32, tables, _I64(context * 4 * LANES)) for context in range(3)]
    start = e.load(_V32, states)
    before = b.block
    loop, done = b.append_basic_block("token"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    left, at, state = b.phi(_I64), b.phi(_I64), b.phi(_V32)
    token = b.sub(left, _I64(1))
    row = b.mul(token, _I64(2 * LANES))
    value = b.sext(e.load(_V16, symbols, row, align=2), _V32)
    context = b.sext(e.load(_V16, known, row, align=2), _V32)
    # Entries of a table: 256, value 0 at 128; frequency less one, and what lies below it.
    index = b.add(e.table(by_context, context), b.add(value, _all(128)))
    entry = e.gather(entries, index)
    frequency = b.add(b.lshr(entry, _all(_TABLE_BITS)), _all(1))
    below = b.and_(entry, _all((1 << _TABLE_BITS) - 1))
    new_state, new_at = e.push(words, at, state, frequency, below)
    for phi, initial, later in ((left, count, token), (at, first, new_at), (state, start, new_state)):
        phi.add_incoming(initial, before)
        phi.add_incoming(later, loop)
    b.cbranch(b.icmp_signed(">", token, _I64(0)), loop, done)
    b.position_at_end(done)
    b.store(new_state, e.pointer(states), align=4)
    return new_at


@intrinsic
def _encode_bits(
    _context: Any, words: Any, at: Any, states: Any, cuts: Any, values: Any, missing: Any, count: Any
) -> Any:
    del words, at, states, cuts, values, missing, count
    return types.intp(types.uintp, types.intp, *[types.uintp] * 3, types.intp, types.intp), _emit_bits


def _emit_bits(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
    """As `_emit_encode`, for the bits that a level adds: comparisons instead of memory, as a gather takes longest."""
    words, first, states, cuts, values, missing, count = args
    e, b = _Emitter(builder), builder
    by_context = [e.load(_V32, cuts, _I64(context * 4 * LANES)) for context in range(3)]
    zeros, ones = ([half(each) for each in by_context] for half in (partial(b.and_, _all(0xFFFF)), partial(_high, b)))
    single = b.insert_element(ir.Constant(_V32, ir.Undefined), b.trunc(missing, _I32), _I32(0))
    shift = b.shuffle_vector(single, single, _all(0))
    start = e.load(_V32, states)
    before = b.block
    loop, done = b.append_basic_block("token"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    left, at, state = b.phi(_I64), b.phi(_I64), b.phi(_V32)
    token = b.sub(left, _I64(1))
    value = b.sext(e.load(_V16, values, b.mul(token, _I64(2 * LANES)), align=2), _V32)
    size = b.lshr(e.magnitude(value), shift)
    known = b.lshr(size, _all(1))
    zero, one = e.table(zeros, known), e.table(ones, known)
    is_set = b.icmp_unsigned("!=", b.and_(size, _all(1)), _all(0))
    # Until a value has a sign, its first bit brings it.
    is_minus = b.and_(b.icmp_unsigned("==", size, _all(1)), b.icmp_signed("<", value, _all(0)))
    low = b.select(is_minus, _all(0), b.select(is_set, one, zero))
    top = b.select(is_minus, zero, b.select(is_set, _all(1 << _TABLE_BITS), one))
    new_state, new_at = e.push(words, at, state, b.sub(top, low), low)
    for phi, initial, later in ((left, count, token), (at, first, new_at), (state, start, new_state)):
        phi.add_incoming(initial, before)
        phi.add_incoming(later, loop)
    b.cbranch(b.icmp_signed(">", token, _I64(0)), loop, done)
    b.position_at_end(done)
    b.store(new_state, e.pointer(states), align=4)
    return new_at


def _high(b: Any, cuts: Any) -> Any:
    return b.lshr(cuts, _all(16))


def _emit_push(b: Any, state: Any, frequency: Any) -> Any:
    """`state // frequency * 4096 + state % frequency`, for quotients below 2^20.

    A product with the reciprocal, because that does not wait for the state, and every step waits for the one before.
    The reciprocal is too small by more than three roundings of float32 are worth: so the quotient is right, or too
    small by one.
    """
    reciprocal = b.fdiv(ir.Constant(_VF, [1.0 - 2.0**-22] * LANES), b.uitofp(frequency, _VF))
    quotient = b.fptoui(b.fmul(b.uitofp(state, _VF), reciprocal), _V32)
    # quotient * 4096 + (state - quotient * frequency): both products at once.
    others = b.sub(_all(1 << _TABLE_BITS), frequency)
    pushed = b.add(state, b.mul(quotient, others))
    rest = b.sub(state, b.mul(quotient, frequency))
    return b.select(b.icmp_unsigned(">=", rest, frequency), b.add(pushed, others), pushed)


_decode_one, _decode_two = _loop(streams=1, refine=False), _loop(streams=2, refine=False)
_refine_one, _refine_two = _loop(streams=1, refine=True), _loop(streams=2, refine=True)


@compiled("void(uintp, uintp, intp, intp, boolean)")
def decode_streams(luts: int, jobs: int, streams: int, count: int, refine: bool) -> None:
    """Decode `count` > 0 tokens of 16 rows of one stream, or of two at once.

    Args:
        luts: Address of the look-up tables; refining needs none.
        jobs: Address of i64[streams, 6]: addresses of words (u32, 16 bits each; 16 more than there are may be read),
            the read position (in and out), the number of words, and addresses of the states (u32[16], in and out), the
            tables (i32[3, 16], by context and lane) and the values (i16[count, 16]). A read position above the number
            of words says that they were not enough; then no stream was finished.
        streams: 1 or 2.
        count: Tokens.
        refine: Whether the values are known and get one more bit: then they are the context, not the row's symbol
            before. A table is then no first entry, but says itself at which slot 0 begins (16 bits), and 1 (16 bits
            above): all refinements code -1, 0 and 1 only.
    """
    if streams == 1:
        if refine:
            _refine_one(luts, jobs, count)
        else:
            _decode_one(luts, jobs, count)
    elif refine:
        _refine_two(luts, jobs, count)
    else:
        _decode_two(luts, jobs, count)


@compiled("intp(uintp, uintp, intp, intp, uintp, uintp, uintp, intp)")
def decode_group(luts: int, words: int, at: int, limit: int, states: int, tables: int, out: int, count: int) -> int:
    """`decode_streams` of one stream, not refining. Returns the read position."""
    jobs = np.array([words, at, limit, states, tables, out], np.int64)
    _decode_one(luts, jobs.ctypes.data, count)
    return jobs[1]


@compiled("intp(uintp, uintp, intp, uintp, uintp, uintp, uintp, intp)")
def encode_group(
    entries: int, words: int, at: int, states: int, tables: int, symbols: int, known: int, count: int
) -> int:
    """Encode `count` > 0 tokens of 16 rows backwards: words go below `words[at]`. All but counts are addresses.

    `entries` u32[tables, 256], `words` u32, `symbols` and `known` (the contexts) i16[count, 16]; the rest as in
    `decode_streams`. Returns the new write position: at most `16 * count` words lower.
    """
    return _encode_group(entries, words, at, states, tables, symbols, known, count)


@compiled("intp(uintp, intp, uintp, uintp, uintp, intp, intp)")
def encode_bits(words: int, at: int, states: int, cuts: int, values: int, missing: int, count: int) -> int:
    """`encode_group` of what a refinement adds to `values` i16[count, 16], which `missing` levels lie behind.

    `cuts` as in `decode_streams`.
    """
    return _encode_bits(words, at, states, cuts, values, missing, count)
