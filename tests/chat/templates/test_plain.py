"""The seeds' forms, to the character, and ids by the tokenizers' own libraries."""

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.config import ChatConfig
from raytune_llama.chat.conversations import Conversation, Role, Turn
from raytune_llama.chat.encoding import EncodedConversation, build_chat_encoder
from raytune_llama.chat.templates.choice import TemplateName, build_template, check_roles
from raytune_llama.chat.templates.plain import PlainTemplate
from raytune_llama.chat.templates.segments import UnrenderableError
from tests.chat.conftest import talk

HEADER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
CLA2 = "<<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"

PIECES: dict[TemplateName, list[str]] = {
    "alpaca": [
        "BOS",
        f"{HEADER}\n\n### Instruction:\nfox\n\n### Response: ",
        "the dog",
        "EOS",
        "\n\n### Instruction:\n\n\n### Response: ",
        " 日报🙂",
        "EOS",
    ],
    "alpaca_inference": [
        "BOS",
        f"{HEADER}\n\n### Instruction:\n\nfox\n\n### Response:\n\n",
        "the dog",
        "EOS",
        "\n\n### Instruction:\n\n\n\n### Response:\n\n",
        " 日报🙂",
        "EOS",
    ],
    "belle": [
        "Human: \nfox\n\nAssistant: \n",
        "the dog",
        "EOS",
        "Human: \n\n\nAssistant: \n",
        " 日报🙂",
        "EOS",
    ],
    "llama2": [
        "BOS",
        f"[INST] {CLA2}fox [/INST]",
        "the dog",
        "EOS",
        "BOS",
        "[INST]  [/INST]",
        " 日报🙂",
        "EOS",
    ],
}
"""What is encoded for a conversation of two exchanges, the second with an empty question."""

TARGETS = ("the dog", " 日报🙂", "EOS")
NAMES = list(PIECES)


def encode(
    tokenizer: PreTrainedTokenizerFast, name: TemplateName, conversation: Conversation
) -> EncodedConversation:
    (row,) = build_chat_encoder(tokenizer, ChatConfig(template=name)).encode([conversation])
    assert isinstance(row, EncodedConversation)
    return row


def check(row: EncodedConversation, pieces: list[str], ids: dict[str, list[int]]) -> None:
    wanted = [id_ for piece in pieces for id_ in ids[piece]]
    targets = [piece in TARGETS for piece in pieces for _ in ids[piece]]
    assert row.ids.tolist() == wanted
    assert row.targets.tolist() == targets
    assert (row.ids.dtype, row.targets.dtype) == ("uint32", "bool")


@pytest.mark.parametrize("name", NAMES)
def test_form_has_the_ids_of_sentencepiece(
    llama: PreTrainedTokenizerFast, name: TemplateName
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=llama.vocab_file)
    ids = {piece: processor.encode(piece) for piece in PIECES[name]}
    ids |= {"BOS": [processor.bos_id()], "EOS": [processor.eos_id()]}
    check(encode(llama, name, talk("fox", "the dog", "", " 日报🙂")), PIECES[name], ids)


@pytest.mark.parametrize("name", NAMES)
def test_form_has_the_ids_of_tokenizers(
    byte_level: PreTrainedTokenizerFast, name: TemplateName
) -> None:
    engine = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    ids = {piece: engine.encode(piece, add_special_tokens=False).ids for piece in PIECES[name]}
    for name_of, token in {"BOS": "<s>", "EOS": "</s>"}.items():
        id_ = engine.token_to_id(token)
        assert id_ is not None
        ids[name_of] = [id_]
    check(encode(byte_level, name, talk("fox", "the dog", "", " 日报🙂")), PIECES[name], ids)


def test_system_text_takes_the_place_of_the_default(byte_level: PreTrainedTokenizerFast) -> None:
    segments = build_template("llama2", byte_level).render(talk("q", "a", system="s"))
    text = "".join(segment.text for segment in segments)
    assert text == "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST]a</s>"
    assert [part.text for part in segments if part.kind == "system"] == ["s"]


@pytest.mark.parametrize("name", ["alpaca", "alpaca_inference", "belle"])
def test_system_text_without_a_place_is_refused(
    byte_level: PreTrainedTokenizerFast, name: TemplateName
) -> None:
    template = build_template(name, byte_level)
    with pytest.raises(UnrenderableError, match=name):
        template.render(talk("q", "a", system="s"))
    with pytest.raises(ValueError, match=r"^template: .* 2 of 5 conversations"):
        check_roles(template, num_conversations=5, num_with_system=2)
    check_roles(template, num_conversations=5, num_with_system=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("roles", [(), ("assistant",), ("user", "user"), ("user", "system")])
def test_turns_that_do_not_alternate_are_refused(
    byte_level: PreTrainedTokenizerFast, name: TemplateName, roles: tuple[Role, ...]
) -> None:
    template = build_template(name, byte_level)
    conversation = Conversation(tuple(Turn(role, "x") for role in roles))
    with pytest.raises(UnrenderableError, match="alternate"):
        template.render(conversation)


def test_no_two_forms_have_one_hash(byte_level: PreTrainedTokenizerFast) -> None:
    hashes = {build_template(name, byte_level).hash() for name in (*NAMES, "tokenizer")}
    assert len(hashes) == len(NAMES) + 1


def test_hash_does_not_depend_on_the_tokenizer(
    byte_level: PreTrainedTokenizerFast, llama: PreTrainedTokenizerFast
) -> None:
    for name in NAMES:
        assert build_template(name, byte_level).hash() == build_template(name, llama).hash()


def test_hash_tells_of_another_text(byte_level: PreTrainedTokenizerFast) -> None:
    from dataclasses import replace

    from raytune_llama.chat.templates.segments import Segment

    template = build_template("belle", byte_level)
    assert isinstance(template, PlainTemplate)
    other = replace(template.spec, write_prompt=lambda q: [Segment("user", q.user)])
    assert replace(template, spec=other).hash() != template.hash()
