"""What Meta's code of LLaMA 3 fixes and no file of a release holds: control tokens and chat format.

LLaMA 3, and LLaMA 3.1 to 3.3, give 256 control tokens the ids after the text tokens; the same ids
have other names, since 3.1 gave a use to reserved ones. Names are those of the releases on Hugging
Face, in which the ids that later code of Meta's calls step_id and image are reserved.

Sources: https://github.com/meta-llama/llama3 (tokenizer.py),
https://github.com/meta-llama/llama-models (models/llama3: tokenizer.py, chat_format.py),
transformers' `convert_llama_weights_to_hf.py`.
"""

from typing import Literal

Llama3Version = Literal["3", "3.1"]
"""LLaMA 3, or 3.1 and what has its tokenizer: 3.2 and 3.3."""

NUM_CONTROLS = 256
"""Number of control tokens, whose ids follow those of the text tokens."""

CONTEXT_TOKENS: dict[Llama3Version, int] = {"3": 8192, "3.1": 131072}
"""Context length, which no file of a release records."""

_BEGIN, _END, _END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_END_OF_MESSAGE = "<|eom_id|>"

_PLACES: dict[Llama3Version, dict[int, str]] = {
    "3": {
        0: _BEGIN,
        1: _END,
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: _END_OF_TURN,
    },
    "3.1": {
        0: _BEGIN,
        1: _END,
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: _END_OF_MESSAGE,
        9: _END_OF_TURN,
        10: "<|python_tag|>",
    },
}
"""Control tokens that have a use, by their place among all; the others are reserved."""

CHAT_TEMPLATE = """\
{%- if tools is defined and tools %}\
{{ raise_exception("the chat template has no place for tools") }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
{%- if message["role"] == "tool" or message["tool_calls"] is defined and message["tool_calls"] %}\
{{ raise_exception("the chat template has no place for calls of tools") }}{% endif %}
{%- if message["content"] is not string %}\
{{ raise_exception("the chat template has no place for content that is not a text") }}{% endif %}
{{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
{{- message["content"] | trim }}
{{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
"""Meta's chat format for messages of text; white space around a content is removed, as in LLaMA 3's
code and in the templates of all releases, and unlike in the code of 3.1."""


def control_tokens(version: Llama3Version) -> list[str]:
    """Return the names of all control tokens, in the order of their ids."""
    places = _PLACES[version]
    reserved = iter(range(NUM_CONTROLS))
    return [
        places.get(place) or f"<|reserved_special_token_{next(reserved)}|>"
        for place in range(NUM_CONTROLS)
    ]


def begin_token() -> str:
    """Return the name of the token that begins each text."""
    return _BEGIN


def end_tokens(version: Llama3Version, *, instruct: bool) -> list[str]:
    """Return the names of the tokens that end a text; the first is the tokenizer's EOS."""
    if not instruct:
        return [_END]
    return [_END_OF_TURN, _END] + ([_END_OF_MESSAGE] if version == "3.1" else [])
