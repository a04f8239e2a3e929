"""Which models and requests reuse nothing, and why: each refusal as one change to an engine that is supported."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.engine.support import (
    kv_dtype_name,
    refusal_of_joins,
    refusal_of_layout,
    refusal_of_model,
    refusal_of_request,
)

LAYERS = 4
FullAttentionSpec = type("FullAttentionSpec", (), {})
SlidingWindowSpec = type("SlidingWindowSpec", (), {})
MLAAttentionSpec = type("MLAAttentionSpec", (FullAttentionSpec,), {})


def config(**changes: Any) -> SimpleNamespace:
    """What vLLM says about a plain model on one rank, with changes like `model__use_mla=True`."""
    parts: dict[str, dict[str, Any]] = {
        "model": {
            "runner_type": "generate",
            "is_encoder_decoder": False,
            "use_mla": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "dtype": "torch.bfloat16",
            "get_num_layers": lambda parallel: LAYERS,
        },
        "parallel": {"world_size": 1, "decode_context_parallel_size": 1},
        "cache": {"cache_dtype": "auto"},
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        assert field in parts[part], name
        parts[part][field] = value
    return SimpleNamespace(**{f"{part}_config": SimpleNamespace(**fields) for part, fields in parts.items()})


def groups(*layers: int, spec: type = FullAttentionSpec) -> SimpleNamespace:
    """KV groups with so many layers each."""
    made = [SimpleNamespace(kv_cache_spec=spec(), layer_names=[f"l{i}" for i in range(n)]) for n in layers]
    return SimpleNamespace(kv_cache_groups=made)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16", "torch.float32"])
def test_plain_models_are_supported(dtype: str) -> None:
    assert refusal_of_layout(config(model__dtype=dtype), groups(LAYERS)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model__runner_type": "pooling"}, "'pooling', not text generation"),
        ({"model__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model__use_mla": True}, "latent"),
        ({"model__is_hybrid": True}, "state-space"),
        ({"model__is_attention_free": True}, "state-space"),
        ({"parallel__world_size": 2}, "split over 2 ranks"),
        ({"parallel__decode_context_parallel_size": 2}, "context parallelism"),
        ({"cache__cache_dtype": "fp8"}, "'fp8' is quantised"),
        ({"cache__cache_dtype": "fp8_e4m3"}, "quantised"),
    ],
)
def test_other_models_are_refused_with_a_reason(change: dict[str, Any], reason: str) -> None:
    said = refusal_of_model(config(**change))
    assert said is not None
    assert reason in said
    assert refusal_of_layout(config(**change), groups(LAYERS)) == said


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (groups(), "0 KV cache groups"),
        (groups(2, 2), "2 KV cache groups"),
        (groups(LAYERS, spec=SlidingWindowSpec), "SlidingWindowSpec"),
        (groups(LAYERS, spec=MLAAttentionSpec), "MLAAttentionSpec"),
        (groups(LAYERS - 1), "3 layers hold KV, the model has 4"),
        (groups(LAYERS + 1), "5 layers hold KV, the model has 4"),
    ],
)
def test_other_layouts_are_refused_with_a_reason(layout: SimpleNamespace, reason: str) -> None:
    assert refusal_of_model(config()) is None
    said = refusal_of_layout(config(), layout)
    assert said is not None
    assert reason in said


@pytest.mark.parametrize(
    ("cache_dtype", "expected"), [("auto", "bfloat16"), ("float32", "float32"), ("fp8_e5m2", "fp8_e5m2")]
)
def test_dtype_of_kv(cache_dtype: str, expected: str) -> None:
    assert kv_dtype_name(config(cache__cache_dtype=cache_dtype)) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"lora_request": object()}, "lora"),
        ({"prompt_embeds": object()}, "prompt_embeds"),
        ({"mm_features": [object()]}, "multimodal"),
    ],
)
def test_requests_that_depend_on_more_than_tokens(change: dict[str, Any], reason: str | None) -> None:
    plain: dict[str, Any] = {"lora_request": None, "prompt_embeds": None, "mm_features": []}
    assert refusal_of_request(SimpleNamespace(**(plain | change))) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_config": SimpleNamespace(uses_mrope=True)}, "several dimensions"),
        (
            {"parallel_config": SimpleNamespace(data_parallel_size=2, pipeline_parallel_size=1)},
            "data-parallel",
        ),
        ({"parallel_config": SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=2)}, "stages"),
        ({"speculative_config": object()}, "draft model"),
        ({"lora_config": object()}, "LoRA"),
    ],
)
def test_engines_that_do_not_join(change: dict[str, Any], reason: str) -> None:
    plain = {
        "model_config": SimpleNamespace(uses_mrope=False),
        "parallel_config": SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
        "speculative_config": None,
        "lora_config": None,
    }
    assert refusal_of_joins(SimpleNamespace(**plain)) is None
    said = refusal_of_joins(SimpleNamespace(**(plain | change)))
    assert said is not None
    assert reason in said
