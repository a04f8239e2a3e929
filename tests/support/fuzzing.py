"""Hostile inputs by the hundred thousand: seeded mutations of valid inputs, splices of two, and pure garbage."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
from msgspec import inspect

from cluster.errors import DataError

_POWERS = (7, 8, 15, 16, 31, 32, 40, 41, 63, 64)
NUMBERS = (
    *(((1 << power) + more) % (1 << 64) for power in _POWERS for more in (-1, 0, 1)),
    *((1 << 64) - (1 << power) for power in _POWERS[:-1]),
    *(0, 1, 2, 87, 88, 89, 4007, 4008, 4009, 4095, 4096, 4097, 8192, 12_288),
)
"""Where lengths, counts and versions go wrong."""


class Mutator:
    """Endless hostile inputs, the same ones for the same seed.

    Args:
        valid: Inputs that are right; there are at least two, so that they can be spliced.
        seed: Chooses the sequence.
        offsets: Where numbers lie in the inputs: these are aimed at.
    """

    def __init__(self, valid: Sequence[bytes], *, seed: str, offsets: Sequence[int] = ()) -> None:
        assert len(valid) >= 2
        self._valid = valid
        self._offsets = offsets
        self._random = random.Random(seed)
        self._steps: tuple[Callable[[bytearray], bytearray], ...] = (
            self._flip_bit,
            self._flip_bit,
            self._set_number,
            self._set_number,
            self._set_byte,
            self._cut,
            self._grow,
            self._splice,
            self._move_range,
            self._zero_range,
        )

    def next(self) -> bytes:
        """One input; now and then a valid one."""
        choose = self._random.random()
        if choose < 0.05:
            return self._random.randbytes(self._random.randrange(400))
        data = bytearray(self._random.choice(self._valid))
        if choose < 0.06:
            return bytes(data)
        for _ in range(1 if choose < 0.7 else self._random.randrange(2, 6)):
            data = self._random.choice(self._steps)(data)
        return bytes(data)

    def _at(self, data: bytearray) -> int:
        if self._offsets and self._random.random() < 0.5:
            return self._random.choice(self._offsets)
        return self._random.randrange(len(data) + 1)

    def _flip_bit(self, data: bytearray) -> bytearray:
        at = self._at(data)
        if at < len(data):
            data[at] ^= 1 << self._random.randrange(8)
        return data

    def _set_byte(self, data: bytearray) -> bytearray:
        at = self._at(data)
        if at < len(data):
            data[at] = self._random.randrange(256)
        return data

    def _set_number(self, data: bytearray) -> bytearray:
        width = self._random.choice((1, 2, 4, 8))
        order = self._random.choice(("little", "big"))
        number = (self._random.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
        at = self._at(data)
        data[at : at + width] = number
        return data

    def _cut(self, data: bytearray) -> bytearray:
        return data[: self._at(data)]

    def _grow(self, data: bytearray) -> bytearray:
        return data + self._random.choice((bytes(1), bytes(4096), self._random.randbytes(self._random.randrange(64))))

    def _splice(self, data: bytearray) -> bytearray:
        other, at = self._random.choice(self._valid), self._at(data)
        if self._random.random() < 0.5:
            return data[:at] + other[at:]
        return data[:at] + other[self._random.randrange(len(other)) :]

    def _move_range(self, data: bytearray) -> bytearray:
        start, to = self._at(data), self._at(data)
        piece = data[start : start + self._random.randrange(1, 40)]
        data[to : to + len(piece)] = piece
        return data

    def _zero_range(self, data: bytearray) -> bytearray:
        start = self._at(data)
        stop = min(len(data), start + self._random.randrange(1, 40))
        data[start:stop] = bytes(max(0, stop - start))
        return data


@dataclass
class Target:
    """What is fed: `believe` takes an input and raises the errors that are allowed, or asserts that it is right."""

    name: str
    valid: Sequence[bytes]
    believe: Callable[[bytes], object]
    weight: int = 1
    """Share of the inputs."""
    offsets: Sequence[int] = ()
    remake: Callable[[bytes], bytes] = bytes
    """What an attacker does to a mutated input before it is fed, for example sign it."""
    refusals: tuple[type[Exception], ...] = (DataError,)
    min_reasons: int = 2
    """Different reasons for refusals that must come up: inputs that all fail at the door prove little."""


@dataclass
class Outcome:
    """What became of the inputs."""

    inputs: int = 0
    believed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def attack(target: Target, *, inputs: int, seed: int = 0) -> Outcome:
    """Feed a target.

    Raises:
        AssertionError: An input was believed that is not right, or ended in another error than a refusal; names the
            input.
    """
    mutator = Mutator(target.valid, seed=f"{seed}/{target.name}", offsets=target.offsets)
    outcome = Outcome()
    while outcome.inputs < inputs:
        data = target.remake(mutator.next())
        outcome.inputs += 1
        try:
            target.believe(data)
            outcome.believed += 1
        except target.refusals as error:
            outcome.reasons[_reason(error)] += 1
        except BaseException as error:
            shown = data.hex() if len(data) < 2000 else f"{data[:1000].hex()}... ({len(data)} bytes)"
            raise AssertionError(
                f"{target.name}, seed {seed}, input {outcome.inputs}: {error!r} for {shown}"
            ) from error
    return outcome


def _reason(error: Exception) -> str:
    """The error's name and first words, without what differs from input to input."""
    words = re.sub(r"[0-9a-f]{8,}|\d+|b?'.*", "#", str(error)).split()
    return f"{type(error).__name__}: {' '.join(words[:9])}"


def samples_of(union: Any) -> list[bytes]:
    """A packed message of every type in a union of structs, its optional values once there and once not.

    From the declarations, so that a message that is added is attacked too.
    """
    kinds = get_args(union) or (union,)
    return [
        msgspec.msgpack.encode(_value(inspect.type_info(kind), filled)) for kind in kinds for filled in (True, False)
    ]


def _value(kind: inspect.Type, filled: bool) -> Any:
    """Something that the declaration allows: the largest choices if `filled`."""
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            return cls(**{f.name: _value(f.type, filled) for f in fields})
        case inspect.UnionType(types=types):
            options = [option for option in types if not isinstance(option, inspect.NoneType)]
            return _value(options[0], filled) if filled or len(options) == len(types) else None
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return [_value(item, filled), _value(item, False)] if filled else []
        case inspect.DictType(key_type=key, value_type=value):
            return {_value(key, filled): _value(value, filled)} if filled else {}
        case inspect.BytesType(min_length=length):
            return b"\x07" * (length or (24 if filled else 0))
        case inspect.StrType():
            return "some text" if filled else ""
        case inspect.IntType(gt=above):
            return 70_000 if filled else 1 + (above or 0)
        case inspect.FloatType():
            return 1.5
        case inspect.BoolType():
            return filled
        case inspect.EnumType(cls=enum):
            return next(iter(enum))
        case inspect.LiteralType(values=values):
            return values[0]
    raise NotImplementedError(f"no sample for {kind}: teach this function")
