"""The events of `/v1/responses` for any deltas, checked with the types of OpenAI's client."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import openai.types.responses
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from raytune_llama.chat.tools import ToolCallChunk
from raytune_llama.serve.generation.output import OutputDelta, OutputToken
from raytune_llama.serve.http.responses_api import ResponseEvents
from raytune_llama.serve.protocol.chat import FinishReason
from raytune_llama.serve.protocol.response_events import TextDelta
from raytune_llama.serve.protocol.responses_api import LOGPROBS, ResponsesRequest

EVENTS: TypeAdapter[Any] = TypeAdapter(openai.types.responses.ResponseStreamEvent)

Call = tuple[str, list[str]]


def join(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Return several deltas as one."""
    calls = tuple(chunk for delta in deltas for chunk in delta.calls)
    text = "".join(delta.text for delta in deltas)
    return OutputDelta(0, text, len(deltas), finish_reason=deltas[-1].finish_reason, calls=calls)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[str], list[Call], list[OutputDelta]]:
    """Draw the pieces of an answer's text, its calls with pieces of arguments, and its deltas."""
    pieces = draw(st.lists(st.text(max_size=3), max_size=5))
    names = st.sampled_from(["now", "weather"])
    calls = draw(st.lists(st.tuples(names, st.lists(st.text(max_size=3), max_size=4)), max_size=3))
    deltas = [OutputDelta(0, piece, 1) for piece in pieces]
    for number, (name, arguments) in enumerate(calls):
        chunks = [ToolCallChunk(number, id=f"call_{number}", name=name)]
        chunks += [ToolCallChunk(number, piece) for piece in arguments]
        deltas += [OutputDelta(0, "", 1, calls=(chunk,)) for chunk in chunks]
    finish: FinishReason = "tool_calls" if calls else "stop"
    finish = "length" if draw(st.booleans()) else finish
    deltas.append(OutputDelta(0, "", 1, finish_reason=finish))
    cuts = sorted(draw(st.sets(st.integers(1, len(deltas)), max_size=len(deltas))) | {len(deltas)})
    groups = [deltas[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
    return pieces, calls, [join(group) for group in groups]


def kinds_of(pieces: list[str], calls: list[Call], end: str) -> list[str]:
    """Return the types of the events, of consecutive deltas one."""
    kinds = ["created", "in_progress"]
    text = "".join(pieces)
    if text or not calls:
        kinds += ["output_item.added", "content_part.added", *(["output_text.delta"] * bool(text))]
        kinds += ["output_text.done", "content_part.done", "output_item.done"]
    for _, arguments in calls:
        kinds += ["output_item.added"]
        kinds += ["function_call_arguments.delta"] * any(arguments)
        kinds += ["function_call_arguments.done", "output_item.done"]
    return [f"response.{kind}" for kind in [*kinds, end]]


@given(answers())
def test_events_are_in_order_and_add_up_to_the_response(
    answer: tuple[list[str], list[Call], list[OutputDelta]],
) -> None:
    pieces, calls, deltas = answer
    request = ResponsesRequest(model="tiny", input="the fox")  # pyright: ignore[reportArgumentType]
    events = ResponseEvents(request, request.to_chat(), 3)
    told = [*events.begin()]
    for delta in deltas:
        told += events.add(delta)
    told += events.end()
    parsed = [EVENTS.validate_python(json.loads(event.model_dump_json())) for event in told]
    assert [event.sequence_number for event in parsed] == list(range(len(parsed)))
    end = "incomplete" if deltas[-1].finish_reason == "length" else "completed"
    found = [kind for kind, _ in itertools.groupby(event.type for event in parsed)]
    assert found == kinds_of(pieces, calls, end)

    response = parsed[-1].response
    assert (response.status, response.output_text) == (end, "".join(pieces))
    found_calls = [item for item in response.output if item.type == "function_call"]
    assert [(one.name, one.arguments) for one in found_calls] == [
        (name, "".join(arguments)) for name, arguments in calls
    ]
    assert [one.call_id for one in found_calls] == [f"call_{n}" for n in range(len(calls))]
    statuses = [item.status for item in response.output]
    assert statuses == ["completed"] * (len(statuses) - 1) + [end]
    assert response.usage.output_tokens == sum(delta.num_tokens for delta in deltas)
    check_items(parsed, response)


def tell(deltas: Sequence[OutputDelta]) -> tuple[list[Any], Any]:
    """Return the logprobs of each text delta, and the items, of a request that wants them."""
    fields: dict[str, Any] = {"model": "tiny", "input": "the fox", "include": [LOGPROBS]}
    request = ResponsesRequest.model_validate(fields)
    events = ResponseEvents(request, request.to_chat(), 3)
    told = [event for delta in deltas for event in events.add(delta)]
    told += events.end()
    logprobs = [
        [(one.token, one.logprob) for one in event.logprobs]
        for event in told
        if isinstance(event, TextDelta)
    ]
    return logprobs, events.response.output


def test_logprobs_come_with_the_text_of_their_tokens() -> None:
    tokens = [(OutputToken(text.encode(), -number),) for number, text in enumerate("abcdef")]
    held = [OutputDelta(0, "", 1, tokens[0]), OutputDelta(0, "ab", 1, tokens[1])]
    calls = [
        # The text of a call is no text.
        OutputDelta(0, "", 1, tokens[2]),
        OutputDelta(0, "", 1, tokens[3], calls=(ToolCallChunk(0, id="1", name="now"),)),
        OutputDelta(0, "", 1, tokens[4], calls=(ToolCallChunk(0, "{}"),)),
        OutputDelta(0, "", 1, tokens[5], "tool_calls"),
    ]
    wanted = [("a", 0.0), ("b", -1.0)]
    logprobs, (message, call) = tell([*held, *calls])
    assert logprobs == [wanted]
    assert [(one.token, one.logprob) for one in message.content[0].logprobs] == wanted
    assert (message.status, call.arguments) == ("completed", "{}")
    # Text that is held back until the end may be incomplete, and is dropped.
    logprobs, (message,) = tell([*held, OutputDelta(0, "", 1, tokens[2], "stop")])
    assert logprobs == [wanted, [("c", -2.0)]]
    assert len(message.content[0].logprobs) == 3


def check_items(events: Sequence[Any], response: Any) -> None:  # noqa: ANN401
    """Check that the events of each item agree with the item of the response."""
    for index, item in enumerate(response.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        assert all(event.item_id == item.id for event in mine if hasattr(event, "item_id"))
        added, done = mine[0].item, mine[-1].item
        assert (added.id, added.status) == (item.id, "in_progress")
        assert done == item
        deltas = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        if item.type == "message":
            assert added.content == []
            assert deltas == item.content[0].text
            texts = [event.text for event in mine if event.type.endswith("text.done")]
            assert texts == [deltas]
            parts = [event.part.text for event in mine if hasattr(event, "part")]
            assert parts == ["", deltas]
        else:
            assert added.arguments == ""
            assert deltas == item.arguments
            finished = [event.arguments for event in mine if event.type.endswith("arguments.done")]
            assert finished == [deltas]
