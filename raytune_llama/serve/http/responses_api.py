"""Route `POST /v1/responses`: OpenAI's Responses API, served by the same chat requests.

    add_responses(app, open_stream, policy)

Responses are not stored: the other routes of that API answer 404.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from raytune_llama.chat.tools import ToolCallChunk
from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.http.description import (
    MODEL_ERROR_STATUSES,
    STREAM,
    describe_error_responses,
)
from raytune_llama.serve.http.refusals import build_api_error
from raytune_llama.serve.http.request_guard import FieldPolicy
from raytune_llama.serve.http.responses import ChatResponseBuilder, TokenCounts
from raytune_llama.serve.http.stream import EventStream, ObservedStream, RequestTimeoutError
from raytune_llama.serve.protocol.chat import ChatChunk, ChatRequest, ContentLogprob
from raytune_llama.serve.protocol.fields import RequestModel
from raytune_llama.serve.protocol.response_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ErrorDetails,
    ErrorEvent,
    Event,
    IncompleteDetails,
    ItemEvent,
    ItemEventType,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    PartEvent,
    PartEventType,
    ResponseError,
    ResponseEvent,
    ResponseEventType,
    ResponseObject,
    ResponseStatus,
    ResponseUsage,
    TextDelta,
    TextDone,
)
from raytune_llama.serve.protocol.responses_api import FunctionTool, ResponsesRequest

OpenStream = Callable[[ChatRequest], Coroutine[Any, Any, ObservedStream[OutputDelta]]]
"""Sends a chat request to its model."""


def add_responses(app: FastAPI, open_stream: OpenStream, policy: FieldPolicy) -> None:
    """Register the routes.

    Args:
        app: application to extend.
        open_stream: sends a chat request to its model.
        policy: what is done about unknown fields.
    """

    @app.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses=STREAM | describe_error_responses(*MODEL_ERROR_STATUSES),
    )
    async def respond(request: ResponsesRequest) -> Response:
        """Create a model response for a text or a list of input items."""
        policy.check(request)
        chat = _to_chat(request)
        stream = await _open(request, chat, open_stream)
        events = ResponseEvents(request, chat, stream.num_prompt_tokens)
        if not request.stream:
            async with stream:
                async for delta in stream:
                    events.add(delta)
            events.end()
            return Response(events.response.model_dump_json(), media_type="application/json")
        first = await stream.read_first()
        return EventStream(_encode_events(first, stream, events), stream)

    @app.api_route(
        "/v1/responses/{path:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False
    )
    async def find_stored() -> Response:
        """Respond to requests for stored responses."""
        raise build_api_error(
            404,
            "Responses are not stored here. Only POST /v1/responses is available; send the whole "
            "conversation as input.",
        )


def _to_chat(request: ResponsesRequest) -> ChatRequest:
    """Return the chat request.

    Raises:
        RequestValidationError: it is invalid; the error has the places of the request itself.
    """
    try:
        return request.to_chat()
    except ValidationError as error:
        problems = [
            {
                **problem,
                "loc": tuple(request.rename_places(".".join(map(str, problem["loc"]))).split(".")),
            }
            for problem in error.errors()
        ]
        raise RequestValidationError(problems) from error


async def _open(
    request: ResponsesRequest, chat: ChatRequest, open_stream: OpenStream
) -> ObservedStream[OutputDelta]:
    """Open the model's stream; its errors have the places of the request itself."""
    try:
        return await open_stream(chat)
    except InvalidRequestError as error:
        error.message = request.rename_places(error.message)
        error.param = request.rename_places(error.param) if error.param else None
        raise


async def _encode_events(
    first: OutputDelta, stream: ObservedStream[OutputDelta], events: "ResponseEvents"
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events; unlike chat's stream, it ends without `[DONE]`."""
    for event in (*events.begin(), *events.add(first)):
        yield _encode(event)
    try:
        async for delta in stream:
            for event in events.add(delta):
                yield _encode(event)
    except (RequestTimeoutError, BusyError, EngineError) as error:
        # The status has already been sent.
        last = events.fail(str(error))
    else:
        last = events.end()
    for event in last:
        yield _encode(event)


def _encode(event: Event) -> bytes:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()


class ResponseEvents:
    """Builds a response and the events of its stream from a model's deltas.

    events = ResponseEvents(request, chat, num_input_tokens)
    events.begin()            # each returns the next events
    events.add(delta)
    events.end()
    events.response           # the complete response
    """

    def __init__(self, request: ResponsesRequest, chat: ChatRequest, num_input_tokens: int) -> None:
        """Start a response.

        Args:
            request: request to respond to.
            chat: chat request that generates the response.
            num_input_tokens: number of tokens of the prompt.
        """
        self._logprobs = ChatResponseBuilder(chat) if chat.logprobs else None
        self._counts = TokenCounts(prompt=num_input_tokens)
        self._is_cut = False
        self._output: list[OutputItem] = []
        # Log probabilities of tokens whose text is held back, or that may become a call.
        self._held: list[ContentLogprob] = []
        self._num_events = 0
        self.response = _begin_response(request)
        """The response as far as its last event shows it."""

    def begin(self) -> Sequence[Event]:
        """Return the events before the first delta."""
        return [self._show("response.created"), self._show("response.in_progress")]

    def add(self, delta: OutputDelta) -> Sequence[Event]:
        """Return the events of a delta; none if it changes nothing for the client."""
        self._counts.completion += delta.num_tokens
        self._is_cut = self._is_cut or delta.finish_reason == "length"
        if self._logprobs is not None and not self._has_calls:
            self._held += _read_logprobs(self._logprobs, delta)
        events: list[Event] = []
        if delta.text:
            events += self._add_text(delta.text)
        for chunk in delta.calls:
            events += self._add_call(chunk)
        return events

    def end(self) -> Sequence[Event]:
        """Return the events after the last delta."""
        events: list[Event] = []
        if self._held:
            events += self._add_text("")
        if not self._output:
            events += self._open_message()
        if self._is_cut:
            events += self._close("incomplete")
            self._end_response("incomplete", incomplete_details=IncompleteDetails())
            return [*events, self._show("response.incomplete")]
        events += self._close("completed")
        self._end_response("completed", completed_at=int(time.time()))
        return [*events, self._show("response.completed")]

    def fail(self, message: str) -> Sequence[Event]:
        """Return the last events of a response that has failed."""
        if self._output:
            self._output[-1].status = "incomplete"
        self._end_response("failed", error=ResponseError(message=message))
        details = ErrorDetails(message=message)
        error = ErrorEvent(sequence_number=self._count(), message=message, error=details)
        return [error, self._show("response.failed")]

    def _add_text(self, text: str) -> Sequence[Event]:
        opening = [] if self._output else self._open_message()
        message = self._output[-1]
        assert isinstance(message, OutputMessage), "calls come after all text"
        logprobs, self._held = self._held, []
        message.content[0].text += text
        message.content[0].logprobs += logprobs
        delta = TextDelta(
            sequence_number=self._count(),
            item_id=message.id,
            output_index=self._index,
            delta=text,
            logprobs=logprobs,
        )
        return [*opening, delta]

    def _add_call(self, chunk: ToolCallChunk) -> Sequence[Event]:
        events: list[Event] = []
        # Log probabilities belong to text.
        self._held.clear()
        if chunk.id is not None and chunk.name is not None:
            events += self._close("completed")
            call_id = f"fc_{uuid.uuid4().hex}"
            self._output.append(
                OutputCall(id=call_id, status="in_progress", call_id=chunk.id, name=chunk.name)
            )
            events.append(self._show_item("response.output_item.added"))
        call = self._output[-1]
        assert isinstance(call, OutputCall), "the first chunk of a call names it"
        if chunk.arguments:
            call.arguments += chunk.arguments
            events.append(
                ArgumentsDelta(
                    sequence_number=self._count(),
                    item_id=call.id,
                    output_index=self._index,
                    delta=chunk.arguments,
                )
            )
        return events

    def _open_message(self) -> Sequence[Event]:
        message = OutputMessage(id=f"msg_{uuid.uuid4().hex}", status="in_progress", content=[])
        self._output.append(message)
        added = self._show_item("response.output_item.added")
        message.content.append(OutputText())
        return [added, self._show_part("response.content_part.added", message)]

    def _close(self, status: ItemStatus) -> Sequence[Event]:
        """Return the events of the last item's end, if there is one."""
        if not self._output:
            return []
        item = self._output[-1]
        item.status = status
        events: list[Event] = []
        if isinstance(item, OutputMessage):
            text = TextDone(
                sequence_number=self._count(),
                item_id=item.id,
                output_index=self._index,
                text=item.content[0].text,
                logprobs=item.content[0].logprobs,
            )
            events += [text, self._show_part("response.content_part.done", item)]
        else:
            arguments = ArgumentsDone(
                sequence_number=self._count(),
                item_id=item.id,
                output_index=self._index,
                name=item.name,
                arguments=item.arguments,
            )
            events.append(arguments)
        return [*events, self._show_item("response.output_item.done")]

    @property
    def _has_calls(self) -> bool:
        return bool(self._output) and isinstance(self._output[-1], OutputCall)

    @property
    def _index(self) -> int:
        """Index of the last item."""
        return len(self._output) - 1

    def _count(self) -> int:
        """Return the number of the next event."""
        self._num_events += 1
        return self._num_events - 1

    def _end_response(self, status: ResponseStatus, **fields: object) -> None:
        usage = self._counts.usage
        fields["usage"] = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        fields |= {"status": status, "output": self._output}
        self.response = self.response.model_copy(update=fields)

    def _show(self, kind: ResponseEventType) -> ResponseEvent:
        return ResponseEvent(type=kind, sequence_number=self._count(), response=self.response)

    def _show_item(self, kind: ItemEventType) -> ItemEvent:
        """Return an event with the last item as it is now."""
        item = self._output[-1].model_copy(deep=True)
        number = self._count()
        return ItemEvent(type=kind, sequence_number=number, output_index=self._index, item=item)

    def _show_part(self, kind: PartEventType, message: OutputMessage) -> PartEvent:
        return PartEvent(
            type=kind,
            sequence_number=self._count(),
            item_id=message.id,
            output_index=self._index,
            part=message.content[0].model_copy(deep=True),
        )


def _begin_response(request: ResponsesRequest) -> ResponseObject:
    """Return the response before its first event, with the fields of its request."""
    choice = request.tool_choice or "auto"
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata,
        model=request.model,
        output=[],
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning={"effort": request.reasoning.effort, "summary": None},
        temperature=request.temperature,
        text={"format": _known_fields(request.text.format), "verbosity": "medium"},
        tool_choice=choice if isinstance(choice, str) else _known_fields(choice),
        tools=[_describe_tool(tool) for tool in request.tools],
        top_logprobs=request.top_logprobs,
        top_p=request.top_p,
    )


def _known_fields(model: RequestModel) -> dict[str, Any]:
    names = {*type(model).model_fields}
    return model.model_dump(by_alias=True, exclude_none=True, include=names)


def _describe_tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": tool.type,
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        # The schema is always enforced.
        "strict": True if tool.strict is None else tool.strict,
    }


def _read_logprobs(builder: ChatResponseBuilder, delta: OutputDelta) -> Sequence[ContentLogprob]:
    chunk = builder.build_chunk(delta)
    assert isinstance(chunk, ChatChunk)
    logprobs = chunk.choices[0].logprobs
    return [] if logprobs is None else logprobs.content
