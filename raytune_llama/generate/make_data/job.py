"""The job that makes instruction data: send prompts, keep the rows that pass, until a budget ends.

    summary = make_data(config, key=os.environ.get("OPENAI_API_KEY"))

The request with a number has the same prompt at every start, so that a job that was stopped or
killed continues with the numbers that are not in its journal yet.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, to_dict
from raytune_llama.generate.make_data.config import MakeDataConfig, check_key, describe_identity
from raytune_llama.generate.make_data.counts import Counts, RequestRecord, format_progress
from raytune_llama.generate.make_data.endpoint import Delays, Endpoint, Reply
from raytune_llama.generate.make_data.prompt import Prompt, PromptTexts, build_prompt, load_texts
from raytune_llama.generate.make_data.reading import ReplyReader
from raytune_llama.generate.make_data.record import QUARANTINE_FILE, DataRecord, check_target
from raytune_llama.logs import waiting
from raytune_llama.signals import StopSignal
from raytune_llama.storage.lease import Fence, Lease, LeaseTimes
from raytune_llama.storage.place import Place, check_run_dir, local_path

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
"""Seconds between two progress lines."""


@dataclass(frozen=True)
class DataSummary:
    """State of the run directory when its job ends."""

    status: Literal["finished", "stopped"]
    """Stopped: by a signal, before a budget was used up; the same command resumes."""

    data_file: Path
    """The rows, as one JSON array."""

    counts: Counts
    """Counts over all starts of the job."""

    ended_by: str
    """What ended the job, in words."""


def make_data(
    config: MakeDataConfig,
    key: str | None,
    *,
    delays: Delays | None = None,
    lease_times: LeaseTimes | None = None,
) -> DataSummary:
    """Make data, or continue to.

    Args:
        config: Config of the job.
        key: API key of the endpoint; None: no key is sent.
        delays: Delays before a request is repeated; None: the defaults.
        lease_times: Durations of the lock on the run directory; None: the defaults.

    Raises:
        ConfigError: The config, the directory or the key does not allow it, or another process
            writes to the directory; raised before any prompt is sent.
        UserError: The endpoint refuses requests or cannot be reached, or its replies have no rows.
    """
    problems = [*check_key(config, key), *check_run_dir(config.run_dir)]
    if problems:
        raise ConfigError(problems)
    texts = load_texts(config.prompt)
    folder = local_path(config.run_dir, "run_dir")
    check_target(folder)
    if key is not None and config.base_url.startswith("http:") and not config.is_on_this_machine:
        logger.warning("base_url: the API key is sent unencrypted; use https")
    plan = "stopping; requests that are not answered yet are sent again on resume"
    with Lease(Place.local(folder), lease_times) as lease, StopSignal(plan) as stop:
        fence = lease.confirm()
        endpoint = Endpoint(config, None if config.api_key_variable is None else key, delays)
        return asyncio.run(_run(config, texts, endpoint, folder, fence=fence, stop=stop))


async def _run(
    config: MakeDataConfig,
    texts: PromptTexts,
    endpoint: Endpoint,
    folder: Path,
    *,
    fence: Fence,
    stop: StopSignal,
) -> DataSummary:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def request_stop() -> None:
        # In a signal handler, nothing else wakes the event loop up.
        loop.call_soon_threadsafe(stopped.set)

    stop.set_callback(request_stop)
    async with endpoint:
        model = await endpoint.find_model()
        with waiting(logger, "reading the rows that are kept", usually="6 s for 50,000 rows"):
            record = DataRecord(folder, describe_identity(config, model, texts.hashes), fence)
            record.restore()
            job = _Job(config, texts, endpoint, model, record)
        ended_by: str | None = None
        try:
            ended_by = await job.run(stopped)
        except UserError as error:
            if not record.numbers:
                raise
            kept = f"{record.counts.rows} rows are kept; the same command resumes"
            raise UserError(f"{error}\n{record.data_file}: {kept}") from error
        finally:
            status = "stopped" if ended_by is None else "finished"
            record.close(status, to_dict(config))
    return DataSummary(status, record.data_file, record.counts, ended_by or "by a signal")


class _Job:
    """The requests of one start of the job."""

    def __init__(
        self,
        config: MakeDataConfig,
        texts: PromptTexts,
        endpoint: Endpoint,
        model: str,
        record: DataRecord,
    ) -> None:
        self._config, self._texts, self._record = config, texts, record
        self._endpoint, self._model = endpoint, model
        self._numbers = (n for n in itertools.count(1) if n not in record.numbers)
        self._reader = ReplyReader(config.filter, record.instructions)
        self._first_rows = record.counts.rows
        self._started = self._logged = time.monotonic()
        self._num_fruitless = 0

    async def run(self, stopped: asyncio.Event) -> str | None:
        """Send requests until a budget is used up, or until `stopped` is set.

        Returns:
            What ended the job; None if it was stopped.

        Raises:
            UserError: See `make_data`.
        """
        stopping = asyncio.create_task(stopped.wait())
        pending: set[asyncio.Task[tuple[Prompt, Reply]]] = set()
        try:
            while not stopping.done():
                while len(pending) < self._config.concurrency and not self._find_end(len(pending)):
                    pending.add(asyncio.create_task(self._ask(next(self._numbers))))
                if not pending:
                    return self._find_end(0)
                due = min(self._record.publish_if_due(), self._log_if_due())
                done, _ = await asyncio.wait(
                    {*pending, stopping}, timeout=due, return_when=asyncio.FIRST_COMPLETED
                )
                finished = pending & done
                pending -= finished
                self._keep_all(finished)
        finally:
            stopping.cancel()
            for task in pending:
                task.cancel()
            await asyncio.gather(stopping, *pending, return_exceptions=True)
        return None

    async def _ask(self, number: int) -> tuple[Prompt, Reply]:
        prompt = build_prompt(self._config.prompt, self._texts, number)
        return prompt, await self._endpoint.ask(number, prompt.text, self._model)

    def _find_end(self, num_pending: int) -> str | None:
        """Return why no other request is to be sent; None if one is.

        Pending requests are expected to give all the rows that they ask for, and to take as many
        tokens as the others. If they don't, requests follow later.
        """
        config, counts = self._config, self._record.counts
        if config.num_rows is not None:
            expected = counts.rows + num_pending * config.prompt.num_items
            if expected >= config.num_rows:
                return f"num_rows={config.num_rows}"
        if config.max_requests is not None and counts.requests + num_pending >= config.max_requests:
            return f"max_requests={config.max_requests}"
        if config.max_tokens is not None:
            mean = counts.tokens / counts.requests if counts.requests else 0
            if counts.tokens + num_pending * mean >= config.max_tokens:
                return f"max_tokens={config.max_tokens}"
        return None

    def _keep_all(self, tasks: "set[asyncio.Task[tuple[Prompt, Reply]]]") -> None:
        """Record the replies of finished tasks, then raise the error of one that failed."""
        errors = [error for task in tasks if (error := task.exception()) is not None]
        for task in tasks:
            if task.exception() is None:
                self._keep(*task.result())
        if errors:
            raise errors[0]

    def _keep(self, prompt: Prompt, reply: Reply) -> None:
        """Record a reply: its rows, and why the other items are none."""
        read = self._reader.read(prompt, reply)
        self._record.append(
            RequestRecord(
                number=prompt.number,
                base_url=self._config.base_url,
                model=reply.model,
                finish_reason=reply.finish_reason,
                form=read.form,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
                retries=dict(reply.retries),
                rows=read.rows,
                rejected=read.rejected,
                ignored_fields=dict(read.ignored_fields),
            )
        )
        if self._config.max_tokens is not None and self._record.counts.without_usage:
            raise UserError(
                f"max_tokens: {self._config.base_url} does not report token counts; set "
                "max_requests instead"
            )
        self._num_fruitless = 0 if read.rows else self._num_fruitless + 1
        if self._num_fruitless >= self._config.max_fruitless_requests:
            reasons = Counter(item["reason"] for item in read.rejected)
            last = ", ".join(f"{reason} {number}" for reason, number in reasons.items())
            raise UserError(
                f"max_fruitless_requests: {self._num_fruitless} consecutive replies had no row to "
                f"keep, the last one because of: {last}; see {QUARANTINE_FILE}, then change the "
                "model or the prompt"
            )

    def _log_if_due(self) -> float:
        """Log the progress at intervals; return the seconds until the next time."""
        now = time.monotonic()
        if now - self._logged >= PROGRESS_SECONDS:
            self._logged = now
            counts, seconds = self._record.counts, now - self._started
            new = counts.rows - self._first_rows
            line = format_progress(self._config, counts, num_new_rows=new, seconds=seconds)
            logger.info("%s", line)
        return self._logged + PROGRESS_SECONDS - now
