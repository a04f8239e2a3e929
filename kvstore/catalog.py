"""The catalogue of what stores hold, as an Arrow table.

Covers: the table's schema, rows from stores' answers, writing it to a Parquet file.
Does not cover: asking a store (`kvstore.client`), printing (`cluster.store_cli`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kvstore.interfaces import CatalogEntry

SCHEMA: Final = pa.schema(
    [
        pa.field("node", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False, metadata={"unit": "hex"}),
        pa.field("tiers", pa.list_(pa.string()), nullable=False),
        pa.field("host_bytes", pa.int64(), nullable=False),
        pa.field("nvme_bytes", pa.int64(), nullable=False),
        pa.field("object_bytes", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("base_position", pa.int64(), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        pa.field("tenant", pa.string(), nullable=False),
        pa.field("learned", pa.timestamp("ms", tz="UTC")),
        pa.field("uses", pa.int64(), nullable=False),
        pa.field("idle_s", pa.float64()),
        pa.field("is_pinned", pa.bool_(), nullable=False),
    ]
)
"""One row per chunk and node. Bytes are 0 in tiers that do not hold it; `learned` is null where nobody said when."""

_TIERS: Final = ("host", "nvme", "object")


def catalog_table(entries_by_node: Mapping[str, Sequence[CatalogEntry]]) -> pa.Table:
    """One table over several nodes: most used first, then the largest.

    Args:
        entries_by_node: What each node's store answered.

    Returns:
        A table of `SCHEMA`.
    """
    rows = [(node, entry) for node, entries in entries_by_node.items() for entry in entries]
    columns = {
        "node": [node for node, _ in rows],
        "key": [entry.key.hex() for _, entry in rows],
        "tiers": [sorted(entry.stored_bytes_by_tier, key=_tier_rank) for _, entry in rows],
        **{f"{tier}_bytes": [entry.stored_bytes_by_tier.get(tier, 0) for _, entry in rows] for tier in _TIERS},
        "num_tokens": [entry.num_tokens for _, entry in rows],
        "base_position": [entry.base_position for _, entry in rows],
        "codec": [entry.codec for _, entry in rows],
        "tenant": [entry.tenant for _, entry in rows],
        "learned": [int(1000 * entry.learned_unix_s) or None for _, entry in rows],
        "uses": [entry.uses for _, entry in rows],
        "idle_s": [entry.idle_s for _, entry in rows],
        "is_pinned": [entry.is_pinned for _, entry in rows],
    }
    table = pa.table(columns, schema=SCHEMA)
    order = [("uses", "descending"), ("num_tokens", "descending"), ("key", "ascending"), ("node", "ascending")]
    return table.take(pc.sort_indices(table, sort_keys=order))


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write the table for other tools.

    Raises:
        OSError: The file cannot be written.
    """
    pq.write_table(table, path)


def _tier_rank(name: str) -> tuple[int, str]:
    return (_TIERS.index(name) if name in _TIERS else len(_TIERS), name)
