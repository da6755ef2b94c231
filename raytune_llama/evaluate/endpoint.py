"""A running endpoint as a model to evaluate: lm-eval's own client, and answers to messages."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from raytune_llama.config.errors import UserError
from raytune_llama.evaluate.config import AnswersConfig, EvaluatedModelConfig
from raytune_llama.evaluate.results import GeneratedAnswer
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.serve.client.endpoint import (
    ChatClient,
    EndpointError,
    RequestRejectedError,
    StreamEnd,
)
from raytune_llama.storage.directories import fetched

if TYPE_CHECKING:
    from lm_eval.api.model import LM

NUM_CONCURRENT: Final = 8
"""Requests at a time."""

_PROBE = "one two three four five"
_ENDLESS = 2**20
"""Context length of an endpoint that the client does not know: it refuses longer prompts itself."""


def check_endpoint(config: EvaluatedModelConfig, key: str | None, field: str) -> list[str]:
    """Return why a model can't be asked at an endpoint; empty if it can.

    Args:
        config: the endpoint and the name of its model.
        key: API key; None: no key.
        field: config field of the model.
    """
    assert config.base_url is not None
    try:
        with closing(ChatClient(config.base_url, key)) as client:
            names = client.list_models()
    except (EndpointError, RequestRejectedError) as error:
        return [f"{field}.base_url: {error}"]
    if config.model in names:
        return []
    return [
        f"{field}.model: {config.base_url} has no model {config.model!r}; its models are "
        f"{', '.join(names) or 'none'}"
    ]


@contextmanager
def failures_named(config: EvaluatedModelConfig) -> Iterator[None]:
    """Raise the errors of an endpoint, from either client, as a UserError with the next step."""
    from aiohttp import ClientError

    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, AssertionError) as error:
        # lm-eval reads replies as they should be.
        raise UserError(
            f"{config.base_url} has answered in another form than OpenAI's "
            f"({type(error).__name__}: {error}); what is evaluated so far is kept"
        ) from error
    except (EndpointError, ClientError, TimeoutError) as error:
        raise UserError(
            f"{config.base_url} has failed: {error or type(error).__name__}; what is evaluated so "
            "far is kept: run the same command again when it answers"
        ) from error


def build_endpoint_lm(config: EvaluatedModelConfig, task: EvaluationTask) -> "LM":
    """Return lm-eval's client of an endpoint, for what a task asks.

    Log-likelihoods come from `/completions`, with token ids of the config's tokenizer; generated
    answers too, but from `/chat/completions` with a chat template, which is then the endpoint's.
    """
    from lm_eval.models import openai_completions

    # A decorator hides the arguments of their classes.
    make_chat: Any = openai_completions.LocalChatCompletion
    make_text: Any = openai_completions.LocalCompletionsAPI
    assert config.base_url is not None
    base = config.base_url.rstrip("/")
    options: dict[str, Any] = {"model": config.model, "num_concurrent": NUM_CONCURRENT}
    is_generated = task.config.method == "generation"
    if is_generated and task.config.chat_template:
        lm = make_chat(base_url=f"{base}/chat/completions", max_length=_ENDLESS, **options)
        lm.template_hash = "the endpoint's own template"
        return lm
    tokenizer = None if config.tokenizer is None else str(fetched(config.tokenizer, weights=False))
    if tokenizer is None:
        options |= {"tokenizer_backend": None, "tokenized_requests": False}
    else:
        options |= {"tokenizer_backend": "huggingface", "tokenizer": tokenizer}
    lm = make_text(base_url=f"{base}/completions", max_length=_context_length(tokenizer), **options)
    if not is_generated:
        _check_echo(lm, config)
    return lm


def _check_echo(lm: Any, config: EvaluatedModelConfig) -> None:  # noqa: ANN401  # of lm-eval
    """Raise if an endpoint gives no log-probabilities of prompts: every option would be equal."""
    ids = lm.tok_encode(_PROBE)
    reply = lm.model_call([ids], generate=False)
    given = reply["choices"][0]["logprobs"]["token_logprobs"]
    # The prompt's tokens and the one that is generated; a text may be cut into other tokens.
    wanted = len(ids) + 1 if config.tokenizer is not None else 3
    if len(given) < wanted:
        raise UserError(
            f"{config.base_url} gives log-probabilities of {len(given)} tokens for a prompt of "
            f"several, so it does not support `echo` with `logprobs`; use method: generation"
        )


def _context_length(tokenizer: str | None) -> int:
    """Return the context length of the model that a tokenizer lies beside, plus one."""
    file = None if tokenizer is None else Path(tokenizer) / "config.json"
    if file is None or not file.is_file():
        return _ENDLESS
    settings = json.loads(file.read_text(encoding="utf-8"))
    return int(settings.get("max_position_embeddings") or _ENDLESS) + 1


def answer_prompts(
    config: EvaluatedModelConfig, answers: AnswersConfig, prompts: Sequence[str], key: str | None
) -> list[GeneratedAnswer]:
    """Send each prompt as a message; return the answers in order.

    Raises:
        EndpointError: the endpoint can't be reached, or fails.
        RequestRejectedError: it rejects a request.
    """
    assert config.base_url is not None
    with closing(ChatClient(config.base_url, key)) as client:

        def answer(prompt: str) -> GeneratedAnswer:
            request = {
                "model": config.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": answers.max_tokens,
                "temperature": 0,
            }
            parts = list(client.stream(request))
            end = parts[-1]
            assert isinstance(end, StreamEnd)
            text = "".join(part for part in parts if isinstance(part, str))
            return GeneratedAnswer(prompt, text, end.finish_reason or "stop")

        with ThreadPoolExecutor(NUM_CONCURRENT) as pool:
            return list(pool.map(answer, prompts))
