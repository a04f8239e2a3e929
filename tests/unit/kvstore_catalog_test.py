"""The catalogue's table: one row per chunk and node, most reused first, and the same from its Parquet file."""

from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest

from kvstore.catalog import SCHEMA, catalog_table, write_parquet
from kvstore.interfaces import CatalogEntry
from kvstore.testing.samples import sample_key


def entry(index, *, uses=0, tiers=None, learned=0.0):
    return CatalogEntry(
        key=sample_key(index),
        stored_bytes_by_tier=tiers or {"host": 8192},
        num_tokens=10 * index,
        base_position=5,
        codec="raw",
        tenant="",
        learned_unix_s=learned,
        uses=uses,
        idle_s=None,
        is_pinned=False,
    )


def test_no_chunks_make_an_empty_table_with_all_columns():
    table = catalog_table({"a": [], "b": []})
    assert (table.num_rows, table.schema) == (0, SCHEMA)


def test_rows_are_most_reused_first_then_the_longest():
    table = catalog_table({"a": [entry(1), entry(2, uses=3)], "b": [entry(2, uses=7), entry(3)]})
    rows = [(row["node"], row["num_tokens"], row["uses"]) for row in table.to_pylist()]
    assert rows == [("b", 20, 7), ("a", 20, 3), ("b", 30, 0), ("a", 10, 0)]


def test_tiers_are_named_fastest_first_with_their_bytes():
    (row,) = catalog_table({"a": [entry(1, tiers={"object": 3, "nvme": 2, "host": 1})]}).to_pylist()
    assert row["tiers"] == ["host", "nvme", "object"]
    assert (row["host_bytes"], row["nvme_bytes"], row["object_bytes"]) == (1, 2, 3)


def test_time_of_learning_is_null_where_nobody_said():
    rows = catalog_table({"a": [entry(2), entry(1, learned=1_700_000_000.5)]}).to_pylist()
    assert [row["learned"] for row in rows] == [None, datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=UTC)]


def test_parquet_file_holds_the_same_table(tmp_path):
    table = catalog_table({"a": [entry(1, learned=12.0), entry(2, tiers={"nvme": 4096})]})
    write_parquet(table, tmp_path / "chunks.parquet")
    assert pq.read_table(tmp_path / "chunks.parquet").equals(table)


def test_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="no/such"):
        write_parquet(catalog_table({}), tmp_path / "no" / "such" / "file")
