"""Which codec stores a chunk, and which reads one: the engine's side of `kvstore.codecs`.

Covers: the form in which chunks are saved (codec, profile, level), hand-overs included, and how a stored chunk is read,
whoever wrote it. Imports no vLLM.
Does not cover: bytes (`kvstore.codecs`), threads (`kvstore.engine.saver`, `kvstore.engine.reading`), where profiles
come from (`kvstore.engine.profiles`).
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

import msgspec
import torch

from cluster.errors import DataError, SettingsError
from kvstore.codecs import TRANSFORM, ProfileMissingError, codec_by_name, codec_names
from kvstore.codecs.controller import Path, choose_form
from kvstore.codecs.profile import Profile
from kvstore.engine.params import Handoff
from kvstore.engine.profiles import (
    MAX_KEPT,
    ProfileShelf,
    Weights,
    is_made_for,
    load_profile,
    misfit,
    shipped_profiles,
)
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.interfaces import ChunkMeta
from kvstore.keys import KvScope

logger = logging.getLogger(__name__)

FIRST_BYTES: Final = 64
"""Bytes at a payload's start by which a format says how long its head is."""
_PROFILE_S: Final = 2.0
"""Bound on asking the store about a profile while chunks are saved."""
_LEVEL_BITS: Final = (1.2, 2.0, 3.0, 4.0)
"""Bits per value by level: a guess is enough to tell a hundred-fold difference
between links."""
_PLAIN_RATIO: Final = 0.5
"""The same for codecs without levels."""


class CodecMismatchError(DataError):
    """A chunk names a profile of another model: a miss."""


class OpenChunk(Protocol):
    """A chunk whose table of contents has arrived. Safe for several threads that decode different layers."""

    @property
    def num_levels(self) -> int:
        """Levels that the payload holds when it is whole; at least 1."""
        ...

    def stop_bytes(self, *, level: int, layer: int) -> int:
        """Bytes of the payload, from its start, that a layer needs at that level and all coarser ones."""
        ...

    def decode(self, layer: int, *, level: int, out_2TNH: torch.Tensor) -> None:
        """Decode one layer.

        Raises:
            DataError: Its bytes are damaged; what `out_2TNH` then holds means nothing.
        """
        ...


class ChunkFormat(Protocol):
    """Chunks of one codec and profile. Safe for several threads."""

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """Bytes to reserve for a chunk."""
        ...

    def encode(self, kv_L2TNH: torch.Tensor, *, meta: ChunkMeta, level: int | None, out: memoryview) -> int:
        """Write a chunk up to a level, None for all, to the start of `out`; bytes written.

        Raises:
            DataError: This KV cannot be coded.
        """
        ...

    def head_bytes(self, payload: memoryview, *, meta: ChunkMeta) -> int:
        """Bytes that must be in place for `open`; looks at the first `FIRST_BYTES` only.

        Raises:
            DataError: The payload is shorter than that.
        """
        ...

    def open(self, payload: memoryview, *, meta: ChunkMeta) -> OpenChunk:
        """Read the table of contents.

        Raises:
            DataError: It is damaged, or of another version.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How one chunk is stored."""

    meta: ChunkMeta
    profile: Profile | None = None
    level: int | None = None
    """Finest level that is kept; None keeps all."""


class Coding:
    """Codecs of one worker. Safe for several threads.

    Args:
        settings: What is asked for.
        shelf: Profiles of others.
        meter: Speeds, for hand-overs.
        model: A chunk's metadata of this engine: which shape a profile must have.
        weights: On which it must have been measured.

    Raises:
        SettingsError: The settings cannot be carried out for this model; the message says what to change.
    """

    def __init__(
        self,
        settings: ConnectorSettings,
        *,
        shelf: ProfileShelf,
        meter: SpeedMeter,
        model: ChunkMeta,
        weights: Weights,
        layered: Mapping[str, Callable[[Profile], ChunkFormat]] | None = None,
    ) -> None:
        self._settings = settings
        self._shelf = shelf
        self._meter = meter
        self._layered = LAYERED if layered is None else layered
        self._formats: OrderedDict[tuple[str, str], ChunkFormat] = OrderedDict()
        self._lock = threading.Lock()
        self._is_layered = settings.codec in self._layered
        if not self._is_layered:
            check_codec(settings.codec)
        self._own = own_profile(settings, model, weights) if self._is_layered else None
        self._awaited = settings.profile if self._is_layered and self._own is None else None
        """Id of a profile that chunks are to be stored with, once the store has it."""
        self._model, self._weights = model, weights
        if self._own is not None:
            shelf.add(self._own)
            # Now, and not when the first chunk is saved: code is compiled.
            self._format(settings.codec, self._own)

    def form_of(self, meta: ChunkMeta, *, handoff: Handoff = "none") -> Form:
        """How a chunk of this engine is to be stored.

        Args:
            meta: What is known about the chunk; its codec is still to be chosen.
            handoff: Who waits for it.
        """
        settings = self._settings
        if settings.codec == "raw":
            return Form(meta=meta)
        profile = self._writing_profile() if self._is_layered else None
        if self._is_layered and profile is None:
            # Not in the store yet: until somebody brings it, chunks are stored as they are.
            return Form(meta=meta)
        coded = Form(
            meta=msgspec.structs.replace(meta, codec=settings.codec, profile=profile.id if profile else ""),
            profile=profile,
            level=None if settings.level == "auto" else settings.level,
        )
        if handoff == "none" or settings.handoff == "codec":
            return coded
        return self._handed_over(meta, coded, path=handoff)

    def encoded_bytes(self, form: Form) -> int:
        """Bytes to reserve."""
        if form.profile is not None:
            return self._format(form.meta.codec, form.profile).encoded_bytes(form.meta)
        return codec_by_name(form.meta.codec).encoded_bytes(form.meta)

    def encode(self, form: Form, kv_L2TNH: torch.Tensor, *, out: memoryview) -> int:
        """Write a chunk's bytes; how many.

        Raises:
            DataError: The codec cannot hold this KV.
        """
        if form.meta.codec == "raw":
            return codec_by_name("raw").encode(kv_L2TNH, out=out)
        began_s = time.monotonic()
        if form.profile is not None:
            coder = self._format(form.meta.codec, form.profile)
            num_bytes = coder.encode(kv_L2TNH, meta=form.meta, level=form.level, out=out)
        else:
            num_bytes = codec_by_name(form.meta.codec).encode(kv_L2TNH, out=out, meta=form.meta)
        kv_bytes = kv_L2TNH.numel() * kv_L2TNH.element_size()
        self._meter.note_encode(kv_bytes, seconds=time.monotonic() - began_s)
        return num_bytes

    def publish(self, form: Form) -> None:
        """Make sure that others can read chunks of this form."""
        if form.profile is not None:
            self._shelf.publish(form.profile, deadline_s=_PROFILE_S)

    def format_of(self, meta: ChunkMeta, *, deadline_s: float) -> ChunkFormat | None:
        """How to read a chunk while it arrives; None: only when it is whole.

        Raises:
            ProfileMissingError: Its profile is neither here nor in the store.
            DataError: This version does not know its codec.
        """
        if meta.codec not in self._layered:
            codec_by_name(meta.codec)
            return None
        profile = self._shelf.find(meta.profile, deadline_s=deadline_s)
        if profile is None:
            raise ProfileMissingError(f"profile {meta.profile[:12]!r} of a {meta.codec} chunk is not in the store")
        if reason := _misfit(profile, meta):
            raise CodecMismatchError(reason)
        return self._format(meta.codec, profile)

    def raw_kv(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """KV of a chunk that is not coded: a view of the payload, valid while that is.

        Raises:
            DataError: The payload is not what `meta` says.
        """
        return codec_by_name("raw").decode(payload, meta=meta)

    def decode_layers(self, payload: memoryview, *, meta: ChunkMeta, layers: range, out: torch.Tensor) -> None:
        """Some layers of a whole chunk; see `Codec.decode_layers`. Safe for several threads."""
        codec_by_name(meta.codec).decode_layers(payload, meta=meta, layers=layers, out=out)

    def _format(self, name: str, profile: Profile) -> ChunkFormat:
        key = (name, profile.id)
        with self._lock:
            found = self._formats.pop(key, None) or self._layered[name](profile)
            self._formats[key] = found
            # A format keeps its profile alive: as many as the shelf keeps, and the worker's own.
            while len(self._formats) > MAX_KEPT + 1:
                self._formats.popitem(last=False)
            return found

    def _writing_profile(self) -> Profile | None:
        if self._awaited is None:
            return self._own
        found = self._shelf.find(self._awaited, deadline_s=_PROFILE_S)
        with self._lock:
            if found is None or self._awaited is None:
                return self._own
            # One look is enough: what an id names does not change.
            self._awaited = None
            if reason := _misfit(found, self._model):
                logger.error("event=profile_misfit reason=%r", reason)
            else:
                _warn_of_others(found, self._weights)
                self._own = found
            return self._own

    def _handed_over(self, meta: ChunkMeta, coded: Form, *, path: Path) -> Form:
        """Raw, or a level that suits the link."""
        raw_bytes = codec_by_name("raw").encoded_bytes(meta)
        if coded.profile is None:
            sizes: tuple[int, ...] = (int(raw_bytes * _PLAIN_RATIO),)
        else:
            top = (
                coded.profile.num_levels - 1 if coded.level is None else min(coded.level, coded.profile.num_levels - 1)
            )
            sizes = tuple(int(raw_bytes * ratio) for ratio in _level_ratios(meta.dtype)[: top + 1])
        level = choose_form(raw_bytes, sizes, speeds=self._meter.speeds, path=path)
        if level is None:
            return Form(meta=meta)
        return replace(coded, level=level) if coded.profile is not None else coded


def check_coding(settings: ConnectorSettings, scope: KvScope, *, weights: Weights) -> None:
    """Refuse settings that cannot be carried out for a model, before anything is served.

    Args:
        settings: What is asked for.
        scope: The engine's.
        weights: The engine's.

    Raises:
        SettingsError: The message says what to change.
    """
    if settings.codec not in LAYERED:
        check_codec(settings.codec)
        return
    model = ChunkMeta(
        num_tokens=1,
        num_layers=scope.num_layers,
        num_kv_heads=scope.num_kv_heads,
        head_dim=scope.head_dim,
        dtype=scope.kv_dtype,
        base_position=0,
    )
    own_profile(settings, model, weights)


def check_codec(name: str) -> None:
    """Refuse a codec that this version cannot store with.

    Raises:
        SettingsError: The message names those that it can.
    """
    try:
        codec_by_name(name)
    except DataError as error:
        known = ", ".join(sorted({*codec_names(), *LAYERED}))
        raise SettingsError(f"engine.connector.codec: {name!r} cannot be used, choose one of {known}") from error


def own_profile(settings: ConnectorSettings, model: ChunkMeta, weights: Weights) -> Profile | None:
    """The profile that chunks are stored with; None if it is still to be had from the store.

    Raises:
        SettingsError: There is none, or it does not fit the model; the message says what to do.
    """
    profile = _shipped_profile(settings, model, weights) if settings.profile is None else load_profile(settings.profile)
    if profile is None:
        return None
    if settings.profile is not None:
        if reason := _misfit(profile, model):
            raise SettingsError(f"engine.connector.profile: {reason}")
        _warn_of_others(profile, weights)
    if settings.level != "auto" and settings.level >= profile.num_levels:
        raise SettingsError(
            f"engine.connector.level is {settings.level}, profile {profile.id[:12]} has levels 0 to "
            f"{profile.num_levels - 1}"
        )
    return profile


def _shipped_profile(settings: ConnectorSettings, model: ChunkMeta, weights: Weights) -> Profile:
    """The shipped profile that was measured on these weights."""
    fitting = [shipped for shipped in shipped_profiles() if _misfit(shipped, model) is None]
    for profile in fitting:
        if is_made_for(profile, weights):
            logger.info("event=profile_chosen profile=%s made_for=%r", profile.id[:12], profile.model)
            return profile
    if fitting:
        raise SettingsError(
            f"engine.connector.codec is {settings.codec!r}, and the shipped profile of this shape was made for other "
            f"weights ({fitting[0].model!r}) than those of {weights.name!r}: make one with `learnonce calibrate`, or "
            f"set engine.connector.profile to {fitting[0].id!r} to use it all the same"
        )
    raise SettingsError(
        f"engine.connector.codec is {settings.codec!r}, and no profile ships for a model of "
        f"{model.num_layers} layers with {model.num_kv_heads} KV heads x {model.head_dim}: make one with "
        "`learnonce calibrate` and name it in engine.connector.profile"
    )


def _warn_of_others(profile: Profile, weights: Weights) -> None:
    if not is_made_for(profile, weights):
        logger.warning(
            "event=profile_of_other_weights profile=%s made_for=%r model=%r: quality was not measured for this pair",
            *(profile.id[:12], profile.model, weights.name),
        )


def _misfit(profile: Profile, model: ChunkMeta) -> str | None:
    return misfit(profile, num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)


def _level_ratios(dtype: str) -> tuple[float, ...]:
    """Encoded over raw bytes by level, before anything is encoded: bits per value over those of the dtype."""
    bits = 32 if dtype == "float32" else 16
    return tuple(level_bits / bits for level_bits in _LEVEL_BITS)


def _transform(profile: Profile) -> ChunkFormat:
    # Compiled code, which an engine that never meets such a chunk need not wait for.
    from kvstore.codecs.transform import TransformCodec

    return TransformCodec(profile)


LAYERED: Final[Mapping[str, Callable[[Profile], ChunkFormat]]] = {TRANSFORM: _transform}
"""Codecs whose chunks are read layer by layer and level by level, and need a profile."""
