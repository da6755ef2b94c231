"""A tokenizer's own chat template gives the ids of transformers, or is refused."""

import copy
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from transformers import BatchEncoding, PreTrainedTokenizerFast

from raytune_llama.chat.config import ChatConfig, TemplateName
from raytune_llama.chat.conversations import Conversation, Defect, Turn
from raytune_llama.chat.encoding import ChatEncoder, EncodedConversation, build_chat_encoder
from raytune_llama.chat.templates.choice import build_template, check_roles
from raytune_llama.chat.templates.tokenizer import TokenizerTemplate
from raytune_llama.tokenizer.loader import control_token_strings, load_tokenizer
from tests.chat.conftest import ANSWERS, CHATML, CONVERSATIONS, LLAMA2_OWN, talk

DEMO = Path("demo/model")

THINKING = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerFast, text: str) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    return other


def encode(encoder: ChatEncoder, conversation: Conversation) -> EncodedConversation:
    (row,) = encoder.encode([conversation])
    assert isinstance(row, EncodedConversation)
    return row


def ids_of_transformers(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation
) -> list[int]:
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    if conversation.system is not None:
        messages.insert(0, {"role": "system", "content": conversation.system})
    last = conversation.turns[-1].role == "user"
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=last)
    assert isinstance(encoded, BatchEncoding)
    ids = encoded["input_ids"]
    assert isinstance(ids, list)
    return ids


def has_control(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> bool:
    texts = [turn.content for turn in conversation.turns]
    return any(spelled in text for spelled in control_token_strings(tokenizer) for text in texts)


SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<s>system\nYou are the fox<|im_end|>\n' }}{% endif %}"
    "{{'<s>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_end|>{{ m.role }}\n\n{{ m.content | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|>assistant\n\n{% endif %}"
)


@pytest.mark.parametrize("text", [CHATML, SMOL, LLAMA3, LLAMA2_OWN])
@given(conversation=CONVERSATIONS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_ids_are_those_of_transformers(
    byte_level: PreTrainedTokenizerFast, text: str, conversation: Conversation
) -> None:
    tokenizer = with_template(byte_level, text)
    encoder = build_chat_encoder(tokenizer, ChatConfig())
    row = encode(encoder, conversation)
    prompt = Conversation(conversation.turns[:-1])
    if has_control(tokenizer, conversation):
        return
    # An answer that begins with white space may not share a token with its prompt.
    if not row.num_splits:
        assert row.ids.tolist() == ids_of_transformers(tokenizer, conversation)
        assert encoder.encode_prompt(prompt).tolist() == ids_of_transformers(tokenizer, prompt)
    assert tokenizer.decode(row.ids) == tokenizer.decode(
        ids_of_transformers(tokenizer, conversation)
    )


@pytest.mark.parametrize("text", [LLAMA2_OWN, CHATML.replace("<|im_end|>", "</s>")])
@given(conversation=CONVERSATIONS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_ids_of_pieces_are_those_of_transformers(
    llama: PreTrainedTokenizerFast, text: str, conversation: Conversation
) -> None:
    tokenizer = with_template(llama, text)
    row = encode(build_chat_encoder(tokenizer, ChatConfig()), conversation)
    if not has_control(tokenizer, conversation) and not row.num_splits:
        assert row.ids.tolist() == ids_of_transformers(tokenizer, conversation)


def test_target_is_all_that_follows_the_prompt_for_generation(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    own = with_template(byte_level, LLAMA2_OWN)
    row = encode(build_chat_encoder(own, ChatConfig()), talk(" fox", "dog\n", "q", "a"))
    assert own.decode(row.ids) == "<s>[INST] fox [/INST] dog </s><s>[INST] q [/INST] a </s>"
    assert own.decode(row.ids[row.targets]) == " dog </s> a </s>"
    thinking = with_template(byte_level, THINKING)
    row = encode(build_chat_encoder(thinking, ChatConfig()), talk("q", "a", "r", "b"))
    assert thinking.decode(row.ids[row.targets]) == (
        "a<|im_end|><think>\n\n</think>\n\nb<|im_end|>"
    )


def test_stop_ids_are_what_ends_answers(byte_level: PreTrainedTokenizerFast) -> None:
    end = byte_level.convert_tokens_to_ids("<|im_end|>")
    assert isinstance(end, int)
    assert build_template("tokenizer", byte_level).stop_ids == {end}
    assert end != byte_level.eos_token_id


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (THINKING, "x</think>y"),
        (CHATML.replace("message['content']", "message['content'] | replace('@', '#')"), "a@"),
    ],
)
def test_content_that_a_template_changes_is_dropped_with_a_reason(
    byte_level: PreTrainedTokenizerFast, text: str, answer: str
) -> None:
    encoder = build_chat_encoder(with_template(byte_level, text), ChatConfig())
    rows = encoder.encode([talk("q", answer), talk("q", "a")])
    assert isinstance(rows[0], Defect)
    assert rows[0].reason == "unrenderable"
    assert isinstance(rows[1], EncodedConversation)


def test_boundary_inside_a_token_is_counted_and_exact(byte_level: PreTrainedTokenizerFast) -> None:
    # In this tokenizer "the" is a token, so a header that ends with "t" shares one with "he".
    text = CHATML.replace("assistant\n", "t").replace("message['role'] + '\n'", "'t'")
    tokenizer = with_template(byte_level, text)
    encoder = build_chat_encoder(tokenizer, ChatConfig())
    conversation = talk("fox", "he dog")
    row = encode(encoder, conversation)
    assert row.num_splits == 1
    assert tokenizer.decode(row.ids[row.targets]) == "he dog<|im_end|>"
    prompt = encoder.encode_prompt(Conversation(conversation.turns[:1])).tolist()
    assert row.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for m in messages %}<s>{{ m.content }}\n{% endfor %}", "without a control token"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if not add_generation_prompt %}</s>{% endif %}",
            "without a control token",
        ),
        ("{{ messages[0].content }}</s>", "0 times"),
        ("{% for m in messages %}{{ m.content + m.content }}</s>{% endfor %}", "2 times"),
        ("{% for m in messages | reverse %}{{ m.content }}</s>{% endfor %}", "out of order"),
        (
            "{% for m in messages %}<s>{{ m.role }}{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>bot{% endif %}",
            "generation prompt",
        ),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "0 times"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ strftime_now('%d') }}{{ messages[0].content }}</s>", "date"),
    ],
)
def test_template_whose_contents_cannot_be_found_is_refused(
    byte_level: PreTrainedTokenizerFast, text: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=rf"^template: .*({problem})"):
        TokenizerTemplate(with_template(byte_level, text))


def test_template_that_changes_plain_contents_is_refused(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    text = CHATML.replace("message['content']", "message['content'] | replace('z', 'y')")
    with pytest.raises(ValueError, match=r"^template: .* changes contents"):
        build_chat_encoder(with_template(byte_level, text), ChatConfig())


def test_template_that_takes_a_date_always_writes_the_same(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{{ date_string }}"
    )
    encoder = build_chat_encoder(with_template(byte_level, dated + CHATML), ChatConfig())
    ids = encoder.encode_prompt(talk("q"))
    assert str(byte_level.decode(ids)).startswith("26 Jul 2024<s>user")


def test_tokenizer_without_template_is_refused(tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"^template: .* has no chat template"):
        build_chat_encoder(load_tokenizer(tokenizer_dir), ChatConfig())


def test_roles_are_found_by_trying(byte_level: PreTrainedTokenizerFast) -> None:
    without = build_template("tokenizer", with_template(byte_level, LLAMA2_OWN))
    assert (without.allows_system, without.needs_system) == (False, False)
    text = "{% if messages[0].role != 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
    needing = build_template("tokenizer", with_template(byte_level, text))
    assert (needing.allows_system, needing.needs_system) == (True, True)
    with pytest.raises(ValueError, match=r"^template: .* 4 of 5 conversations have none"):
        check_roles(needing, num_conversations=5, num_with_system=1)


def test_hash_is_of_the_templates_text(byte_level: PreTrainedTokenizerFast) -> None:
    first = build_template("tokenizer", byte_level).hash()
    assert build_template("tokenizer", with_template(byte_level, CHATML)).hash() == first
    assert build_template("tokenizer", with_template(byte_level, SMOL)).hash() != first


@pytest.mark.skipif(not DEMO.is_dir(), reason="make demo has not been run")
@given(conversation=CONVERSATIONS, system=ANSWERS)
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_smollm2_has_the_ids_of_transformers(conversation: Conversation, system: str) -> None:
    tokenizer = load_tokenizer(DEMO)
    encoder = build_chat_encoder(tokenizer, ChatConfig())
    for said in (conversation, Conversation(conversation.turns, system)):
        row = encode(encoder, said)
        texts = Conversation((*said.turns, *talk(system).turns))
        if not has_control(tokenizer, texts) and not row.num_splits:
            assert row.ids.tolist() == ids_of_transformers(tokenizer, said)


REASONING = (
    "{% set asked = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.index0 > asked.last %}"
    "<think>\n{{ m.reasoning_content.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Writes the last answer's reasoning and drops that of earlier turns, as Qwen 3's template does."""


def test_reasoning_is_learned_where_the_template_takes_it(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    tokenizer = with_template(byte_level, REASONING)
    encoder = build_chat_encoder(tokenizer, ChatConfig())
    answer = Turn("assistant", "\nb", reasoning="hm</s>\n")
    early = Turn("assistant", "a", reasoning="early")
    row = encode(encoder, Conversation((Turn("user", "q"), early, Turn("user", "r"), answer)))
    assert tokenizer.decode(row.ids[row.targets]) == (
        "a<|im_end|><think>\nhm</s>\n</think>\n\nb<|im_end|>"
    )
    (end,) = encoder.template.stop_ids
    assert int((row.ids == tokenizer.eos_token_id).sum()) == 0
    assert int((row.ids == end).sum()) == 4
    asked = encoder.encode_prompt(Conversation((Turn("user", "q"), early, Turn("user", "r"))))
    assert row.ids[: len(asked)].tolist() == asked.tolist()


@pytest.mark.parametrize("name", ["tokenizer", "alpaca"])
def test_reasoning_is_refused_where_the_template_has_no_place_for_it(
    byte_level: PreTrainedTokenizerFast, name: TemplateName
) -> None:
    encoder = build_chat_encoder(byte_level, ChatConfig(template=name))
    (row,) = encoder.encode(
        [Conversation((Turn("user", "q"), Turn("assistant", "a", reasoning="hm")))]
    )
    assert isinstance(row, Defect)
    assert row.reason == "unrenderable"
    assert "reasoning" in row.detail


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        (CHATML, set()),
        (LLAMA3, set()),
        (CHATML + "{% if tools or documents or pad_token %}{% endif %}", set()),
        (CHATML + "{% if padding %}{{ raise_exception('never') }}{% endif %}", set()),
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}"
            "{% endif %}{{ date_string }}" + CHATML,
            set(),
        ),
        ("{% set effort = effort if effort is defined else 'low' %}" + CHATML, {"effort"}),
        ("{% if not effort is defined %}{% set effort = 1 %}{% endif %}" + CHATML, {"effort"}),
        ("{% macro f(a) %}{{ a }}{{ b }}{% endmacro %}" + CHATML, {"b"}),
        (
            CHATML.replace("{% endfor %}", "{% if message.x %}{% break %}{% endif %}{% endfor %}"),
            set(),
        ),
        (
            "{% for m in messages %}<s>{{ m.role }}\n{% generation %}{{ m.content }}{{ tone }}"
            "{% endgeneration %}<|im_end|>{% endfor %}",
            {"tone"},
        ),
    ],
)
def test_variables_are_what_a_template_reads_and_nobody_gives(
    byte_level: PreTrainedTokenizerFast, text: str, variables: set[str]
) -> None:
    assert TokenizerTemplate(with_template(byte_level, text)).variables == variables


def test_memory_does_not_grow_with_every_new_option(byte_level: PreTrainedTokenizerFast) -> None:
    text = CHATML + "{% if note %}{% endif %}"
    template = TokenizerTemplate(with_template(byte_level, text))
    size = len(pickle.dumps(template))
    for number in range(1000):
        template.render(talk("q"), {"note": f"{number:010000d}"})
    assert len(pickle.dumps(template)) - size < 4_000_000


def test_template_that_writes_an_earlier_answer_without_its_prompt_takes_options(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    # As Qwen 3's template without thinking: only the prompt and the last answer have the tags.
    text = (
        "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "{% if quick %}<think></think>{% endif %}{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant\n"
        "{% if quick %}<think></think>{% endif %}{% endif %}"
    )
    encoder = build_chat_encoder(with_template(byte_level, text), ChatConfig())
    early = "<s>user\nq<|im_end|>\n<s>assistant\na<|im_end|>\n<s>user\nr<|im_end|>\n<s>assistant\n"
    for conversation, end in (
        (talk("q", "a", "r"), "<think></think>"),
        (talk("q", "a", "r", "b"), "<think></think>b"),
    ):
        ids = encoder.encode_prompt(conversation, {"quick": True})
        assert byte_level.decode(ids) == early + end
