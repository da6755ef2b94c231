"""Ask the base and each of its adapters the same question.

python ask.py URL QUESTION
"""

import sys

import httpx2 as httpx


def main() -> None:
    """Print the greedy answer of each model that the endpoint lists."""
    url, question = sys.argv[1:]
    with httpx.Client(base_url=url, timeout=300) as client:
        for model in client.get("models").raise_for_status().json()["data"]:
            body = {
                "model": model["id"],
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": 40,
            }
            answer = client.post("chat/completions", json=body).raise_for_status().json()
            text = " ".join(answer["choices"][0]["message"]["content"].split())
            print(f"{model['id']:<18} {text}")


if __name__ == "__main__":
    main()
