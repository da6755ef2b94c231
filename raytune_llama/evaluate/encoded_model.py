"""lm-evaluation-harness's interface to a model, up to token ids: prompts encoded as in serving.

Control tokens that a question contains stay text, also within a chat template. What is done with
the ids is up to subclasses: a model in this process, or one in training.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation, Turn
from raytune_llama.chat.encoding import ChatEncoder
from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.loader import encode_text, leading_ids

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from raytune_llama.chat.conversations import Role

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of its continuation, neither of them empty."""


class EncodedLanguageModel(LM):
    """Encodes prompts and continuations; subclasses compute with their ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        chat: ChatEncoder | None,
        *,
        name: str,
        max_length: int | None,
    ) -> None:
        """Set what encodes.

        Args:
            tokenizer: tokenizer of the model.
            chat: encoder of conversations; None: the model has no chat template.
            name: name of the model in errors.
            max_length: maximum number of tokens that the model reads; None: no limit.
        """
        super().__init__()
        self._tokenizer, self._chat, self._name = tokenizer, chat, name
        self.max_length = max_length
        """Maximum number of tokens that the model reads; None: no limit."""

        self._leading_ids = leading_ids(tokenizer)
        # Ids of rendered conversations, by their text.
        self._rendered: dict[str, tuple[int, ...]] = {}

    @property
    def tokenizer_name(self) -> str:
        """Name of the model; lm-eval needs it for a cache that is off."""
        return self._name

    @property
    def template_hash(self) -> str | None:
        """Hash of the template that renders prompts, as in manifests; None if there is none."""
        return None if self._chat is None else self._chat.template.hash()

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002  # lm-eval's signature
    ) -> str:
        """Render messages with the model's chat template, up to where the answer begins.

        Args:
            chat_history: messages with `role` and `content`; a last one of the assistant is
                continued.
            add_generation_prompt: false if the last message is the assistant's.

        Raises:
            UserError: the model has no chat template, or it can't render the messages.
        """
        if self._chat is None:
            raise UserError(
                f"chat_template: {self._name} has no chat template; set chat_template=false, or "
                "choose a template for the model"
            )
        assert add_generation_prompt == (chat_history[-1]["role"] != "assistant")
        turns = [Turn(cast("Role", each["role"]), each["content"]) for each in chat_history]
        system = turns.pop(0).content if turns[0].role == "system" else None
        ids_T = self._chat.encode_prompt(Conversation(tuple(turns), system))
        ids = tuple(ids_T.tolist())
        text = cast("str", self._tokenizer.decode(ids_T, skip_special_tokens=False))
        if self._rendered.setdefault(text, ids) != ids:
            raise UserError(
                f"chat_template: two conversations read alike, but have different tokens: {text!r}"
            )
        return text

    def is_rendered(self, prompt: str) -> bool:
        """Whether a prompt was rendered with the chat template."""
        return prompt in self._rendered

    def tok_encode(self, string: str) -> list[int]:
        """Return the token ids of a prompt: rendered by the template, or as the start of a text."""
        rendered = self._rendered.get(string)
        return list(rendered or self._encode_starts([string])[0])

    def encode_pairs(self, requests: "Sequence[Instance]") -> list[Pair]:
        """Encode contexts and continuations, which may share a token at their boundary.

        As lm-eval's own models do: white space at the end of a context moves to the continuation,
        whose tokens are those that a context has more with it than without it. The start of a
        context that is too long is cut.

        Raises:
            UserError: a continuation has no token of its own, or more than the model reads.
        """
        texts = [cast("tuple[str, str]", request.args) for request in requests]
        # The template's ids end where the answer begins; no token reaches across.
        is_plain = [
            bool(context.rstrip()) and not self.is_rendered(context) for context, _ in texts
        ]
        plain = [text for text, flag in zip(texts, is_plain, strict=True) if flag]
        befores = iter(self._encode_starts([context.rstrip() for context, _ in plain]))
        wholes = iter(self._encode_starts([context + rest for context, rest in plain]))
        pairs: list[Pair] = []
        for (context, continuation), flag in zip(texts, is_plain, strict=True):
            if flag:
                before = next(befores)
                own = next(wholes)[len(before) :]
            else:
                before = list(self._rendered.get(context, (self.prefix_id,)))
                blank = "" if self.is_rendered(context) else context
                own = encode_text(self._tokenizer, [blank + continuation])[0]
            pairs.append(self._cut(before, own, continuation))
        return pairs

    @property
    def prefix_id(self) -> int:
        """The token that an empty context consists of, as for lm-eval's own models: BOS or EOS."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        raise UserError(f"{self._name} has neither BOS nor EOS to begin an empty context")

    def _cut(self, context: Sequence[int], own: Sequence[int], continuation: str) -> Pair:
        """Drop the start of a context that does not fit; see `TaskConfig.truncate`."""
        if not own:
            raise UserError(f"the option {continuation!r} has no token of its own")
        if self.max_length is None:
            return tuple(context), tuple(own)
        # The last token predicts nothing, and needs no position.
        room = self.max_length + 1 - len(own)
        if room < 1:
            raise UserError(
                f"the option {continuation[:40]!r} has {len(own)} tokens, more than the "
                f"{self.max_length} that {self._name} reads"
            )
        return tuple(context[-room:]), tuple(own)

    def _encode_starts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts as starts of documents, each computed once."""
        distinct = list(dict.fromkeys(texts))
        encoded = encode_text(self._tokenizer, distinct) if distinct else []
        found = {
            text: [*self._leading_ids, *ids] for text, ids in zip(distinct, encoded, strict=True)
        }
        return [found[text] for text in texts]
