"""The openai package: sync, async, streamed, and what it does when the server is full."""

import asyncio
import threading
import time
from collections.abc import Iterator

import openai
import pytest

from dspark_server.api import ServerSettings
from tests.api.support import Running, start

from .conftest import Served

PROMPT = "Once upon a time, in a village by the sea,"


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).id == served.model


def test_whole_and_streamed_agree(served: Served, client: openai.OpenAI) -> None:
    fields = {"model": served.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_every_field_it_has(served: Served, client: openai.OpenAI) -> None:
    """Those of the package's own signature that are served, and a seed that repeats."""
    fields = {
        "model": served.model, "prompt": [PROMPT, "One, two,"], "max_tokens": 8, "n": 2, "temperature": 0.7,
        "top_p": 0.9, "seed": 11, "stop": ["\n\n"], "echo": False, "user": "someone", "suffix": None,
        "extra_body": {"top_k": 20, "ignore_eos": True, "min_tokens": 2},
    }  # fmt: skip
    first, again = client.completions.create(**fields), client.completions.create(**fields)
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert first.choices[0].text != first.choices[1].text


def test_async_in_company(served: Served) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

            async def one(number: int) -> str:
                fields = {"model": served.model, "prompt": f"{number} and {number} make", "max_tokens": 12}
                stream = await client.completions.create(**fields, stream=True, temperature=0)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*[one(number) for number in range(12)])

    texts = asyncio.run(main())
    assert len(set(texts)) > 6
    assert all(texts)


def test_errors_have_their_classes(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=served.model, prompt="x", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


@pytest.fixture
def full_server() -> Iterator[Running]:
    """A fake engine with room for one choice."""
    yield from start(ServerSettings(port=0), capacity=1, step_seconds=0.01)


def test_a_full_queue_is_tried_again_when_the_server_says(full_server: Running) -> None:
    """503 with Retry-After: the package waits so long, tries again, and the caller sees an answer."""
    with openai.OpenAI(base_url=f"{full_server.url}/v1", api_key="none", max_retries=2) as client:
        occupying = client.completions.create(model="fake", prompt="forever", max_tokens=2000, stream=True)
        next(iter(occupying))
        timer = threading.Timer(0.5, occupying.close)
        timer.start()
        began = time.monotonic()
        answer = client.completions.create(model="fake", prompt="say fine", max_tokens=10)
        took = time.monotonic() - began
        timer.join()
    assert answer.choices[0].text == "fine"
    assert 0.9 < took < 5  # Retry-After: 1


def test_a_queue_that_stays_full_is_an_error_in_the_end(full_server: Running) -> None:
    with openai.OpenAI(base_url=f"{full_server.url}/v1", api_key="none", max_retries=1) as client:
        with client.completions.create(model="fake", prompt="forever", max_tokens=2000, stream=True) as occupying:
            next(iter(occupying))
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="fake", prompt="say fine")
        assert caught.value.status_code == 503
        assert caught.value.code == "no_capacity"
