"""The object tier keeps the tier contract: over obstore and over pyarrow, on folders, on our S3 and on moto's.

With `LEARNONCE_TEST_S3_ENDPOINT` (for example `http://127.0.0.1:9000`) the suite also runs against that S3 server: in
the bucket `LEARNONCE_TEST_S3_BUCKET` (`learnonce-test`), which must exist, with the credentials of `AWS_ACCESS_KEY_ID`
and `AWS_SECRET_ACCESS_KEY`, the region of `AWS_REGION` (`us-east-1`).
"""

import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url
from support.moto_server import REGION, make_bucket, moto_server

from kvstore.container import encode_record, stored_bytes
from kvstore.interfaces import Tier
from kvstore.keys import ChunkKey
from kvstore.settings import ObjectSettings
from kvstore.testing.s3 import S3Process
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.testing.tier import DurableTierContract
from kvstore.tiers.object import ObjectTier, open_object_tier
from kvstore.tiers.object_names import object_name

ENDPOINT_VARIABLE = "LEARNONCE_TEST_S3_ENDPOINT"
NEVER_S = 3600.0


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    with moto_server() as endpoint:
        make_bucket(endpoint, "chunks")
        yield endpoint


@pytest.fixture(scope="session")
def our_s3() -> Iterator[S3Process]:
    with S3Process(page_size=2) as server:
        yield server


class _ObjectTierContract(DurableTierContract):
    """Subclasses say where."""

    url: str
    options: dict[str, str]

    def make(self, *, capacity_bytes: int) -> Tier:
        settings = ObjectSettings(
            url=self.url,
            options=self.options,
            capacity_bytes=capacity_bytes,
            policy="lru",
            refresh_s=NEVER_S,
            deadline_s=20.0,
            timeout_s=10.0,
        )
        tier = open_object_tier(settings)
        assert tier.refresh()
        return tier

    def reopen(self, tier: Tier) -> Tier:
        capacity_bytes = tier.stat().capacity_bytes
        assert capacity_bytes is not None
        tier.close()
        return self.make(capacity_bytes=capacity_bytes)

    def raw_write(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        entry = tier.entry(key)
        assert entry is not None
        self.raw_put(object_name(key, entry), data)

    def raw_put(self, name: str, data: bytes) -> None:
        put_raw(self.url, self.options, name, data)

    def leftovers(self, tier: Tier) -> list[str]:
        assert isinstance(tier, ObjectTier)
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-object")]


class _FolderContract(_ObjectTierContract):
    scheme: str

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "bucket"
        self.url = f"{self.scheme}://{self.folder}"
        self.options = {}

    def raw_put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def leftovers(self, tier: Tier) -> list[str]:
        others = [str(path) for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".rec"]
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]
        return super().leftovers(tier) + others + [link for link in links if link.startswith(str(self.folder))]


class TestObstoreFolder(_FolderContract):
    scheme = "file"


class TestArrowFolder(_FolderContract):
    scheme = "arrow+file"


class TestObstoreOurS3(_ObjectTierContract):
    @pytest.fixture(autouse=True)
    def _place(self, our_s3: S3Process) -> None:
        self.url = f"{our_s3.url}/{uuid.uuid4().hex}"
        self.options = our_s3.options


class TestObstoreMoto(_ObjectTierContract):
    @pytest.fixture(autouse=True)
    def _place(self, moto: str) -> None:
        self.url = f"s3://chunks/{uuid.uuid4().hex}"
        self.options = _moto_options(moto)


class TestArrowMoto(_ObjectTierContract):
    @pytest.fixture(autouse=True)
    def _place(self, moto: str) -> None:
        self.place = f"chunks/{uuid.uuid4().hex}"
        self.url = f"arrow+s3://{self.place}"
        self.endpoint = moto
        self.options = {
            "endpoint_override": moto,
            "region": REGION,
            "access_key": "test",
            "secret_key": "test",
        }

    def raw_put(self, name: str, data: bytes) -> None:
        put_raw(f"s3://{self.place}", _moto_options(self.endpoint), name, data)


@pytest.mark.skipif(ENDPOINT_VARIABLE not in os.environ, reason=f"{ENDPOINT_VARIABLE} names no S3 server")
class TestObstoreNamedS3(_ObjectTierContract):
    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        endpoint = os.environ[ENDPOINT_VARIABLE]
        bucket = os.environ.get("LEARNONCE_TEST_S3_BUCKET", "learnonce-test")
        self.url = f"s3://{bucket}/{uuid.uuid4().hex}"
        self.options = {
            "endpoint": endpoint,
            "region": os.environ.get("AWS_REGION", REGION),
            "allow_http": str(endpoint.startswith("http:")).lower(),
        }


def put_raw(url: str, options: dict[str, str], name: str, data: bytes) -> None:
    """Write an object with the bare client."""
    config = {name: value for name, value in options.items() if name != "allow_http"}
    store = from_url(url, config=config, client_options={"allow_http": "allow_http" in options})
    obstore.put(store, name, data, use_multipart=False)


def _moto_options(endpoint: str) -> dict[str, str]:
    return {
        "endpoint": endpoint,
        "region": REGION,
        "allow_http": "true",
        "access_key_id": "test",
        "secret_access_key": "test",
    }


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("policy", ["cost", "lru", "s3fifo", "arc"])
def test_restarted_node_evicts_the_oldest_objects_first(tmp_path: Path, policy: str) -> None:
    """Whatever their names: a listing comes in the order of names, and the books must not take that for their age."""

    def put(tier: ObjectTier, index: int) -> None:
        record = encode_record(sample_key(index), sample_meta(), sample_payload(index, 5000))
        assert tier.put(sample_key(index), memoryview(record))

    room_bytes = 6 * stored_bytes(5000)
    values = {"url": f"file://{tmp_path}/bucket", "capacity_bytes": room_bytes, "policy": policy, "refresh_s": NEVER_S}
    settings = ObjectSettings.model_validate(values)
    first = open_object_tier(settings)
    assert first.refresh()
    for index in range(6):
        put(first, index)
    first.close()
    by_name = sorted(range(6), key=lambda index: sample_key(index).hex())
    by_age = by_name[::-1]
    for age, index in enumerate(by_age):
        (path,) = (tmp_path / "bucket").rglob(f"{sample_key(index).hex()}*.rec")
        os.utime(path, (1000 + age, 1000 + age))
    second = open_object_tier(settings)
    assert second.refresh()
    for number, index in enumerate(by_age[:3]):
        put(second, 100 + number)
        assert not second.contains(sample_key(index))
    assert all(second.contains(sample_key(index)) for index in by_age[3:])
    second.close()
