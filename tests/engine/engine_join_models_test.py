"""Joins in the families of models that are covered: tiny ones with random weights, float32.

Covers: 100 % recomputed equals a full prefill, a share of query_aware, one engine per family.
Does not cover: quality (random weights have none), failures (`tests/engine/engine_join_test.py`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.joins import ANCHOR_TOKENS, JOINED_TOKENS, NOISE, World, assert_same, run_world

from kvstore.engine.settings import EngineSettings

pytestmark = [pytest.mark.engine, pytest.mark.slow]

VOCABULARY = 512
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Wide, or every token would look alike to every other.
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 32},
    "Gemma3Text": {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32, "num_hidden_layers": 6},
}


def settings(config: Any, folder: Path) -> EngineSettings:
    """An engine for a model of this shape with random weights, which is written to the folder."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return EngineSettings(
        model=str(folder),
        dtype="float32",
        max_model_len=1024,
        kv_cache_bytes=32 << 20,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        vllm_arguments={"skip_tokenizer_init": True},
    )


def check_joins(world: World) -> None:
    case, expected = world.learned()
    naive = world.joined(case, case.load(0.0, method="naive"))
    assert naive.cached_tokens == ANCHOR_TOKENS + JOINED_TOKENS
    assert naive.logprobs != pytest.approx(expected.logprobs, abs=NOISE), "the check is blind"
    assert_same(world.joined(case, case.load(1.0)), expected)
    before = world.engine.metrics()
    for method in ("deviation", "query_aware"):
        world.joined(case, case.load(0.15, method=method))
        assert world.grown(before, f"joins_total.{method}") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_recomputed_is_a_full_prefill(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**TINY | FAMILIES[family])
    with run_world(tmp_path, settings(config, tmp_path / "model"), vocabulary=VOCABULARY) as world:
        check_joins(world)
