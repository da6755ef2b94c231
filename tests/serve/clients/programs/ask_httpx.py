"""The API without a client library, by HTTPX: https://www.python-httpx.org."""

import json
from typing import Any

import httpx
from steps import QUESTION, Endpoint, joined, run


def headers(endpoint: Endpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {endpoint.key}"}


def chat(endpoint: Endpoint) -> object:
    response = httpx.post(
        f"{endpoint.url}/chat/completions",
        headers={"Authorization": f"Bearer {endpoint.key}"},
        json={"model": endpoint.model, "messages": [{"role": "user", "content": QUESTION}]},
        timeout=600,
    )
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def chat_stream(endpoint: Endpoint) -> object:
    asked: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 20,
        "stream": True,
    }
    parts: list[str | None] = []
    with httpx.stream(
        "POST",
        f"{endpoint.url}/chat/completions",
        headers={"Authorization": f"Bearer {endpoint.key}"},
        json=asked,
        timeout=600,
    ) as response:
        response.raise_for_status()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                parts.append(chunk["choices"][0]["delta"].get("content"))
    return joined(parts)


def completion(endpoint: Endpoint) -> object:
    asked = {"model": endpoint.model, "prompt": "Once upon a time", "max_tokens": 12}
    response = httpx.post(
        f"{endpoint.url}/completions", headers=headers(endpoint), json=asked, timeout=600
    )
    return response.json()["choices"][0]["text"]


def embeddings(endpoint: Endpoint) -> object:
    asked = {"model": endpoint.model, "input": QUESTION}
    response = httpx.post(
        f"{endpoint.url}/embeddings", headers=headers(endpoint), json=asked, timeout=600
    )
    return len(response.json()["data"][0]["embedding"])


def responses(endpoint: Endpoint) -> object:
    asked = {"model": endpoint.model, "input": QUESTION, "max_output_tokens": 20}
    response = httpx.post(
        f"{endpoint.url}/responses", headers=headers(endpoint), json=asked, timeout=600
    )
    response.raise_for_status()
    return response.json()["output"][0]["content"][0]["text"]


def models(endpoint: Endpoint) -> object:
    response = httpx.get(f"{endpoint.url}/models", headers=headers(endpoint))
    names = [model["id"] for model in response.json()["data"]]
    assert endpoint.model in names
    return names


def error_without_a_key(endpoint: Endpoint) -> object:
    response = httpx.get(f"{endpoint.url}/models")
    assert response.status_code == 401
    return response.json()["error"]["code"]


def error_of_a_body_that_is_no_json(endpoint: Endpoint) -> object:
    response = httpx.post(
        f"{endpoint.url}/chat/completions",
        headers={**headers(endpoint), "Content-Type": "application/json"},
        content=b"{",
    )
    assert response.status_code == 400
    return response.json()["error"]["message"]


def error_of_an_unknown_route(endpoint: Endpoint) -> object:
    response = httpx.get(f"{endpoint.url}/nowhere", headers=headers(endpoint))
    assert response.status_code == 404
    return response.json()["error"]["message"]


if __name__ == "__main__":
    run(
        chat,
        chat_stream,
        completion,
        embeddings,
        responses,
        models,
        error_without_a_key,
        error_of_a_body_that_is_no_json,
        error_of_an_unknown_route,
    )
