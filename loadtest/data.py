"""The folder of texts that benchmarks read from beside the project (`--data`).

Covers: its files' names, rows, tables of the look-up task. Does not cover: cutting texts into what a benchmark needs.
"""

import gzip
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.errors import UnavailableError

NOVEL: Final = "b_long_moby_dick.jsonl.gz"
PASSAGES: Final = "a_qa_nq_oracle_2655.jsonl.gz"
ARTICLES: Final = "a_qa_xquad_en_1190.jsonl.gz"
LOOKUPS: Final = "b_kv_retrieval_75_100.jsonl.gz"
POOL: Final = "a_qa_nq_zipf_passages.jsonl.gz"
REQUESTS: Final = "a_qa_nq_zipf_requests.jsonl.gz"


class DataMissingError(UnavailableError):
    """A text that a part needs is not on this machine; name its folder with `--data`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Pairs of random identifiers: any key may be asked for."""

    pairs: tuple[tuple[str, str], ...]


def read_lookups(data: Path | None, *, count: int, num_pairs: int) -> list[Lookup]:
    """The first `num_pairs` pairs of `count` rows of the look-up task.

    Raises:
        DataMissingError: There is no data folder, or the file is missing in it.
    """
    rows = itertools.islice(data_rows(data_folder(data) / LOOKUPS), count)
    return [
        Lookup(pairs=tuple((str(key), str(value)) for key, value in row["ordered_kv_records"][:num_pairs]))
        for row in rows
    ]


def data_folder(data: Path | None) -> Path:
    """The folder of texts.

    Raises:
        DataMissingError: Nobody named one.
    """
    if data is None:
        raise DataMissingError("no folder of texts: name it with --data or LEARNONCE_DATA")
    return data


def data_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one file of the folder of texts.

    Raises:
        DataMissingError: It is not there.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except OSError as error:
        raise DataMissingError(f"{path.name} cannot be read in {path.parent}: {error}") from error
