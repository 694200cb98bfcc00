"""Follow the log of a job until it ends, over connections that may break."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import aiohttp
from ray.job_submission import JobStatus, JobSubmissionClient

from orpo_ray.errors import OrpoRayError

POLL_SECONDS = 1.0
LOST_SECONDS = 120.0  # without an answer, after which following ends; the job goes on


class JobEnded(OrpoRayError):
    """A job did not succeed, or cannot be followed any longer.

    Args:
        problem: what happened.
        exit_code: of the command that followed the job.
    """

    def __init__(self, problem: str, exit_code: int = 1) -> None:
        self.problem, self.exit_code = problem, exit_code
        super().__init__(problem)

    def __reduce__(self) -> tuple[type[JobEnded], tuple[str, int]]:
        return (type(self), (self.problem, self.exit_code))


def follow_job(client: JobSubmissionClient, job: str, write: Callable[[str], object] = sys.stderr.write) -> None:
    """Print a job's log as it is written, and return when the job has succeeded.

    Args:
        client: of the cluster.
        job: the job's id.
        write: takes each piece of the log.

    Raises:
        JobEnded: the job failed or was stopped, or the cluster has not answered for long.
    """
    shown, answered = 0, time.monotonic()
    while True:
        try:
            shown = asyncio.run(_show(client, job, shown, write))
            status = client.get_job_status(job)
            answered = time.monotonic()
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            if time.monotonic() - answered > LOST_SECONDS:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise JobEnded(
                    f"the cluster does not answer any longer: {reason}\n{_how_to_return(client, job)}"
                ) from None
            status = None
        if status is not None and status.is_terminal():
            return _end(client, job, status)
        time.sleep(POLL_SECONDS)


def after_interrupt(client: JobSubmissionClient, job: str) -> JobEnded:
    """Return the error that says what Ctrl-C in `orpo-ray submit` left running."""
    return JobEnded(f"no longer following; the job goes on\n{_how_to_return(client, job)}", 130)


async def _show(client: JobSubmissionClient, job: str, shown: int, write: Callable[[str], object]) -> int:
    """Print the log from its character `shown` on, until it ends or the connection breaks; return the new number."""
    position = 0
    try:
        async for text in client.tail_job_logs(job):
            position += len(text)
            if position > shown:
                write(text[len(text) - (position - shown) :])
                shown = position
    except (aiohttp.ClientError, RuntimeError):
        pass  # the caller asks for the job's status, and comes back
    return shown


def _end(client: JobSubmissionClient, job: str, status: JobStatus) -> None:
    if status is JobStatus.SUCCEEDED:
        return
    found = client.get_job_info(job)
    message = " ".join((found.message or "").split())[:500]
    if status is JobStatus.STOPPED:
        raise JobEnded(f"job {job} was stopped; submit it again to resume", 143)
    raise JobEnded(f"job {job} failed: {message}", found.driver_exit_code or 1)


def _how_to_return(client: JobSubmissionClient, job: str) -> str:
    rest = f"--address {client.get_address()} {job}"
    return f"  follow it: ray job logs --follow {rest}\n  stop it:   ray job stop {rest}"
