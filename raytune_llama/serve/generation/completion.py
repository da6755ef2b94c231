"""From a request to the text of its choices, streamed as deltas. Knows tokens, not HTTP."""

import asyncio
import re
from collections.abc import AsyncGenerator, Hashable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from raytune_llama.serve.config import SamplingDefaults
from raytune_llama.serve.engine.grammar import Grammar, GrammarCompiler, ToolCallFormat
from raytune_llama.serve.engine.protocol import (
    EngineRequest,
    InferenceEngine,
    SampledToken,
    SamplingOptions,
    TokenOutput,
)
from raytune_llama.serve.errors import ContextLengthError, InvalidRequestError, UnknownModelError
from raytune_llama.serve.generation.conversation import build_conversation
from raytune_llama.serve.generation.detokenizer import (
    CompletionDecoder,
    IncrementalDetokenizer,
)
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import OutputDelta, OutputToken, Stream
from raytune_llama.serve.protocol.chat import ChatRequest, FinishReason, GenerationRequest
from raytune_llama.serve.protocol.completions import CompletionRequest

_PLACE = re.compile(r"([a-z][\w.]*): ")
"""Place in a request at the beginning of an error."""

_NUM_CONTEXT_TOKENS = 8
"""Tokens of a prompt from which the text of the first ones after it is decoded."""


@dataclass(frozen=True)
class PreparedChoice:
    """One choice of a request, ready for the engine."""

    generation: EngineRequest
    """Request of the choice."""

    echo: str | None = None
    """Text of the prompt, with which the choice begins; None: it is not echoed."""

    continues_text: bool = False
    """Whether the choice continues the prompt's text, rather than answering it."""


@dataclass(frozen=True)
class PreparedRequest:
    """A tokenized request."""

    choices: tuple[PreparedChoice, ...]
    """The choices, in the order of their indices."""

    num_prompt_tokens: int
    """Number of tokens of all prompts."""

    stops: tuple[str, ...]
    """Stop strings."""

    must_call: bool | None = None
    """Whether choices are tool calls only; None: the request has no tools."""

    is_score: bool = False
    """Whether only the prompt is returned, and no generated token."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    """Text up to the end of the answer or a stop string."""

    num_tokens: int
    """Number of generated tokens."""

    finish_reason: FinishReason | None
    """Why the answer has ended."""


class CompletionService:
    """Turns requests into prompts, and generated tokens into text."""

    def __init__(
        self,
        served: ServedModel,
        engine: InferenceEngine,
        defaults: SamplingDefaults,
        adapter: Hashable | None = None,
    ) -> None:
        """Serve a model, with the attached adapter of this key or, if None, without."""
        self._served, self._engine, self._defaults = served, engine, defaults
        self._adapter = adapter
        self._grammars = GrammarCompiler(served.tokenizer, served.stop_ids)

    @property
    def name(self) -> str:
        """Name of the model in requests."""
        return self._served.name

    def prepare_chat(self, request: ChatRequest) -> PreparedRequest:
        """Render a conversation with the model's chat template and tokenize it.

        Raises:
            InvalidRequestError: the model has no template, the conversation does not fit it, or the
                prompt leaves no room for an answer.
        """
        chat = self._served.chat
        if chat is None:
            raise InvalidRequestError(
                f"{self._served.name} has no chat template; use /v1/completions", "messages"
            )
        self._served.check_size([message.text for message in request.messages], "messages")
        try:
            conversation = build_conversation(request.messages, request.shown_tools)
            options = request.template_options(chat.template.variables)
            ids = chat.encode_prompt(conversation, options).tolist()
        except ValueError as error:
            place = _PLACE.match(str(error))
            raise InvalidRequestError(str(error), place[1] if place else "messages") from error
        generation = replace(
            self._engine_request(request, ids, "messages"),
            max_tokens=self._limit(request.max_completion_tokens or request.max_tokens, ids),
            constraint=self._constraint(request),
        )
        if request.logprobs:
            sampling = replace(generation.sampling, num_logprobs=request.top_logprobs)
            generation = replace(generation, sampling=sampling)
        is_continued = request.messages[-1].role == "assistant"
        if is_continued and generation.constraint is not None and not request.may_be_text:
            text = "an answer that is continued can't be held to a schema or a tool call"
            raise InvalidRequestError(
                f"messages: {text}; let the user's message be last", "messages"
            )
        return PreparedRequest(
            tuple(
                PreparedChoice(one, continues_text=is_continued)
                for one in _vary(generation, request.n)
            ),
            len(ids),
            request.stops,
            must_call=request.must_call if request.shown_tools else None,
        )

    def _constraint(self, request: ChatRequest) -> Grammar | None:
        """Return the grammar that answers must follow; None: any text."""
        schema = request.response_format.kept if request.response_format else None
        if not request.shown_tools:
            if schema is None:
                return None
            try:
                return self._grammars.compile_schema(schema)
            except ValueError as error:
                raise InvalidRequestError(str(error), "response_format") from error
        form = ToolCallFormat(
            [(tool.function.name, tool.function.schema_) for tool in request.callable_tools],
            must_call=request.must_call,
            is_single=request.calls_one_tool,
            text_schema=schema,
        )
        try:
            return self._grammars.compile_tool_calls(form)
        except ValueError as error:
            raise InvalidRequestError(f"tools: {error}", "tools") from error

    def prepare_completion(self, request: CompletionRequest) -> PreparedRequest:
        """Tokenize texts as starts of documents, control tokens in them as text; or take ids.

        Raises:
            InvalidRequestError: an id is outside the vocabulary, or a prompt leaves no room for an
                answer.
        """
        choices: list[PreparedChoice] = []
        num_tokens = 0
        for number, prompt in enumerate(request.prompts):
            param = f"prompt.{number}" if len(request.prompts) > 1 else "prompt"
            ids = self._encode(prompt, param)
            num_tokens += len(ids)
            generation = self._engine_request(request, ids, param)
            generation = replace(
                generation,
                max_tokens=self._limit(request.max_tokens, ids),
                sampling=replace(generation.sampling, num_logprobs=request.logprobs),
                num_prompt_logprobs=request.logprobs if request.echo else None,
            )
            echo = self._decode(prompt) if request.echo else None
            choices += [
                PreparedChoice(one, echo, continues_text=True)
                for one in _vary(generation, request.n)
            ]
        is_score = request.max_tokens == 0
        return PreparedRequest(tuple(choices), num_tokens, request.stops, is_score=is_score)

    def _encode(self, prompt: str | list[int], param: str) -> list[int]:
        if isinstance(prompt, str):
            self._served.check_size([prompt], param)
            return self._served.encode_texts([prompt])[0]
        beyond = [token for token in prompt if token >= len(self._served.tokenizer)]
        if beyond:
            text = f"token id {beyond[0]} is outside the vocabulary of {self._served.name}"
            raise InvalidRequestError(text, param)
        return prompt

    def _decode(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text = self._served.tokenizer.decode(prompt, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _engine_request(
        self, request: GenerationRequest, ids: Sequence[int], param: str
    ) -> EngineRequest:
        """Return a request to the engine, for one token."""
        max_context = self._served.max_context
        if not ids:
            raise InvalidRequestError("the prompt has no tokens", param)
        if len(ids) >= max_context:
            raise ContextLengthError(max_context, f"{len(ids)} tokens", param)
        beyond = [id_ for id_ in request.logit_bias if int(id_) >= len(self._served.tokenizer)]
        if beyond:
            text = f"logit_bias: token id {beyond[0]} is outside the vocabulary"
            raise InvalidRequestError(text, "logit_bias")
        defaults = self._defaults
        top_k = defaults.top_k if request.top_k is None else request.top_k
        sampling = SamplingOptions(
            temperature=_given(request.temperature, defaults.temperature),
            top_p=_given(request.top_p, defaults.top_p),
            top_k=None if top_k in (0, -1) else top_k,
            min_p=request.min_p,
            repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            logit_bias=tuple((int(id_), bias) for id_, bias in request.logit_bias.items() if bias),
            seed=request.seed,
        )
        stop_ids = self._served.stop_ids
        return EngineRequest(tuple(ids), sampling, 1, stop_ids, adapter=self._adapter)

    def _limit(self, wanted: int | None, ids: Sequence[int]) -> int:
        """Return the maximum number of generated tokens."""
        room = self._served.max_context - len(ids)
        wanted = self._defaults.max_tokens if wanted is None else wanted
        # Of a prompt that is only scored, the generated token is dropped.
        return room if wanted is None else max(1, min(wanted, room))

    async def respond(self, request: ChatRequest | CompletionRequest) -> Stream[OutputDelta]:
        """Return the stream of a request's answers.

        The deltas of its choices come as they are generated. The first one raises BusyError if too
        many requests are waiting; any raises EngineError if the engine has failed.

        Raises:
            UnknownModelError: the request names another adapter than this one.
            InvalidRequestError: the request can't be answered.
        """
        _, *adapter = request.model.partition(":")
        if adapter != list(self.name.partition(":")[1:]):
            raise UnknownModelError(request.model, [self.name])
        if isinstance(request, ChatRequest):
            prompt = await asyncio.to_thread(self.prepare_chat, request)
        else:
            prompt = await asyncio.to_thread(self.prepare_completion, request)
        if len(prompt.choices) > self._engine.capacity:
            raise InvalidRequestError(
                f"n: got {len(prompt.choices)} choices, but at most {self._engine.capacity} can be "
                "generated and queued at a time; send several requests",
                "n",
            )
        return Stream(prompt.num_prompt_tokens, self.generate(prompt))

    def prepare_ids(
        self,
        ids: Sequence[int],
        sampling: SamplingOptions,
        max_tokens: int,
        *,
        stops: tuple[str, ...] = (),
        continues_text: bool,
    ) -> PreparedRequest:
        """Return a request for one answer to a tokenized prompt.

        Args:
            ids: token ids of the prompt; it must leave room for an answer.
            sampling: sampling parameters.
            max_tokens: maximum number of generated tokens; less if the context has less room.
            stops: stop strings.
            continues_text: whether the answer continues the prompt's text.
        """
        room = self._served.max_context - len(ids)
        request = EngineRequest(
            tuple(ids),
            sampling,
            min(max_tokens, room),
            self._served.stop_ids,
            adapter=self._adapter,
        )
        choice = PreparedChoice(request, continues_text=continues_text)
        return PreparedRequest((choice,), len(ids), stops)

    async def complete(self, prompt: PreparedRequest) -> Completion:
        """Return the whole answer to a request of one choice; raises as `generate` does."""
        assert len(prompt.choices) == 1
        async with aclosing(self.generate(prompt)) as deltas:
            parts = [delta async for delta in deltas]
        return Completion(
            "".join(part.text for part in parts),
            sum(part.num_tokens for part in parts),
            parts[-1].finish_reason,
        )

    def generate(self, prompt: PreparedRequest) -> AsyncGenerator[OutputDelta, None]:
        """Yield the deltas of all choices as they are generated.

        A caller that closes the generator early frees the request's slots.

        Raises:
            BusyError: too many requests are waiting.
            EngineError: the engine has failed.
        """
        return self._one(prompt, 0) if len(prompt.choices) == 1 else self._many(prompt)

    async def _many(self, prompt: PreparedRequest) -> AsyncGenerator[OutputDelta, None]:
        """Yield the deltas of several choices, in the order in which they are generated."""
        deltas: asyncio.Queue[OutputDelta | BaseException | None] = asyncio.Queue()

        async def run(index: int) -> None:
            try:
                async with aclosing(self._one(prompt, index)) as parts:
                    async for part in parts:
                        deltas.put_nowait(part)
                deltas.put_nowait(None)
            except (RuntimeError, ValueError) as error:
                deltas.put_nowait(error)

        tasks = [asyncio.create_task(run(index)) for index in range(len(prompt.choices))]
        try:
            num_open = len(tasks)
            while num_open:
                item = await deltas.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, prompt: PreparedRequest, index: int) -> AsyncGenerator[OutputDelta, None]:
        """Yield the deltas of one choice."""
        choice = prompt.choices[index]
        generation, echo = choice.generation, choice.echo
        context = generation.prompt[-_NUM_CONTEXT_TOKENS:] if choice.continues_text else ()
        decoder = CompletionDecoder(
            self._served.tokenizer, prompt.stops, must_call=prompt.must_call, context=context
        )
        async with aclosing(self._engine.generate(generation)) as steps:
            async for step in steps:
                tokens: list[OutputToken] = []
                if echo is not None:
                    if generation.num_prompt_logprobs is not None:
                        tokens += await asyncio.to_thread(self._prompt_tokens, generation, step)
                    if prompt.is_score:
                        yield OutputDelta(index, echo, 0, tuple(tokens), "length")
                        return
                is_end = step.finish_reason == "stop"
                if step.sampled.logprob is not None:
                    token = self._token(step.sampled, decoder, len(choice.echo or ""))
                    tokens.append(replace(token, is_end=is_end))
                is_last = step.finish_reason is not None
                pushed = None if is_end else step.sampled.token
                text, calls = decoder.push(pushed, is_last=is_last)
                finish = (
                    decoder.finish_reason if is_end or decoder.is_stopped else step.finish_reason
                )
                yield OutputDelta(index, (echo or "") + text, 1, tuple(tokens), finish, calls)
                echo = None
                if decoder.is_stopped:
                    return

    def _prompt_tokens(self, generation: EngineRequest, step: TokenOutput) -> list[OutputToken]:
        """Return the tokens of an echoed prompt with their log-probabilities."""
        stream = IncrementalDetokenizer(self._served.tokenizer)
        tokens: list[OutputToken] = []
        for sampled in (SampledToken(generation.prompt[0]), *step.prompt):
            tokens.append(self._token(sampled, stream))
            stream.push(sampled.token)
        return tokens

    def _token(
        self,
        sampled: SampledToken,
        stream: IncrementalDetokenizer | CompletionDecoder,
        start: int = 0,
    ) -> OutputToken:
        """Return a token that is pushed next to a stream whose text begins at a place."""
        likeliest = tuple((self._bytes(token), value) for token, value in sampled.top_logprobs)
        content = self._bytes(sampled.token)
        offset = start + stream.find_offset(content)
        return OutputToken(content, sampled.logprob, likeliest, offset)

    def _bytes(self, token: int) -> bytes:
        return self._grammars.token_bytes(token)


def _vary(generation: EngineRequest, num_choices: int) -> list[EngineRequest]:
    """Return the engine's requests of several choices of a prompt, each with a seed of its own."""
    sampling = generation.sampling
    if sampling.seed is None:
        return [generation] * num_choices
    return [
        replace(generation, sampling=replace(sampling, seed=sampling.seed + number))
        for number in range(num_choices)
    ]


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
