"""What the official `openai` client may expect. Inherit it and provide the fixtures `client` (AsyncOpenAI) and `model`.

The questions are easy for a small model only in form: what is checked is the protocol, not the answers.
"""

import asyncio
import json

import openai
import pytest

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather of a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def ask(text="Name three colours."):
    return [{"role": "user", "content": text}]


class OpenAISuite:
    """Chat and text completions as OpenAI documents them."""

    async def test_models(self, client, model):
        assert model in [card.id async for card in client.models.list()]

    async def test_chat(self, client, model):
        done = await client.chat.completions.create(model=model, messages=ask(), max_completion_tokens=8, temperature=0)
        assert done.choices[0].message.role == "assistant"
        assert done.choices[0].message.content
        assert done.choices[0].finish_reason in ("length", "stop")
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
        assert done.usage.prompt_tokens_details.cached_tokens is not None

    async def test_a_stream_is_the_same_answer(self, client, model):
        asked = {"model": model, "messages": ask(), "max_completion_tokens": 8, "temperature": 0}
        whole = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens is not None
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason

    async def test_completions_stream_and_whole(self, client, model):
        asked = {"model": model, "prompt": "The sky is", "max_tokens": 6, "temperature": 0}
        whole = await client.completions.create(**asked)
        stream = await client.completions.create(**asked, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == whole.choices[0].text
        assert whole.usage.completion_tokens == 6

    async def test_logprobs(self, client, model):
        done = await client.chat.completions.create(
            model=model, messages=ask(), max_completion_tokens=4, temperature=0, logprobs=True, top_logprobs=3
        )
        tokens = done.choices[0].logprobs.content
        assert len(tokens) == 4
        for token in tokens:
            assert len(token.top_logprobs) >= 3
            assert token.logprob <= 0
            assert token.token == token.top_logprobs[0].token

    async def test_stop(self, client, model):
        text = (
            (await client.completions.create(model=model, prompt="Count: 1, 2, 3,", max_tokens=12, temperature=0))
            .choices[0]
            .text
        )
        word = text.strip().split(",")[0] + ","
        done = await client.completions.create(
            model=model, prompt="Count: 1, 2, 3,", max_tokens=12, temperature=0, stop=[word]
        )
        assert done.choices[0].finish_reason == "stop"
        assert word not in done.choices[0].text

    async def test_a_seed_repeats(self, client, model):
        asked = {"model": model, "prompt": "Once upon", "max_tokens": 12, "temperature": 1.5}
        same = [(await client.completions.create(**asked, seed=7)).choices[0].text for _ in range(2)]
        other = [(await client.completions.create(**asked, seed=seed)).choices[0].text for seed in (8, 9, 10)]
        assert same[0] == same[1]
        assert set(other) != {same[0]}

    async def test_several_choices(self, client, model):
        done = await client.chat.completions.create(
            model=model, messages=ask(), max_completion_tokens=6, n=3, temperature=1.0, seed=1
        )
        assert [choice.index for choice in done.choices] == [0, 1, 2]
        assert all(choice.message.content for choice in done.choices)

    @pytest.mark.parametrize("choice", ["named", "required"])
    async def test_tools(self, client, model, choice):
        named = {"type": "function", "function": {"name": "get_weather"}}
        done = await client.chat.completions.create(
            model=model,
            messages=ask("What is the weather in Paris?"),
            tools=TOOLS,
            tool_choice=named if choice == "named" else "required",
            max_completion_tokens=120,
            temperature=0,
        )
        (call, *_) = done.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert list(json.loads(call.function.arguments)) == ["city"]

    async def test_structured_output(self, client, model):
        wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
        done = await client.chat.completions.create(
            model=model,
            messages=ask("A colour and a count, as JSON."),
            response_format=wanted,
            max_completion_tokens=60,
            temperature=0,
        )
        assert set(json.loads(done.choices[0].message.content)) == {"colour", "count"}

    async def test_errors_are_the_clients_exceptions(self, client, model):
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nobody", messages=ask())
        with pytest.raises(openai.BadRequestError) as raised:
            await client.chat.completions.create(model=model, messages=ask(), temperature=-3)
        assert raised.value.body["message"]
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model=model, prompt="word " * 20_000, max_tokens=5)

    async def test_32_streams_at_once(self, client, model):
        async def one(number):
            stream = await client.chat.completions.create(
                model=model, messages=ask(f"Say {number}."), max_completion_tokens=6, temperature=0, stream=True
            )
            chunks = [chunk async for chunk in stream]
            return chunks[-1].choices[0].finish_reason

        reasons = await asyncio.gather(*(one(number) for number in range(32)))
        assert set(reasons) <= {"length", "stop"}
