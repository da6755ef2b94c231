"""Ask an endpoint about reviews that the model has not seen, with LangChain.

    python ask.py URL MODEL QUESTIONS.jsonl NUMBER

URL ends with /v1; QUESTIONS.jsonl has rows of question, choices and answer, as `raytune demo`
makes them.
"""

import json
import sys
from pathlib import Path

from langchain_openai import ChatOpenAI


def main() -> None:
    """Print each answer beside the right one, and how many agree."""
    url, model, questions, number = sys.argv[1:]
    with Path(questions).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: int(number)]
    llm = ChatOpenAI(model=model, base_url=url, api_key="none", temperature=0, max_tokens=8)
    answers = llm.batch([row["question"] for row in rows])
    num_right = 0
    for row, answer in zip(rows, answers, strict=True):
        right = row["choices"][row["answer"]]
        num_right += answer.text == right
        print(f"{answer.text} (right: {right})  {row['question'].splitlines()[-1]}")
    print(f"{num_right} of {len(rows)} answers are right")


if __name__ == "__main__":
    main()
