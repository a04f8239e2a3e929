"""What proves a store: an in-process client, fault wrappers, and contract suites to inherit.

Covers: `MemoryStoreClient` (the reference the others are compared with), `FaultyStoreClient`, `StoreProcess`, and, in
the modules `kvstore.testing.store_client` and `kvstore.testing.tier`, suites that need pytest.
Does not cover: the store itself (`kvstore.node`).
"""

from kvstore.testing.faults import Fault, FaultyStoreClient
from kvstore.testing.memory import MemoryStore, MemoryStoreClient
from kvstore.testing.process import StoreProcess

__all__ = ["Fault", "FaultyStoreClient", "MemoryStore", "MemoryStoreClient", "StoreProcess"]
