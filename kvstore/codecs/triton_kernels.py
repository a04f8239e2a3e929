"""The kernels of the `transform` codec's decoder for GPUs.

Covers: entropy decoding of sections, the inverse transform into KV, wherever its slots are.
Does not cover: what they are launched with, and on what (`kvstore.codecs.triton_decode`).

Triton compiles these functions for a GPU, or runs them in its interpreter: so they keep to what both have in common,
and touch memory under masks only. Numbers agree with the CPU's decoder to the bit: integers are exact, every operation
on floats is rounded by itself (the launcher forbids fused multiply-adds), and rounding to bfloat16 is spelled out,
because the interpreter's is another one.
Shape letters: S sections of one program, T tokens, R rows, P rotary pairs of a head (its two halves).
"""

from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction


class _Device(JITFunction):
    """A function for kernels: compiled with a kernel that calls it, plain Python in the interpreter."""

    def __call__(self, *args: tl.tensor, **kwargs: tl.tensor) -> Any:
        return self.fn(*args, **kwargs)


@_Device
def _step(
    words: tl.tensor,
    words_at: tl.tensor,
    num_words: tl.tensor,
    lookup: tl.tensor,
    table: tl.tensor,
    state: tl.tensor,
    used: tl.tensor,
    is_coded: tl.tensor,
) -> tl.tensor:
    """Decode a symbol on every lane that is coded: values, states, words used.

    Lanes that run short take words in their order. Words behind the last one are 0.
    """
    found = tl.load(lookup + table * 4096 + (state & 4095).to(tl.int32), mask=is_coded, other=0)
    frequency = ((found >> 12) & 4095).to(tl.uint32) + 1
    fresh = frequency * (state >> 12) + (found & 4095).to(tl.uint32)
    is_short = is_coded & (fresh < 65536)
    takes = is_short.to(tl.int32)
    at = used[:, None] + tl.associative_scan(takes, 1, tl.standard._sum_combine) - takes
    word = tl.load(words + words_at + at, mask=is_short & (at < num_words[:, None]), other=0)
    fresh = tl.where(is_short, (fresh << 16) | word.to(tl.uint32), fresh)
    return found >> 24, tl.where(is_coded, fresh, state), used + tl.reduce(takes, 1, tl.standard._sum_combine)


def decode_sections(
    sections: tl.tensor,
    num_sections: tl.tensor,
    words: tl.tensor,
    table_ids: tl.tensor,
    lookup: tl.tensor,
    symbols: tl.tensor,
    classes: tl.tensor,
    peaks: tl.tensor,
    results: tl.tensor,
    row_pitch: tl.tensor,
    IS_BASE: tl.constexpr,
    SECTIONS: tl.constexpr,
) -> None:
    """Entropy-decode `SECTIONS` sections of one level per program: sixteen rows of each at a time, token by token.

    `symbols` holds the values of the level before, and those of this one afterwards. A `peak` is a unit's largest
    magnitude. A result is 0 where states and words end as they must, and classes are within bounds.
    """
    lane = tl.arange(0, 16)[None, :]
    section = tl.program_id(0) * SECTIONS + tl.arange(0, SECTIONS)
    exists = section < num_sections
    field = (sections + section.to(tl.int64) * 13)[:, None]
    is_there = exists[:, None]
    states_at = tl.load(field, mask=is_there, other=0)
    num_words = tl.load(sections + section.to(tl.int64) * 13 + 1, mask=exists, other=0).to(tl.int32)
    num_tokens = tl.load(field + 2, mask=is_there, other=0).to(tl.int32)
    num_rows = tl.load(field + 3, mask=is_there, other=0).to(tl.int32)
    known_rows = tl.load(field + 4, mask=is_there, other=0).to(tl.int32)
    ids_at = tl.load(field + 5, mask=is_there, other=0)
    symbols_at = tl.load(field + 6, mask=is_there, other=0)
    low = tl.load(words + states_at + 2 * lane, mask=is_there, other=0).to(tl.uint32)
    state = low | (tl.load(words + states_at + 2 * lane + 1, mask=is_there, other=1).to(tl.uint32) << 16)
    words_at = states_at + 32
    used, wrong = tl.full((SECTIONS,), 0, tl.int32), tl.full((SECTIONS,), 0, tl.int32)
    peak = tl.full((SECTIONS, 16), 0, tl.int32)
    most_tokens = tl.reduce(tl.reshape(num_tokens, (SECTIONS,)), 0, tl.standard._elementwise_max)
    most_rows = tl.reduce(tl.reshape(num_rows, (SECTIONS,)), 0, tl.standard._elementwise_max)
    if IS_BASE:
        table = tl.load(field + 8, mask=is_there, other=-1).to(tl.int32) + 0 * lane
        place = classes + tl.load(field + 9, mask=is_there, other=0) + lane
        for first in range(0, most_tokens, 16):
            is_coded = (table >= 0) & (first < num_tokens)
            value, state, used = _step(words, words_at, num_words, lookup, table, state, used, is_coded)
            tl.store(place + first, value.to(tl.uint8), mask=is_coded)
            wrong += tl.reduce((is_coded & ((value & 7) != value)).to(tl.int32), 1, tl.standard._sum_combine)
    for first_row in range(0, most_rows, 16):
        row = first_row + lane
        is_row, is_known = row < num_rows, row < known_rows
        ids = tl.load(table_ids + ids_at + row, mask=is_row, other=0)
        cell = symbols + symbols_at + row
        # Base, where nothing is known: the value of the token before. Refinement: what is known of this token's.
        before = tl.load(cell, mask=is_known & (num_tokens > 0), other=0).to(tl.int32)
        for token in range(most_tokens):
            is_coded = is_row & (token < num_tokens)
            table = (ids >> (8 * tl.minimum(tl.abs(before), 2))) & 255
            value, state, used = _step(words, words_at, num_words, lookup, table, state, used, is_coded)
            if IS_BASE:
                before = value
            else:
                value = 2 * before + tl.where(before < 0, -value, value)
                # Read before this token's value is written, so that the next step does not wait for memory.
                before = tl.load(cell + row_pitch, mask=is_known & (token + 1 < num_tokens), other=0).to(tl.int32)
            tl.store(cell, value.to(tl.int16), mask=is_coded)
            peak = tl.maximum(peak, tl.where(is_coded, tl.abs(value), 0))
            cell += row_pitch
    unit = tl.load(sections + section.to(tl.int64) * 13 + 7, mask=exists, other=0)
    tl.store(peaks + unit, tl.reduce(peak, 1, tl.standard._elementwise_max), mask=exists)
    wrong += tl.reduce((state != 65536).to(tl.int32), 1, tl.standard._sum_combine)
    tl.store(results + unit, wrong + (used != num_words).to(tl.int32), mask=exists)


def place_escapes(
    sections: tl.tensor,
    first_section: tl.tensor,
    words: tl.tensor,
    symbols: tl.tensor,
    peaks: tl.tensor,
    results: tl.tensor,
    row_pitch: tl.tensor,
    ESCAPES: tl.constexpr,
) -> None:
    """Put in the symbols of one base section that its tables do not know, instead of those that stood for them."""
    field = sections + (first_section + tl.program_id(0)).to(tl.int64) * 13
    num_escapes = tl.load(field + 10).to(tl.int32)
    first = words + tl.load(field) - 3 * num_escapes.to(tl.int64)
    num_tokens, num_rows = tl.load(field + 2), tl.load(field + 12)
    bound = tl.load(field + 11).to(tl.int32)
    place = symbols + tl.load(field + 6)
    wrong = tl.full((ESCAPES,), 0, tl.int32)
    for begin in range(0, num_escapes, ESCAPES):
        escape = begin + tl.arange(0, ESCAPES)
        exists = escape < num_escapes
        entry = first + 3 * escape.to(tl.int64)
        low = tl.load(entry, mask=exists, other=0).to(tl.int64)
        index = low | (tl.load(entry + 1, mask=exists, other=0).to(tl.int64) << 16)
        value = tl.load(entry + 2, mask=exists, other=0).to(tl.int16, bitcast=True)
        is_valid = exists & (index < num_rows * num_tokens) & (tl.abs(value.to(tl.int32)) <= bound)
        cell = (index % num_tokens) * row_pitch + index // num_tokens
        tl.store(place + cell, value, mask=is_valid)
        wrong += (exists & (is_valid == 0)).to(tl.int32)
    if num_escapes > 0:
        unit = tl.load(field + 7)
        tl.store(peaks + unit, 32767)
        wrong_total = tl.reduce(wrong, 0, tl.standard._sum_combine)
        if wrong_total > 0:
            tl.store(results + unit, wrong_total)


@_Device
def _doubled(value: tl.tensor) -> tl.tensor:
    """Twice a symbol's value, moved to the middle of its bin: in halves of a bin, 0 stays 0."""
    return 2 * value + (value > 0).to(tl.int32) - (value < 0).to(tl.int32)


@_Device
def _products(
    rows: tl.tensor,
    is_token: tl.tensor,
    num_rows: tl.tensor,
    is_wide: tl.tensor,
    lefts: tl.tensor,
    rights: tl.tensor,
    is_pair: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tl.tensor:
    """Symbols times basis in exact integers, for both halves of the pairs.

    Doubled symbols have up to 15 bits, the matrix units take 8: a second product with the high bytes follows where
    there are any, which is rare.
    """
    part = tl.arange(0, ROWS)
    left = tl.full((TOKENS, PAIRS), 0, tl.int32)
    right = tl.full((TOKENS, PAIRS), 0, tl.int32)
    for row in range(0, num_rows, ROWS):
        is_row = part < num_rows - row
        is_read = is_row[:, None] & is_pair[None, :]
        value = tl.load(rows + (row + part)[None, :], mask=is_token[:, None] & is_row[None, :], other=0)
        low = (((_doubled(value.to(tl.int32)) + 128) & 255) - 128).to(tl.int8)
        left_part = tl.load(lefts + (row + part)[:, None], mask=is_read, other=0)
        left = tl.dot(low, left_part, acc=left, out_dtype=tl.int32)
        right_part = tl.load(rights + (row + part)[:, None], mask=is_read, other=0)
        right = tl.dot(low, right_part, acc=right, out_dtype=tl.int32)
    if is_wide:
        for row in range(0, num_rows, ROWS):
            is_row = part < num_rows - row
            is_read = is_row[:, None] & is_pair[None, :]
            value = tl.load(rows + (row + part)[None, :], mask=is_token[:, None] & is_row[None, :], other=0)
            high = ((_doubled(value.to(tl.int32)) + 128) >> 8).to(tl.int8)
            left_part = tl.load(lefts + (row + part)[:, None], mask=is_read, other=0)
            left += 256 * tl.dot(high, left_part, out_dtype=tl.int32)
            right_part = tl.load(rights + (row + part)[:, None], mask=is_read, other=0)
            right += 256 * tl.dot(high, right_part, out_dtype=tl.int32)
    return left, right


@_Device
def _scaled(total: tl.tensor, channel: tl.tensor, is_pair: tl.tensor, ratio: tl.tensor) -> tl.tensor:
    """Sums as values: times the scale of channel and token, plus bias."""
    scale = tl.load(channel, mask=is_pair, other=0.0)[None, :] * ratio
    return scale * total.to(tl.float32) + tl.load(channel + 1, mask=is_pair, other=0.0)[None, :]


@_Device
def _turned(left: tl.tensor, right: tl.tensor, cos: tl.tensor, sin: tl.tensor, is_turned: tl.tensor) -> tl.tensor:
    """Pairs rotated to their token's position."""
    turned = left * cos - right * sin, right * cos + left * sin
    return tl.where(is_turned, turned[0], left), tl.where(is_turned, turned[1], right)


@_Device
def _place(address: tl.tensor, offset: tl.tensor, value: tl.tensor, mask: tl.tensor, KIND: tl.constexpr) -> None:
    """Write values as the KV dtype `KIND` (0: float32, 1: float16, 2: bfloat16), rounded to even."""
    if KIND == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offset, value, mask=mask)
    elif KIND == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offset, value.to(tl.float16), mask=mask)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        even = (bits + 32767 + ((bits >> 16) & 1)) >> 16
        # A NaN must not round to an infinity.
        even = tl.where(value == value, even, 32704)
        tl.store(address.to(tl.pointer_type(tl.uint16)) + offset, even.to(tl.uint16), mask=mask)


def transform(
    tiles: tl.tensor,
    chunks: tl.tensor,
    units: tl.tensor,
    symbols: tl.tensor,
    peaks: tl.tensor,
    classes: tl.tensor,
    basis: tl.tensor,
    channels: tl.tensor,
    token_scales: tl.tensor,
    pair_columns: tl.tensor,
    targets: tl.tensor,
    slots: tl.tensor,
    num_slots: tl.tensor,
    block_slots: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    chunk_targets: tl.tensor,
    first_band: tl.tensor,
    groups: tl.tensor,
    group_heads: tl.tensor,
    row_pitch: tl.tensor,
    num_pairs: tl.tensor,
    rotary_pairs: tl.tensor,
    KIND: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Turn the symbols of one band's head and one tile of tokens into KV, and write it where its slots are.

    A head's channels are worked on as the two halves of its rotary pairs, so that K is rotated in registers.
    """
    head, tile, local = tl.program_id(0) % group_heads, tl.program_id(0) // group_heads, tl.program_id(1)
    chunk = tl.load(tiles + 2 * tile).to(tl.int64)
    index = chunk * tl.num_programs(1) + local
    token = tl.load(tiles + 2 * tile + 1) + tl.arange(0, TOKENS)
    is_token = token < tl.load(chunks + 5 * chunk).to(tl.int32)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < num_pairs
    left = tl.load(pair_columns + pair, mask=is_pair, other=0)
    right = tl.load(pair_columns + num_pairs + pair, mask=is_pair, other=0)
    band = (first_band + local).to(tl.int64)
    column = (band * group_heads + head) * 2 * num_pairs
    unit, is_wide = units + index * 4, tl.load(peaks + index) > 63
    rows = symbols + tl.multiple_of(tl.load(unit), 16) + (token.to(tl.int64) * row_pitch)[:, None]
    num_rows = tl.multiple_of(tl.load(unit + 1).to(tl.int32), 16)
    lefts, rights = basis + (column + left)[None, :] * row_pitch, basis + (column + right)[None, :] * row_pitch
    left_sum, right_sum = _products(rows, is_token, num_rows, is_wide, lefts, rights, is_pair, TOKENS, ROWS, PAIRS)
    classes_at = tl.load(unit + 3)
    grade = tl.load(classes + classes_at + token, mask=is_token & (classes_at >= 0), other=0).to(tl.int32)
    ratio = tl.load(token_scales + band * 8 + (grade & 7), mask=is_token, other=1.0)
    ratio = (ratio * tl.load(unit + 2).to(tl.float32))[:, None]
    left_x = _scaled(left_sum, channels + 2 * (column + left), is_pair, ratio)
    right_x = _scaled(right_sum, channels + 2 * (column + right), is_pair, ratio)
    is_turned = is_token[:, None] & (((local // groups) % 2 == 0) & (pair < rotary_pairs))[None, :]
    turns = tl.load(chunks + 5 * chunk + 2).to(tl.pointer_type(tl.float32))
    turn = turns + (token.to(tl.int64) * 2 * rotary_pairs)[:, None] + pair[None, :]
    cos, sin = tl.load(turn, mask=is_turned, other=1.0), tl.load(turn + rotary_pairs, mask=is_turned, other=0.0)
    # A chunk's exact tokens come first.
    slots_at = tl.load(chunks + 5 * chunk + 1) + tl.load(chunks + 5 * chunk + 4)
    slot = tl.load(slots + slots_at + token, mask=is_token, other=-1)
    offset = (slot // block_slots).to(tl.int64) * block_stride + (slot % block_slots) * slot_stride
    offset = (offset + ((local % groups) * group_heads + head).to(tl.int64) * head_stride)[:, None]
    address = tl.load(targets + chunk * chunk_targets + local // groups)
    is_placed = ((slot >= 0) & (slot < num_slots))[:, None] & is_pair[None, :]
    left_x, right_x = _turned(left_x, right_x, cos, sin, is_turned)
    _place(address, offset + left[None, :], left_x, is_placed, KIND)
    _place(address, offset + right[None, :], right_x, is_placed, KIND)


def place_exact(
    chunks: tl.tensor,
    exact: tl.tensor,
    targets: tl.tensor,
    slots: tl.tensor,
    num_slots: tl.tensor,
    block_slots: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    chunk_targets: tl.tensor,
    num_heads: tl.tensor,
    head_dim: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """Copy the exact tokens of one chunk, layer, and K or V to their slots."""
    chunk, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_exact = tl.load(chunks + 5 * chunk + 4).to(tl.int32)
    first_slot, first_value = tl.load(chunks + 5 * chunk + 1), tl.load(chunks + 5 * chunk + 3)
    head, dim = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    is_value = (head < num_heads) & (dim < head_dim)
    address = tl.load(targets + chunk * chunk_targets + part)
    for token in range(num_exact):
        slot = tl.load(slots + first_slot + token)
        at = first_value + (part * num_exact + token) * num_heads * head_dim
        is_placed = is_value & (slot >= 0) & (slot < num_slots)
        value = tl.load(exact + at + head * head_dim + dim, mask=is_placed, other=0)
        offset = (slot // block_slots).to(tl.int64) * block_stride + (slot % block_slots) * slot_stride
        offset = offset + head.to(tl.int64) * head_stride + dim
        if BYTES == 2:
            tl.store(address.to(tl.pointer_type(tl.uint16)) + offset, value, mask=is_placed)
        else:
            tl.store(address.to(tl.pointer_type(tl.uint32)) + offset, value, mask=is_placed)
