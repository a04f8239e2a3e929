"""Parameters from the wire: what workers build is read back, whatever else arrives is refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.engine.params import (
    MAX_SPANS,
    ChunkSpan,
    Handoff,
    JoinParams,
    TransferParamsError,
    build_transfer_params,
    inexact_start,
    parse_transfer_params,
)
from kvstore.keys import ChunkKey, tenant_of
from kvstore.testing.samples import sample_key

KEY = sample_key(1).hex()
GOOD: dict[str, Any] = {"v": 1, "load": [[KEY, 0, 5]], "save": [[KEY, 5, 9]], "load_deadline_s": 1.5}


def test_what_is_built_is_read() -> None:
    load = [ChunkSpan(sample_key(1), 0, 5), ChunkSpan(sample_key(2), 5, 7)]
    save = [ChunkSpan(sample_key(3), 7, 20)]
    built = json.loads(json.dumps(build_transfer_params(load=load, save=save, load_deadline_s=2.0)))
    params = parse_transfer_params(built, num_prompt_tokens=20)
    assert params is not None
    assert (list(params.load), list(params.save), params.load_deadline_s) == (load, save, 2.0)


def test_a_join_that_is_built_is_read() -> None:
    load = [ChunkSpan(sample_key(1), 0, 5), ChunkSpan(sample_key(2), 5, 7, 900), ChunkSpan(sample_key(3), 12, 20, 5)]
    join = JoinParams(method="first_k", share=0.25, tail_start=21)
    built = build_transfer_params(load=load, save=load[:1], load_deadline_s=2.0, join=join)
    params = parse_transfer_params(json.loads(json.dumps(built)), num_prompt_tokens=30)
    assert params is not None
    assert (list(params.load), list(params.save), params.join) == (load, load[:1], join)
    assert inexact_start(params) == 5


JOINED: dict[str, Any] = {
    "v": 1,
    "load": [[KEY, 0, 5], [KEY, 5, 7, 900]],
    "save": [[KEY, 0, 5]],
    "load_deadline_s": 1.5,
    "join": {"method": "query_aware", "share": 0.15, "tail": 7},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"join": None}, "there is no join"),
        ({"join": {"method": "naive", "share": 0}}, "not an object of method, share, tail"),
        ({"join": [1]}, "not an object of method, share, tail"),
        ({"join": {**JOINED["join"], "method": "best"}}, "method is none of naive"),
        ({"join": {**JOINED["join"], "method": ["naive"]}}, "method is none of naive"),
        ({"join": {**JOINED["join"], "share": 1.5}}, "share is not a number from 0 to 1"),
        ({"join": {**JOINED["join"], "share": float("nan")}}, "share is not a number from 0 to 1"),
        ({"join": {**JOINED["join"], "share": True}}, "share is not a number from 0 to 1"),
        ({"join": {**JOINED["join"], "tail": 19}}, "two tokens before the end of 20"),
        ({"join": {**JOINED["join"], "tail": -1}}, "two tokens before the end of 20"),
        ({"join": {**JOINED["join"], "tail": 6}}, "load reaches into the tail"),
        ({"load": [[KEY, 0, 5, -1]]}, "base is no position"),
        ({"load": [[KEY, 0, 5, "0"]]}, "base is no position"),
        ({"load": [[KEY, 0, 5, 0, 0]]}, "key, start, stop, base"),
        ({"save": [[KEY, 0, 6]]}, "KV of a joined request is exact up to 5 only"),
        ({"save": [[KEY, 0, 5, 0]]}, "save holds a span with a base"),
    ],
)
def test_joins_that_are_refused(change: dict[str, Any], message: str) -> None:
    assert parse_transfer_params({"learnonce": JOINED}, num_prompt_tokens=20) is not None
    with pytest.raises(TransferParamsError, match=message):
        parse_transfer_params({"learnonce": {**JOINED, **change}}, num_prompt_tokens=20)


@pytest.mark.parametrize("raw", [None, {}, {"do_remote_prefill": True}, [], "learnonce", 3])
def test_others_parameters_are_not_ours(raw: Any) -> None:
    assert parse_transfer_params(raw, num_prompt_tokens=9) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 2}, "version 2"),
        ({"v": "1"}, "version '1'"),
        ({"extra": 1}, "unknown field"),
        ({"load": {}}, "not a list"),
        ({"load": "abc"}, "not a list"),
        ({"load": [[KEY, 0, 5]] * (MAX_SPANS + 1)}, "not a list"),
        ({"load": [[KEY, 0]]}, "key, start, stop"),
        ({"load": [None]}, "key, start, stop"),
        ({"load": [[KEY, 0, 5.0]]}, "integer"),
        ({"load": [[KEY, False, 5]]}, "integer"),
        ({"load": [[5, 0, 5]]}, "text"),
        ({"load": [["00", 0, 5]]}, "64 hex"),
        ({"load": [["zz" * 32, 0, 5]]}, "64 hex"),
        ({"load": [[KEY, 5, 5]]}, "empty"),
        ({"load": [[KEY, 5, 4]]}, "empty"),
        ({"load": [[KEY, -1, 4]]}, "overlaps"),
        ({"load": [[KEY, 0, 10]]}, "leaves the prompt of 9"),
        ({"load": [[KEY, 0, 5], [KEY, 4, 9]]}, "overlaps"),
        ({"save": [[KEY, 4, 9], [KEY, 0, 4]]}, "overlaps"),
        ({"tenant": "customer 7"}, "tenant"),
        ({"tenant": "0" * 17}, "tenant"),
        ({"tenant": 5}, "tenant"),
        ({"handoff": "everywhere"}, "handoff"),
        ({"handoff": 5}, "handoff"),
        ({"load_deadline_s": -1}, "load_deadline_s"),
        ({"load_deadline_s": float("nan")}, "load_deadline_s"),
        ({"load_deadline_s": True}, "load_deadline_s"),
        ({"load_deadline_s": 10**9}, "load_deadline_s"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    assert parse_transfer_params({"learnonce": GOOD}, num_prompt_tokens=9) is not None
    with pytest.raises(TransferParamsError, match=message):
        parse_transfer_params({"learnonce": GOOD | change}, num_prompt_tokens=9)


def test_a_salt_travels_as_its_tenant_only() -> None:
    raw = build_transfer_params(load_deadline_s=1.0, cache_salt="a secret salt")
    assert "salt" not in str(raw)
    params = parse_transfer_params(raw, num_prompt_tokens=9)
    assert params is not None
    assert (params.tenant, len(params.tenant)) == (tenant_of("a secret salt"), 16)
    without = parse_transfer_params(build_transfer_params(load_deadline_s=1.0), num_prompt_tokens=9)
    assert without is not None
    assert without.tenant == ""


@pytest.mark.parametrize("handoff", ["none", "local", "remote"])
def test_who_waits_for_the_chunks_travels(handoff: Handoff) -> None:
    raw = build_transfer_params(load_deadline_s=1.0, handoff=handoff)
    params = parse_transfer_params(raw, num_prompt_tokens=9)
    assert params is not None
    assert params.handoff == handoff


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(KEY),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=5),
    max_leaves=20,
)


@given(raw=_JSON)
def test_any_json_is_read_or_refused(raw: Any) -> None:
    try:
        params = parse_transfer_params({"learnonce": raw}, num_prompt_tokens=9)
    except TransferParamsError:
        return
    assert params is not None
    for spans in (params.load, params.save):
        assert all(0 <= span.start < span.stop <= 9 and len(span.key) == len(ChunkKey(bytes(32))) for span in spans)
