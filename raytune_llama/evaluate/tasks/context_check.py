"""A model that counts prompts which its context cannot hold, around any model of lm-eval."""

# ruff: noqa: RUF002  # a Chinese colon is what tokenizers join with a letter

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from raytune_llama.config.errors import UserError

logger = logging.getLogger(__name__)

Encode = Callable[[str], Sequence[int]]

_SPECIAL_TOKENS = 8
"""Upper bound of the tokens that an encoder adds to a text."""
_TAIL_CHARACTERS = 16
_MAX_SHIFT = 4
_MAX_SHOWN = 5


class CheckedModel(LM):
    """Passes requests to a model and records which prompts it has to cut.

    It also moves the boundary between prompt and answer where the tokenizer would join them: if
    "：A" is one token, "A" after "：" has no token of its own, and "：" becomes a part of every
    option of that question.

    Args:
        model: Model that does the work.
        truncate: `refuse` fails before the model runs, if a prompt is too long.
        name: Name of a question by its position, for error messages.
    """

    def __init__(
        self, model: LM, truncate: Literal["left", "refuse"], name: Callable[[int], str]
    ) -> None:
        super().__init__()
        self._model, self._truncate, self._name = model, truncate, name
        # lm-eval's clients of endpoints may have no tokenizer.
        has_tokenizer = getattr(model, "tokenizer", model) is not None
        self.encode: Encode | None = getattr(model, "tok_encode", None) if has_tokenizer else None
        self.max_length: int | None = getattr(model, "max_length", None)
        self.truncated: set[int] = set()
        """Positions of the questions with a prompt that is too long."""
        self._is_rendered = False
        self.first_prompt = ""
        """First prompt that was passed on."""

    @property
    def can_count(self) -> bool:
        """Whether the model has an encoder and a known context."""
        return self.encode is not None and self.max_length is not None

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer; only used by a cache that is turned off."""
        return ""

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002 - lm-eval's signature
    ) -> str:
        """Render messages with the model's own template."""
        self._is_rendered = True
        return self._model.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        requests = list(self._split_cleanly(requests))
        self._check(requests, self._is_scored_whole)
        return self._model.loglikelihood(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each text, which may be longer than the context."""
        self.first_prompt = self.first_prompt or _text(requests[0])
        return self._model.loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return a generated text per prompt."""
        self._check(requests, self._leaves_room)
        return self._model.generate_until(requests)

    def _check(
        self, requests: Sequence[Instance], fits: Callable[[Instance, Encode], bool]
    ) -> None:
        self.first_prompt = self.first_prompt or _text(requests[0])
        if self.encode is None or self.max_length is None:
            return
        encode = functools.lru_cache(maxsize=1024)(self.encode)
        self.truncated = {one.doc_id or 0 for one in requests if not fits(one, encode)}
        if not self.truncated:
            return
        names = [self._name(position) for position in sorted(self.truncated)]
        more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
        where = f"{requests[0].task_name}: {', '.join(names[:_MAX_SHOWN])}{more}"
        if self._truncate == "refuse":
            raise UserError(
                f"truncate: the prompts of {len(names)} questions are longer than the context of "
                f"{self.max_length} tokens ({where}); lower shots, or set truncate=left"
            )
        logger.warning("the start of %d prompts is cut to fit the context: %s", len(names), where)

    def _is_scored_whole(self, request: Instance, encode: Encode) -> bool:
        """Whether the context holds a prompt and a continuation, but for its last token."""
        assert self.max_length is not None
        context, continuation = _arguments(request)
        num_bytes = len(continuation.encode())
        # No token is shorter than a byte, so most prompts need not be encoded.
        if len(context.encode()) + num_bytes + _SPECIAL_TOKENS <= self.max_length:
            return True
        num_before = len(encode(context))
        if num_before + num_bytes <= self.max_length:
            return True
        # Encoded together with the end of the context only: a model may know a rendered
        # conversation as a whole, and not with something added to it.
        tail = _tail(context)
        num_new = len(encode(tail + continuation)) - len(encode(tail))
        return num_before + num_new - 1 <= self.max_length

    def _leaves_room(self, request: Instance, encode: Encode) -> bool:
        """Whether the context holds a prompt and all tokens that may be generated."""
        assert self.max_length is not None
        prompt, options = _arguments(request)
        max_new = options.get("max_gen_toks") or getattr(self._model, "max_gen_toks", 0)
        room = self.max_length - int(max_new)
        return len(prompt.encode()) + _SPECIAL_TOKENS <= room or len(encode(prompt)) <= room

    def _split_cleanly(self, requests: Sequence[Instance]) -> Iterator[Instance]:
        """Yield the requests, with the boundary of those moved that the tokenizer would join."""
        shifts: dict[tuple[str, tuple[str, ...]], int] = {}
        continuations: dict[str, list[str]] = {}
        for request in requests:
            context, continuation = _arguments(request)
            continuations.setdefault(context, []).append(continuation)
        for request in requests:
            context, continuation = _arguments(request)
            key = (_tail(context), tuple(continuations[context]))
            if key not in shifts:
                shifts[key] = self._find_shift(*key)
            if shift := shifts[key]:
                start = len(context) - shift
                arguments: Any = (context[:start], context[start:] + continuation)
                yield replace(request, arguments=arguments, resps=[], filtered_resps={})
            else:
                yield request

    def _find_shift(self, tail: str, continuations: Sequence[str]) -> int:
        """Return how many characters have to move from the prompt to the answers; 0: none."""
        # After a template, an answer is a turn of its own, which shares no token with the prompt.
        if self.encode is None or self._is_rendered:
            return 0
        for shift in range(min(_MAX_SHIFT, len(tail) - 1) + 1):
            start = len(tail) - shift
            if all(self._is_split(tail[:start], tail[start:] + one) for one in continuations):
                return shift
        return 0

    def _is_split(self, context: str, continuation: str) -> bool:
        """Whether a context keeps its tokens when a continuation follows."""
        assert self.encode is not None
        # lm-eval moves spaces at the end of the context to the continuation.
        kept = context.rstrip()
        if not kept:
            return True
        before = list(self.encode(kept))
        after = list(self.encode(context + continuation))
        return after[: len(before)] == before and len(after) > len(before)


def _tail(context: str) -> str:
    """Return the end of a prompt, which decides how the start of an answer is encoded.

    Its last line, if it has one: mostly the cue, so that questions share what is computed from it.
    """
    return (context.rpartition("\n")[2] or context)[-_TAIL_CHARACTERS:]


def _text(request: Instance) -> str:
    """Return a prompt as text; lm-eval's clients of chat endpoints wrap the messages' JSON."""
    prompt = _arguments(request)[0]
    return prompt if isinstance(prompt, str) else prompt.prompt


def _arguments(request: Instance) -> Any:  # noqa: ANN401 - lm-eval types it as an empty tuple
    return request.args
