"""From a request to the text of its choices, streamed as deltas. Knows tokens, not HTTP."""

import asyncio
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
)
from raytune_llama.serve.errors import InvalidRequestError, UnknownModelError
from raytune_llama.serve.generation.conversation import build_conversation
from raytune_llama.serve.generation.detokenizer import CompletionDecoder
from raytune_llama.serve.generation.model import ServedModel
from raytune_llama.serve.generation.output import OutputDelta, OutputToken, Stream
from raytune_llama.serve.protocol.chat import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from raytune_llama.serve.protocol.tools import NamedTool


@dataclass(frozen=True)
class PreparedRequest:
    """A tokenized request, ready for the engine."""

    ids: tuple[int, ...]
    """Token ids of the prompt."""

    generation: EngineRequest
    """Engine request of the first answer; further answers use other seeds."""

    num_choices: int
    """Number of answers."""

    stops: tuple[str, ...]
    """Stop strings."""

    must_call: bool | None = None
    """Whether answers are tool calls only; None: the request has no tools."""


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
            ids = chat.encode_prompt(conversation).tolist()
        except ValueError as error:
            raise InvalidRequestError(str(error), "messages") from error
        wanted = request.max_tokens or request.max_completion_tokens
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompt = self._prompt(request, ids, wanted, num_logprobs, "messages")
        must_call = request.must_call if request.shown_tools else None
        constraint = self._constraint(request)
        generation = replace(prompt.generation, constraint=constraint)
        return replace(prompt, generation=generation, must_call=must_call)

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
        choice = request.tool_choice
        wanted = choice.function.name if isinstance(choice, NamedTool) else None
        functions = [tool.function for tool in request.shown_tools]
        form = ToolCallFormat(
            [(one.name, one.schema_) for one in functions if wanted in {None, one.name}],
            must_call=request.must_call,
            is_single=request.parallel_tool_calls is False,
            text_schema=schema,
        )
        try:
            return self._grammars.compile_tool_calls(form)
        except ValueError as error:
            raise InvalidRequestError(f"tools: {error}", "tools") from error

    def prepare_completion(self, request: CompletionRequest) -> PreparedRequest:
        """Tokenize a text as the start of a document, control tokens in it as text; or take ids.

        Raises:
            InvalidRequestError: an id is outside the vocabulary, or the prompt leaves no room for
                an answer.
        """
        tokenizer = self._served.tokenizer
        if isinstance(request.prompt, str):
            self._served.check_size([request.prompt], "prompt")
            ids = self._served.encode_texts([request.prompt])[0]
        else:
            ids = request.prompt
            beyond = [token for token in ids if token >= len(tokenizer)]
            if beyond:
                raise InvalidRequestError(
                    f"token id {beyond[0]} is outside the vocabulary of {self._served.name}",
                    "prompt",
                )
        return self._prompt(request, ids, request.max_tokens, request.logprobs, "prompt")

    def _prompt(
        self,
        request: GenerationRequest,
        ids: Sequence[int],
        wanted: int | None,
        num_logprobs: int | None,
        param: str,
    ) -> PreparedRequest:
        room = self._served.max_context - len(ids)
        if not ids:
            raise InvalidRequestError("the prompt has no tokens", param)
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens, but the context length of "
                f"{self._served.name} is {self._served.max_context} tokens, including the answer",
                param,
            )
        defaults = self._defaults
        sampling = SamplingOptions(
            temperature=_given(request.temperature, defaults.temperature),
            top_p=_given(request.top_p, defaults.top_p),
            top_k=request.top_k or defaults.top_k,
            repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
            seed=request.seed,
            num_logprobs=num_logprobs,
        )
        limit = min(wanted or defaults.max_tokens or room, room)
        stop_ids = self._served.stop_ids
        generation = EngineRequest(tuple(ids), sampling, limit, stop_ids, adapter=self._adapter)
        return PreparedRequest(tuple(ids), generation, request.n, request.stops)

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
            raise UnknownModelError(f"{self.name} has no adapter {adapter[1]!r}", "model")
        if isinstance(request, ChatRequest):
            # In a thread, so that other streams continue: a hundred tools take a second.
            prompt = await asyncio.to_thread(self.prepare_chat, request)
        else:
            prompt = self.prepare_completion(request)
        if prompt.num_choices > self._engine.capacity:
            raise InvalidRequestError(
                f"n: got {prompt.num_choices}, but at most {self._engine.capacity} choices can be "
                "generated and queued at a time",
                "n",
            )
        return Stream(len(prompt.ids), self.generate(prompt))

    def generate(self, prompt: PreparedRequest) -> AsyncGenerator[OutputDelta, None]:
        """Yield the deltas of all choices as they are generated.

        A caller that closes the generator early frees the request's slots.

        Raises:
            BusyError: too many requests are waiting.
            EngineError: the engine has failed.
        """
        return self._one(prompt, 0) if prompt.num_choices == 1 else self._many(prompt)

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

        tasks = [asyncio.create_task(run(index)) for index in range(prompt.num_choices)]
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
        generation = prompt.generation
        if index and generation.sampling.seed is not None:
            seed = generation.sampling.seed + index
            generation = replace(generation, sampling=replace(generation.sampling, seed=seed))
        decoder = CompletionDecoder(
            self._served.tokenizer, prompt.stops, must_call=prompt.must_call
        )
        async with aclosing(self._engine.generate(generation)) as steps:
            async for step in steps:
                is_end = step.finish_reason == "stop"
                token = None if is_end else step.sampled.token
                text, calls = decoder.push(token, is_last=step.finish_reason is not None)
                finish = (
                    decoder.finish_reason if is_end or decoder.is_stopped else step.finish_reason
                )
                tokens = self._tokens(step.sampled) if not is_end else ()
                yield OutputDelta(index, text, 1, tokens, finish, calls)
                if decoder.is_stopped:
                    return

    def _tokens(self, choice: SampledToken) -> tuple[OutputToken, ...]:
        if choice.logprob is None:
            return ()
        likeliest = tuple((self.token_text(token), value) for token, value in choice.top_logprobs)
        return (OutputToken(self.token_text(choice.token), choice.logprob, likeliest),)

    def token_text(self, token: int) -> str:
        """Return the text of a token decoded alone, control tokens included."""
        text = self._served.tokenizer.decode([token], skip_special_tokens=False)
        assert isinstance(text, str)
        return text


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
