"""Instructor: https://python.useinstructor.com."""

from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from steps import Endpoint, run

MESSAGES: Any = [{"role": "user", "content": "John Doe is 30 years old."}]


class User(BaseModel):
    """A person; bounded, so that any model comes to an end."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


class Group(BaseModel):
    """A person's group."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["family", "friends"]
    size: Literal[1, 2, 3]


def extract(endpoint: Endpoint) -> object:
    client = instructor.from_provider(
        f"openai/{endpoint.model}", base_url=endpoint.url, api_key=endpoint.key
    )
    user = client.chat.completions.create(
        response_model=User,
        messages=[{"role": "user", "content": "John Doe is 30 years old."}],
    )
    assert isinstance(user, User)
    return user.model_dump()


def extract_from_a_client(endpoint: Endpoint) -> object:
    client = instructor.from_openai(OpenAI(base_url=endpoint.url, api_key=endpoint.key))
    user: Any = client.chat.completions.create(
        model=endpoint.model, response_model=User, messages=MESSAGES, max_retries=1
    )
    assert isinstance(user, User)
    return user.model_dump()


def extract_by_a_schema(endpoint: Endpoint) -> object:
    client = instructor.from_openai(
        OpenAI(base_url=endpoint.url, api_key=endpoint.key), mode=instructor.Mode.JSON_SCHEMA
    )
    user: Any = client.chat.completions.create(
        model=endpoint.model, response_model=User, messages=MESSAGES, max_retries=1
    )
    assert isinstance(user, User)
    return user.model_dump()


def stream_partial(endpoint: Endpoint) -> object:
    client = instructor.from_openai(OpenAI(base_url=endpoint.url, api_key=endpoint.key))
    parts: list[Any] = list(
        client.chat.completions.create_partial(
            model=endpoint.model, response_model=Group, messages=MESSAGES
        )
    )
    assert len(parts) > 1
    assert Group.model_validate(parts[-1].model_dump())
    return parts[-1].model_dump()


def extract_again(endpoint: Endpoint) -> object:
    """Refuse the first answer: Instructor sends it back with what is wrong."""
    refused: list[str] = []

    class Choosy(Group):
        @field_validator("kind")
        @classmethod
        def _refuse_once(cls, value: str) -> str:
            if not refused:
                refused.append(value)
                raise ValueError("not this one")
            return value

    client = instructor.from_openai(OpenAI(base_url=endpoint.url, api_key=endpoint.key))
    found: Any = client.chat.completions.create(
        model=endpoint.model, response_model=Choosy, messages=MESSAGES, max_retries=2
    )
    assert refused
    return found.model_dump()


def extract_with_usage(endpoint: Endpoint) -> object:
    client = instructor.from_openai(OpenAI(base_url=endpoint.url, api_key=endpoint.key))
    user, completion = client.chat.completions.create_with_completion(
        model=endpoint.model, response_model=User, messages=MESSAGES, max_retries=1
    )
    assert isinstance(user, User)
    return completion.usage.completion_tokens


if __name__ == "__main__":
    run(
        extract,
        extract_from_a_client,
        extract_by_a_schema,
        extract_again,
        stream_partial,
        extract_with_usage,
    )
