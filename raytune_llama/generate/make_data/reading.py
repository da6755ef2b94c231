"""Reading replies: which of their items are kept, compared with all that is kept already."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_llama.generate.make_data.config import FilterConfig
from raytune_llama.generate.make_data.counts import NEAR_DUPLICATE
from raytune_llama.generate.make_data.duplicates import NearDuplicates
from raytune_llama.generate.make_data.endpoint import Reply
from raytune_llama.generate.make_data.prompt import Prompt
from raytune_llama.generate.make_data.replies import Rejection, check_item, parse_items


@dataclass(frozen=True)
class ReadReply:
    """What a reply contains."""

    form: str
    """How it was read, see `ParsedReply.form`; `unusable` if it has no items."""

    rows: list[dict[str, str]] = field(default_factory=list)
    """Rows to keep."""

    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Items that are not kept, or the reply; see `RequestRecord.rejected`."""

    ignored_fields: Counter[str] = field(default_factory=Counter)
    """Number of rows to keep by the name of a field that was left out."""


class ReplyReader:
    """Reads the replies of a job, one after the other."""

    def __init__(self, rules: FilterConfig, instructions: Sequence[str]) -> None:
        """Prepare the search for near duplicates.

        Args:
            rules: Rules for rows.
            instructions: Instructions of the rows that are kept already.
        """
        self._rules = rules
        self._instructions = list(instructions)
        self._kept = NearDuplicates(rules.max_rouge_l)
        for instruction in instructions:
            self._kept.add(instruction)

    def read(self, prompt: Prompt, reply: Reply) -> ReadReply:
        """Return the rows of a reply; later replies are compared with them too.

        Args:
            prompt: Prompt of the request.
            reply: Answer to it.
        """
        if reply.text is None:
            return ReadReply("unusable", rejected=[{"reason": "no_text", "detail": reply.failure}])
        parsed = parse_items(reply.text)
        if isinstance(parsed, Rejection):
            rejected = {"reason": parsed.reason, "detail": parsed.detail, "reply": reply.text}
            return ReadReply("unusable", rejected=[rejected])
        read = ReadReply(parsed.form)
        for item in parsed.items:
            row = check_item(item, prompt, self._rules)
            if not isinstance(row, Rejection):
                row = self._find_duplicate(row.instruction) or row
            if isinstance(row, Rejection):
                rejected = {"reason": row.reason, "detail": row.detail, "item": item}
                read.rejected.append(rejected)
                continue
            self._instructions.append(row.instruction)
            self._kept.add(row.instruction)
            read.rows.append(row.to_json())
            read.ignored_fields.update(row.ignored_fields)
        if parsed.cut_off is not None:
            detail = f"the reply ends in this item (finish_reason {reply.finish_reason})"
            read.rejected.append({"reason": "cut_off", "detail": detail, "item": parsed.cut_off})
        return read

    def _find_duplicate(self, instruction: str) -> Rejection | None:
        match = self._kept.find(instruction)
        if match is None:
            return None
        similar = self._instructions[match.position]
        return Rejection(NEAR_DUPLICATE, f"ROUGE-L {match.rouge_l:.3f} with: {similar}")
