"""lm-evaluation-harness's interface to a model in this process, so that all its tasks run.

    outcome = run_task(task, ServedLanguageModel(model))

Log-likelihoods come from `serve.engine.scoring`, which computes shared examples once, and generated
answers from the serving engine, with continuous batching.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from raytune_llama.config.errors import UserError
from raytune_llama.evaluate.encoded_model import EncodedLanguageModel, Pair
from raytune_llama.evaluate.models import InProcessModel, PromptIds
from raytune_llama.serve.engine.protocol import SamplingOptions
from raytune_llama.serve.engine.scoring import Candidates, Score
from raytune_llama.tokenizer.loader import encode_text

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class ServedLanguageModel(EncodedLanguageModel):
    """lm-evaluation-harness's interface to a model in this process."""

    def __init__(self, model: InProcessModel) -> None:
        """Wrap a loaded model."""
        served = model.served
        super().__init__(
            served.tokenizer, served.chat, name=served.name, max_length=served.max_context
        )
        self._model, self._served = model, served

    def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        scores = self._score(self.encode_pairs(requests))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
        """Return the log-likelihood of each text, in windows of the model's whole context."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = encode_text(self._tokenizer, [cast("str", request.args[0])])[0]
            found = get_rolling_token_windows(ids, self.prefix_id, self._served.max_context, 1)
            for context, continuation in map(make_disjoint_window, found):
                windows.append((tuple(context), tuple(continuation)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, score in zip(owners, self._score(windows), strict=True):
            totals[number] += score.logprob
        return totals

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """Return each prompt's answer, up to a stop string, greedily unless asked otherwise."""
        arguments = [cast("tuple[str, dict[str, Any]]", request.args) for request in requests]
        prepared = [self._prepare(prompt, options) for prompt, options in arguments]
        return [answer.text for answer in self._model.generate(prepared)]

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score continuations; those of the same context together."""
        by_context: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, continuation in pairs:
            by_context.setdefault(context, {})[continuation] = None
        batch = [Candidates(context, tuple(options)) for context, options in by_context.items()]
        found: dict[Pair, Score] = {}
        for number, scores in self._model.score(batch):
            candidates = batch[number]
            for continuation, score in zip(candidates.continuations, scores, strict=True):
                found[candidates.context, continuation] = score
        return [found[pair] for pair in pairs]

    def _prepare(self, prompt: str, options: dict[str, Any]) -> PromptIds:
        """Return a prompt with lm-eval's options."""
        settings = dict(normalize_gen_kwargs(options))
        until = cast("list[str]", settings.pop("until"))
        max_tokens = cast("int", settings.pop("max_gen_toks"))
        settings.pop("do_sample", None)
        sampling = SamplingOptions(
            temperature=cast("float", settings.pop("temperature", 0.0)),
            top_p=cast("float", settings.pop("top_p", 1.0)),
            top_k=cast("int | None", settings.pop("top_k", None)),
        )
        if settings:
            raise UserError(f"generation_kwargs: {', '.join(settings)} is not supported; remove it")
        max_context = self._served.max_context
        room = max_context - max_tokens
        if room < 1:
            raise UserError(
                f"answers of {max_tokens} tokens do not fit the {max_context} positions of "
                f"{self._served.name}; lower max_answer_tokens, or max_gen_toks of the lm-eval task"
            )
        ids = tuple(self.tok_encode(prompt))[-room:]
        stops = tuple(text for text in until if text)
        is_plain = not self.is_rendered(prompt)
        return PromptIds(ids, sampling, max_tokens, stops, continues_text=is_plain)
