"""Prompts with turns in any order have every content, in order, or are refused with a reason."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.config import ChatConfig, TemplateName
from raytune_llama.chat.conversations import Conversation, Role, Turn
from raytune_llama.chat.encoding import ChatEncoder, EncodedConversation, build_chat_encoder
from raytune_llama.config.errors import UserError
from tests.chat.conftest import CHATML, CONTENTS, LLAMA2_OWN, talk

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])

PLAIN: tuple[TemplateName, ...] = ("alpaca", "alpaca_inference", "belle", "llama2")

ALTERNATING = (
    "{% set start = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set start = '(' + messages[0].content + ')\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('users and assistants have to take turns') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[' + (start if loop.first else '') + m.content + ']' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""Writes the system message into the first question, and needs turns that alternate."""

STRIPPING = ALTERNATING.replace(
    "(start if loop.first else '') + m.content",
    "((start if loop.first else '') + m.content).strip()",
)
"""Also strips its questions, so that an empty one after a system message is changed."""

NO_SYSTEM = ALTERNATING.replace(
    "{% set start = '(' + messages[0].content + ')\n' %}", "{{ raise_exception('no system') }}"
)
"""Has no system messages, and needs turns that alternate."""

NO_EMPTY = NO_SYSTEM.replace(
    "{% if m.role == 'user' %}",
    "{% if not m.content %}{{ raise_exception('a message is empty') }}{% endif %}"
    "{% if m.role == 'user' %}",
)
"""Does not render an empty turn either."""

SWITCH = CHATML.replace(
    "{{ '<s>assistant\n' }}",
    "{{ '<s>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
"""Has a variable that changes its generation prompt, as Qwen 3's template does."""


def with_template(tokenizer: PreTrainedTokenizerFast, text: str) -> ChatEncoder:
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    return build_chat_encoder(other, ChatConfig())


def with_any(tokenizer: PreTrainedTokenizerFast, name: str) -> ChatEncoder:
    """The encoder of a plain template, by its name, or of a Jinja template, by its text."""
    for plain in PLAIN:
        if name == plain:
            return build_chat_encoder(tokenizer, ChatConfig(template=plain))
    return with_template(tokenizer, name)


def conversation_of(*messages: tuple[Role, str]) -> Conversation:
    """The conversation of messages, as requests are read."""
    system = messages[0][1] if messages[0][0] == "system" else None
    first = int(system is not None)
    turns = tuple(Turn(role, content) for role, content in messages[first:])
    return Conversation(turns, system, places=tuple(range(first, len(messages))))


def said(text: str) -> Conversation:
    """The conversation of a text such as `s:A u:B a:C`."""
    roles: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
    messages: list[tuple[Role, str]] = [(roles[part[0]], part[2:]) for part in text.split()]
    return conversation_of(*messages)


ROLES: st.SearchStrategy[Role] = st.sampled_from(["system", "user", "assistant"])


def _number(listed: list[tuple[Role, bool, str]]) -> list[tuple[Role, str]]:
    """Messages whose contents differ by a number; some are empty."""
    return [
        (role, "" if is_empty else f"#{number}{content}")
        for number, (role, is_empty, content) in enumerate(listed)
    ]


MESSAGES = st.lists(st.tuples(ROLES, st.booleans(), CONTENTS), min_size=1, max_size=7).map(_number)
"""Messages of all roles in any order."""


def check_contents(text: str, messages: list[tuple[Role, str]]) -> None:
    """Check that a prompt has the contents of all messages in order; ends may be stripped."""
    place = 0
    for _, content in messages:
        found = text.find(content.strip(), place)
        assert found >= 0, (content, text)
        place = found + len(content.strip())


@pytest.mark.parametrize("template", [*PLAIN, CHATML, ALTERNATING, NO_SYSTEM])
@given(messages=MESSAGES)
@FEW
def test_messages_in_any_order_are_rendered_with_all_contents_in_order(
    byte_level: PreTrainedTokenizerFast, template: str, messages: list[tuple[Role, str]]
) -> None:
    encoder = with_any(byte_level, template)
    ids = encoder.encode_prompt(conversation_of(*messages))
    text = str(byte_level.decode(ids))
    check_contents(text, messages)
    if messages[-1][0] == "assistant":
        assert text.endswith(messages[-1][1])


@pytest.mark.parametrize("template", [STRIPPING, NO_EMPTY, LLAMA2_OWN])
@given(messages=MESSAGES)
@FEW
def test_messages_that_a_template_refuses_in_every_form_are_refused_with_its_reason(
    byte_level: PreTrainedTokenizerFast, template: str, messages: list[tuple[Role, str]]
) -> None:
    encoder = with_any(byte_level, template)
    problem = ""
    try:
        ids = encoder.encode_prompt(conversation_of(*messages))
        check_contents(str(byte_level.decode(ids)), messages)
    except UserError as error:
        problem = str(error)
    # Only an empty turn, or one that is stripped, is left to refuse.
    reasons = {STRIPPING: "changes contents", NO_EMPTY: "fails: a message is empty"}
    assert not problem or f"messages: the chat template {reasons[template]}" in problem


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("s:A s:B u:C", "<s>[(A\n\nB)\nC]"),
        ("u:A u:B", "<s>[A\n\nB]"),
        ("u:A a:B s:C u:D", "<s>[A] B</s><s>[C\n\nD]"),
        ("u:A a:B s:C", "<s>[A] B</s><s>[C]"),
        ("u:A s:B a:C u:D", "<s>[A\n\nB] C</s><s>[D]"),
        ("u:A a:B a:C u:D", "<s>[A] B\n\nC</s><s>[D]"),
        ("a:A u:B", "<s>[] A</s><s>[B]"),
        ("s:A a:B u:C", "<s>[(A)\n] B</s><s>[C]"),
        ("s:A", "<s>[(A)\n]"),
        ("u:A a:B", "<s>[A] B"),
        ("a:A", "<s>[] A"),
        ("u:A a:B u:C a:D a:E", "<s>[A] B</s><s>[C] D\n\nE"),
    ],
)
def test_what_a_template_cannot_express_is_joined(
    byte_level: PreTrainedTokenizerFast, messages: str, text: str
) -> None:
    encoder = with_template(byte_level, ALTERNATING)
    assert byte_level.decode(encoder.encode_prompt(said(messages))) == text


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("s:A u:B", "<s>[A\n\nB]"),
        ("s:A s:B u:C", "<s>[A\n\nB\n\nC]"),
        ("s:A a:B u:C", "<s>[A] B</s><s>[C]"),
        ("s:A", "<s>[A]"),
        ("s:A u:B a:C s:D u:E", "<s>[A\n\nB] C</s><s>[D\n\nE]"),
    ],
)
def test_system_message_begins_the_first_question_where_a_template_has_none(
    byte_level: PreTrainedTokenizerFast, messages: str, text: str
) -> None:
    encoder = with_template(byte_level, NO_SYSTEM)
    assert byte_level.decode(encoder.encode_prompt(said(messages))) == text


def test_tools_follow_the_system_message_in_the_first_question(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    encoder = with_template(byte_level, NO_SYSTEM)
    told = Conversation((Turn("user", "B"),), "A", tools=("{}",))
    text = str(byte_level.decode(encoder.encode_prompt(told)))
    assert text.startswith("<s>[A\n\n# Tools\n\n")
    assert text.endswith("</tool_call>\n\nB]")


def test_system_message_is_a_question_where_an_empty_one_after_it_is_changed(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    encoder = with_template(byte_level, STRIPPING)
    ids = encoder.encode_prompt(said("s:A a:B u:C"))
    assert byte_level.decode(ids) == "<s>[A] B</s><s>[C]"


def test_roles_stay_as_they_are_where_the_template_renders_them(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    encoder = with_template(byte_level, CHATML)
    ids = encoder.encode_prompt(said("s:A s:B a:C u:D u:E s:F"))
    roles = ("system\nA", "system\nB", "assistant\nC", "user\nD", "user\nE", "system\nF")
    text = "".join(f"<s>{message}<|im_end|>\n" for message in roles)
    assert byte_level.decode(ids) == text + "<s>assistant\n"


def test_system_message_stays_one_where_only_turns_of_one_speaker_have_to_be_joined(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    apart = CHATML.replace(
        "in messages %}",
        "in messages %}{% if not loop.first and message.role == loop.previtem.role %}"
        "{{ raise_exception('twice') }}{% endif %}",
    )
    encoder = with_template(byte_level, apart)
    ids = encoder.encode_prompt(said("s:A s:B u:C s:D s:E u:F u:G"))
    roles = ("system\nA\n\nB", "user\nC", "system\nD\n\nE", "user\nF\n\nG")
    text = "".join(f"<s>{message}<|im_end|>\n" for message in roles)
    assert byte_level.decode(ids) == text + "<s>assistant\n"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("s:A u:B", "Human: \nA\n\nB\n\nAssistant: \n"),
        ("u:A u:B a:C", "Human: \nA\n\nB\n\nAssistant: \nC"),
        ("a:A u:B", "Human: \n\n\nAssistant: \nA</s>Human: \nB\n\nAssistant: \n"),
    ],
)
def test_plain_template_gets_turns_that_alternate(
    byte_level: PreTrainedTokenizerFast, messages: str, text: str
) -> None:
    encoder = with_any(byte_level, "belle")
    assert byte_level.decode(encoder.encode_prompt(said(messages))) == text


@pytest.mark.parametrize(
    ("template", "conversation", "problem"),
    [
        (NO_EMPTY, said("a:A u:B"), "^messages: the chat template fails: a message is empty"),
        (CHATML, Conversation(()), "^messages: empty_conversation"),
        (CHATML, talk("q\ud83d"), r"^messages: lone_surrogate: messages\.0"),
        ("belle", talk("q", "a\0", system="s"), r"^messages: nul: messages\.2"),
        (
            CHATML,
            Conversation((Turn("user", "q", reasoning="hm"),)),
            r"messages\.0: reasoning in a turn of the user",
        ),
    ],
)
def test_conversation_that_cannot_be_rendered_is_refused(
    byte_level: PreTrainedTokenizerFast, template: str, conversation: Conversation, problem: str
) -> None:
    encoder = with_any(byte_level, template)
    with pytest.raises(UserError, match=problem):
        encoder.encode_prompt(conversation)


def test_message_that_a_template_drops_is_named_as_the_request_counts_it(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    short = CHATML.replace("in messages %}", "in messages[:5] %}")
    encoder = with_template(byte_level, short)
    with pytest.raises(UserError, match=r"assistant content of messages\.5 0 times"):
        encoder.encode_prompt(said("u:A a:B u:C a:D u:E a:F u:G"))
    with pytest.raises(UserError, match=r"user content of messages\.7 0 times"):
        encoder.encode_prompt(said("s:A s:B u:C a:D u:E u:F a:G u:H"))


WORDS = st.lists(st.sampled_from(["fox", "the", "dog", "1", "."]), min_size=2, max_size=8)


@pytest.mark.parametrize("template", [*PLAIN, CHATML, ALTERNATING, LLAMA2_OWN])
@pytest.mark.parametrize("tokenizer", ["byte_level", "llama"])
@given(words=WORDS, num_kept=st.integers(1, 7))
@FEW
def test_answer_to_continue_is_the_beginning_of_what_is_trained(
    request: pytest.FixtureRequest, template: str, tokenizer: str, words: list[str], num_kept: int
) -> None:
    used: PreTrainedTokenizerFast = request.getfixturevalue(tokenizer)
    if tokenizer == "llama":
        template = template.replace("<|im_end|>", "</s>")
    encoder = with_any(used, template)
    before = ["the fox?", "a dog."] * (len(words) % 3)
    # Words are separate tokens, so that no token spans the end of the prompt.
    kept = " ".join(words[: min(num_kept, len(words) - 1)])
    (row,) = encoder.encode([talk(*before, "q", " ".join(words))])
    assert isinstance(row, EncodedConversation)
    prompt = encoder.encode_prompt(talk(*before, "q", kept))
    assert prompt.tolist() == row.ids[: len(prompt)].tolist()
    assert str(used.decode(prompt)).endswith(kept)
    question = encoder.encode_prompt(talk(*before, "q"))
    assert len(question) < len(prompt)
    assert question.tolist() == prompt[: len(question)].tolist()


@pytest.mark.parametrize("template", ["belle", CHATML, LLAMA2_OWN])
def test_answer_to_continue_keeps_the_white_space_at_its_end(
    byte_level: PreTrainedTokenizerFast, template: str
) -> None:
    encoder = with_any(byte_level, template)
    ids = encoder.encode_prompt(talk("q", "Sure:\n\n"))
    assert str(byte_level.decode(ids)).endswith("Sure:\n\n")


def test_options_set_variables_of_the_template(byte_level: PreTrainedTokenizerFast) -> None:
    encoder = with_template(byte_level, SWITCH)
    assert encoder.template.variables == {"enable_thinking"}
    for conversation in (talk("q"), talk("q", "a", "r"), talk("q", "a", "r", "b", "c")):
        plain = encoder.encode_prompt(conversation).tolist()
        without = str(
            byte_level.decode(encoder.encode_prompt(conversation, {"enable_thinking": False}))
        )
        assert without == str(byte_level.decode(plain)) + "<think>\n\n</think>\n\n"
        # Options of one request don't change another's prompt.
        assert encoder.encode_prompt(conversation).tolist() == plain
        assert encoder.encode_prompt(conversation, {"enable_thinking": True}).tolist() == plain


COUNT = "{{ 7 // budget if budget is defined else '' }}"


@pytest.mark.parametrize(
    ("template", "options", "problem"),
    [
        (SWITCH, {"thinking": 1}, "'thinking' is no variable .* it has enable_thinking$"),
        (SWITCH, {"messages": []}, "'messages' is no variable"),
        (CHATML, {"thinking": 1}, "'thinking' is no variable .* it has none"),
        ("alpaca", {"thinking": 1}, "'thinking' is no variable .* it has none"),
        (
            SWITCH,
            {"enable_thinking": ["a", {"b</s>": 1}]},
            "enable_thinking: has the control token",
        ),
        (SWITCH, {"enable_thinking": {"a": "\ud83d"}}, "enable_thinking: lone surrogate"),
        (CHATML + COUNT, {"budget": 0}, "^messages: the chat template fails: .*zero"),
        (CHATML + COUNT, {"budget": "a"}, "^messages: the chat template fails"),
    ],
)
def test_option_that_cannot_be_used_is_refused(
    byte_level: PreTrainedTokenizerFast, template: str, options: dict[str, object], problem: str
) -> None:
    encoder = with_any(byte_level, template)
    with pytest.raises(UserError, match=problem):
        encoder.encode_prompt(talk("q"), options)
