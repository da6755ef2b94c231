#!/usr/bin/env python
"""Stops the jobs of this head so that they save and can continue on another: a preStop hook.

    stop-jobs [SECONDS=240]

What `run-job` runs gets SIGTERM: it saves and ends with exit status 75, and Ray records the job as
failed. That is what makes KubeRay start a RayJob again; it takes a job that `ray job stop` has
stopped for complete. All other jobs are stopped as by `ray job stop`, which waits for
RAY_JOB_STOP_WAIT_TIME_S. New jobs do not start. Exit status 1: some are still running.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

FOLDER = Path(os.environ.get("RAYTUNE_JOBS_DIR", "/tmp/raytune-jobs"))  # noqa: S108  # run-job's
ADDRESS = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
DEFAULT_SECONDS = 240.0
POLL_SECONDS = 0.5


def main() -> int:
    """Stop all jobs, and return the exit status."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_SECONDS
    deadline = time.monotonic() + seconds
    FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    (FOLDER / "stopping").touch()
    has_saved = stop_runners(find_runners(), deadline)
    return 0 if stop_others(deadline) and has_saved else 1


def find_runners() -> list[psutil.Process]:
    """Return the processes of `run-job` on this node."""
    found: list[psutil.Process] = []
    for file in FOLDER.glob("*.job"):
        # One that was killed leaves its file, and its number may be another process's by now.
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(file.stem))
            if is_run_job(process.cmdline()[:2]):
                found.append(process)
    return found


def stop_runners(runners: list[psutil.Process], deadline: float) -> bool:
    """Send SIGTERM to what `run-job` runs; return whether all of it has ended in time.

    Args:
        runners: processes of `run-job`.
        deadline: time of `time.monotonic` until which to wait.
    """
    signalled: set[psutil.Process] = set()
    while runners and time.monotonic() < deadline:
        for runner in runners:
            with contextlib.suppress(psutil.NoSuchProcess):
                new = set(runner.children()) - signalled
                for child in new:
                    child.terminate()
                signalled |= new
        _, runners = psutil.wait_procs(runners, timeout=POLL_SECONDS)
    return not runners


def stop_others(deadline: float) -> bool:
    """Stop all other jobs as `ray job stop` does; return whether all jobs have ended in time.

    Not those of `run-job`: Ray learns a moment later that they have ended, and a job that is
    stopped until then counts as stopped, not as failed.

    Args:
        deadline: time of `time.monotonic` until which to wait.
    """
    client = JobSubmissionClient(ADDRESS)
    for job in running_jobs(client):
        if job.submission_id is not None and not is_run_job(job.entrypoint.split()):
            client.stop_job(job.submission_id)
    while running_jobs(client):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def running_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """Return the jobs that have not ended."""
    return [
        job
        for job in client.list_jobs()
        if job.type == JobType.SUBMISSION and job.status in (JobStatus.PENDING, JobStatus.RUNNING)
    ]


def is_run_job(words: Sequence[str]) -> bool:
    """Whether a command line is one of `run-job`."""
    return any(Path(word).stem in ("run-job", "run_job") for word in words)


if __name__ == "__main__":
    sys.exit(main())
