"""The router's ids are vLLM's own, for the embedded model: same template, same normalisation of messages.

Covers: `router.segments` without documents against vLLM's renderer (no engine is started).
Does not cover: documents (vLLM knows none).
"""

import os
from pathlib import Path
from typing import Any

import pytest

from router.body import Endpoint, parse_request
from router.segments import Segmenter
from router.settings import TemplateSettings
from router.tokenizer import ModelTokenizer

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

FOLDER = Path(os.environ.get("LEARNONCE_MODEL_HOME", ".models")) / "SmolLM2-135M-Instruct"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TURNS: list[tuple[str, dict[str, Any]]] = [
    ("one turn", {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}),
    ("system", {"messages": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " Hé? 🦊\n"}]}),
    (
        "parts",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    ),
    (
        "history",
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "<|im_end|> hello"},
                {"role": "user", "content": "and?", "name": "bob"},
            ]
        },
    ),
    (
        "developer",
        {"messages": [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"}]},
    ),
    (
        "developer in the middle",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hi"},
                {"role": "developer", "content": "Be kind."},
            ]
        },
    ),
    (
        "tools",
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "1"},
            ],
            "tools": [TOOL],
            "tool_choice": "none",
        },
    ),
    ("no generation prompt", {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}),
    ("special tokens", {"messages": [{"role": "user", "content": "hi"}], "add_special_tokens": True}),
    ("kwargs", {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"unknown": 1}}),
    ("reasoning", {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "low"}),
]


@pytest.fixture(scope="module")
def renderer() -> Any:
    """vLLM's own chat rendering for the model, as its OpenAI server uses it."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.registry import renderer_from_config

    config = ModelConfig(model=str(FOLDER), max_model_len=2048, dtype="float32")
    return OnlineRenderer(
        config,
        renderer_from_config(VllmConfig(model_config=config)),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(ModelTokenizer(str(FOLDER), cache_tokens=1 << 16), template=TemplateSettings())


@pytest.mark.parametrize("body", [row[1] for row in TURNS], ids=[row[0] for row in TURNS])
async def test_chat_ids_are_vllms(renderer: Any, segmenter: Segmenter, body: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    # Our parse first: vLLM's rendering changes tool calls in place.
    request = parse_request(body, endpoint=Endpoint.CHAT, served_model="m", max_documents=9)
    ours = segmenter.segment(request, max_model_len=2048)
    _, inputs = await renderer.render_chat(ChatCompletionRequest.model_validate(body))
    assert ours.opaque is None
    assert ours.ids.tolist() == list(inputs[0]["prompt_token_ids"])


@pytest.mark.parametrize("body", [{"prompt": "Once upon"}, {"prompt": " x", "add_special_tokens": False}])
async def test_completion_ids_are_vllms(renderer: Any, segmenter: Segmenter, body: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    request = parse_request(body, endpoint=Endpoint.COMPLETION, served_model="m", max_documents=9)
    ours = segmenter.segment(request, max_model_len=2048)
    vllm_request = CompletionRequest.model_validate(body)
    inputs = await renderer.preprocess_completion(vllm_request, vllm_request.prompt, None)
    assert ours.ids.tolist() == list(inputs[0]["prompt_token_ids"])
