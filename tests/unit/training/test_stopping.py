"""The first signal asks a run to stop, the second one or the end of the grace period ends it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import pytest

from orpo_ray.errors import UserError
from orpo_ray.training.stopping import SIGNALS, RunStopped, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_at_once(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    asked: list[int] = []

    def stopped_twice() -> None:
        with StopSignals(lambda: asked.append(1), grace_s=60) as stop:
            os.kill(os.getpid(), number)
            assert (asked, stop.received) == ([1], number)
            with pytest.raises(KeyboardInterrupt):  # within `ray.get`, any other exception would be lost
                os.kill(os.getpid(), signal.SIGINT)
            raise KeyboardInterrupt

    with pytest.raises(RunStopped) as end:
        stopped_twice()
    assert asked == [1]
    assert end.value.exit_code == 128 + number
    assert "without a new checkpoint" in str(end.value)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_the_grace_period_ends() -> None:
    def stopped() -> None:
        with StopSignals(lambda: None, grace_s=0.1):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    with pytest.raises(RunStopped):
        stopped()


def test_another_thread_ends_the_run_with_its_error() -> None:
    error = UserError("of another thread", field="x", fix="y")

    def aborted() -> None:
        with StopSignals(lambda: None, grace_s=60) as stop:
            threading.Thread(target=stop.abort, args=(error,)).start()
            time.sleep(30)

    with pytest.raises(UserError, match="of another thread"):
        aborted()


def test_a_run_that_stopped_in_time_hears_no_more_of_it() -> None:
    with StopSignals(lambda: None, grace_s=0.1):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)


def test_the_message_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RunStopped(signal.SIGTERM, 1234)))
    assert str(error) == (
        "SIGTERM with a checkpoint of step 1,234; the same command resumes from the latest checkpoint"
    )
    assert (error.exit_code, error.title) == (143, "stopped")
