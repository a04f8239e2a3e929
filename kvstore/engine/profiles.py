"""Profiles of a worker: its own, those that ship with the project, and those that it finds in the store.

Covers: loading a profile by file, shipped name or id; the shipped one that was measured on an engine's weights;
publishing one so that other workers can read what it coded; fetching one that a chunk names, bounded and verified.
Imports no vLLM.
Does not cover: what is in a profile (`kvstore.codecs.profile`), how one is made (`kvstore.codecs.calibrate`).

In the store a profile is a record like a chunk, under a key derived from its id. The id is the SHA-256 of its bytes, so
nobody can hand out another one under it.
"""

import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from cluster.errors import DataError, SettingsError
from kvstore.codecs.profile import Profile
from kvstore.interfaces import ChunkMeta, StoreClient
from kvstore.keys import ChunkKey

logger = logging.getLogger(__name__)

SHIPPED: Final = Path(__file__).parent.parent / "codecs" / "profiles"
SUFFIX: Final = ".lkp"
CODEC: Final = "profile"
"""`ChunkMeta.codec` of a stored profile: no codec of that name decodes KV, so it is never taken for a chunk."""
MAX_STORED_BYTES: Final = 512 << 20
"""Largest profile that is fetched; one for a model of 70 billion parameters has about 170 MB."""
MAX_KEPT: Final = 8
"""Profiles that are kept in memory besides the worker's own."""
RETRY_S: Final = 10.0
"""How long a profile that could not be fetched counts as missing."""
CHECK_S: Final = 60.0
"""How often a worker that codes looks whether the store still holds its profile."""
_PIN_S: Final = 10 * CHECK_S
_ID: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Weights(NamedTuple):
    """Whose weights an engine runs, as far as it can say."""

    name: str
    """Last part of the model's name or folder."""
    digest: str | None
    """As in profiles (`kvstore.model_digest`). None where it cannot be compared: a hub id names no bytes, and overrides
    change what they mean."""


def profile_key(profile_id: str) -> ChunkKey:
    """The key of a profile's record.

    Raises:
        DataError: Not 64 hex digits.
    """
    if not _ID.fullmatch(profile_id):
        raise DataError(f"a profile's id has 64 hex digits, got {profile_id[:80]!r}")
    return ChunkKey(hashlib.blake2b(b"learnonce profile 1" + bytes.fromhex(profile_id), digest_size=32).digest())


def load_profile(name: str) -> Profile | None:
    """A profile by file or shipped name; None for an id that does not ship, which only the store can know.

    Raises:
        SettingsError: No such file, or it is no profile of this version.
    """
    for path in (Path(name), SHIPPED / name, SHIPPED / f"{name}{SUFFIX}"):
        if path.is_file():
            return _read(path)
    for shipped in shipped_profiles():
        if shipped.id == name:
            return shipped
    if _ID.fullmatch(name):
        return None
    known = ", ".join(sorted(path.stem for path in SHIPPED.glob(f"*{SUFFIX}"))) or "none"
    raise SettingsError(
        f"engine.connector.profile: {name!r} is no file, no id of 64 hex digits, and no shipped profile "
        f"(shipped: {known}); make one with `learnonce calibrate`"
    )


def shipped_profiles() -> Iterator[Profile]:
    """Every profile that ships with the project."""
    for path in sorted(SHIPPED.glob(f"*{SUFFIX}")):
        yield _read(path)


def misfit(profile: Profile, *, num_layers: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Why a profile cannot code KV of this shape; None if it can."""
    wanted, got = (num_layers, num_kv_heads, head_dim), (profile.num_layers, profile.num_kv_heads, profile.head_dim)
    if wanted == got:
        return None
    return (
        f"profile {profile.id[:12]} of {profile.model!r} is for {got[0]} layers of {got[1]} KV heads x {got[2]}, "
        f"this model has {wanted[0]} of {wanted[1]} x {wanted[2]}: calibrate one for it with `learnonce calibrate`"
    )


def is_made_for(profile: Profile, weights: Weights) -> bool:
    """Whether a profile was measured on these weights; where the engine cannot say, on a model of that name."""
    if not profile.model_digest:
        return False
    return profile.model == weights.name if weights.digest is None else profile.model_digest == weights.digest


class ProfileShelf:
    """The profiles that one worker knows. Safe for several threads.

    Guarantees:
        `find` returns a profile whose bytes hash to the id asked for, or None; it never raises for what a store says.
        It reads at most one profile at a time, of at most `MAX_STORED_BYTES`, and asks the store for one that it could
        not get once per `RETRY_S` only.

    Args:
        store: Gives the store client; asked on loader and saver threads only.
        now_s: Monotonic seconds.
    """

    def __init__(self, *, store: Callable[[], StoreClient], now_s: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._now_s = now_s
        self._lock = threading.Lock()
        self._fetching = threading.Lock()
        self._own: dict[str, Profile] = {}
        self._fetched: OrderedDict[str, Profile] = OrderedDict()
        self._missing_since_s: OrderedDict[str, float] = OrderedDict()
        self._checked_s: dict[str, float] = {}

    def add(self, profile: Profile) -> None:
        """Know a profile for as long as the shelf lives."""
        with self._lock:
            self._own[profile.id] = profile

    def find(self, profile_id: str, *, deadline_s: float) -> Profile | None:
        """The profile of that id: known, shipped, or in the store."""
        found = self._known(profile_id)
        if found is not None or self._is_missing(profile_id):
            return found
        stop_s = self._now_s() + deadline_s
        if not self._fetching.acquire(timeout=max(0.0, deadline_s)):
            return None
        try:
            found = self._known(profile_id)
            if found is None and not self._is_missing(profile_id):
                found = self._ship(profile_id) or self._fetch(profile_id, stop_s)
            return found
        finally:
            self._fetching.release()

    def publish(self, profile: Profile, *, deadline_s: float) -> bool:
        """Make sure that other workers can fetch a profile; whether the store held it when last asked.

        Cheap: the store is asked once per `CHECK_S`.
        """
        now_s = self._now_s()
        with self._lock:
            if now_s - self._checked_s.get(profile.id, float("-inf")) < CHECK_S:
                return True
        client, key = self._store(), profile_key(profile.id)
        is_held = client.lookup([key], deadline_s=deadline_s) == [True] or self._write(client, key, profile, deadline_s)
        if is_held:
            client.pin([key], seconds=_PIN_S, deadline_s=deadline_s)
            with self._lock:
                self._checked_s[profile.id] = now_s
        return is_held

    @staticmethod
    def _write(client: StoreClient, key: ChunkKey, profile: Profile, deadline_s: float) -> bool:
        data = profile.to_bytes()
        meta = ChunkMeta(
            num_tokens=1,
            num_layers=profile.num_layers,
            num_kv_heads=profile.num_kv_heads,
            head_dim=profile.head_dim,
            dtype="float32",
            base_position=0,
            codec=CODEC,
        )
        lease = client.reserve(key, meta, len(data), deadline_s=deadline_s)
        if lease is None:
            # Somebody else writes it, or there is no room: the next save asks again.
            return False
        try:
            lease.payload[:] = data
            return lease.commit()
        except BaseException:
            lease.abort()
            raise

    def _known(self, profile_id: str) -> Profile | None:
        with self._lock:
            found = self._own.get(profile_id)
            if found is None and profile_id in self._fetched:
                self._fetched.move_to_end(profile_id)
                found = self._fetched[profile_id]
            return found

    def _is_missing(self, profile_id: str) -> bool:
        with self._lock:
            return self._now_s() - self._missing_since_s.get(profile_id, float("-inf")) < RETRY_S

    def _ship(self, profile_id: str) -> Profile | None:
        for profile in shipped_profiles():
            if profile.id == profile_id:
                self.add(profile)
                return profile
        return None

    def _fetch(self, profile_id: str, stop_s: float) -> Profile | None:
        try:
            profile = self._read_stored(profile_id, stop_s)
        except DataError as error:
            logger.warning("event=profile_refused id=%.64s reason=%r", profile_id, str(error))
            profile = None
        with self._lock:
            if profile is None:
                self._missing_since_s[profile_id] = self._now_s()
                self._missing_since_s.move_to_end(profile_id)
                while len(self._missing_since_s) > 64:
                    self._missing_since_s.popitem(last=False)
            else:
                self._fetched[profile_id] = profile
                while len(self._fetched) > MAX_KEPT:
                    self._fetched.popitem(last=False)
        return profile

    def _read_stored(self, profile_id: str, stop_s: float) -> Profile | None:
        key = profile_key(profile_id)
        (lease,) = self._store().read([key], deadline_s=max(0.0, stop_s - self._now_s()))
        if lease is None:
            return None
        with lease:
            if len(lease.payload) > MAX_STORED_BYTES:
                raise DataError(f"profile of {len(lease.payload)} bytes, at most {MAX_STORED_BYTES} are read")
            data = bytes(lease.payload)
        if hashlib.sha256(data).hexdigest() != profile_id:
            raise DataError("the record's bytes are not the profile of this id")
        return Profile.from_bytes(data)


def _read(path: Path) -> Profile:
    try:
        return Profile.from_bytes(path.read_bytes())
    except (OSError, DataError) as error:
        raise SettingsError(f"profile {path}: {error}") from error
