"""News of trials: from the thread of a host that trains them to Tune's functions, which ask for them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from orpo_ray.errors import OrpoRayError
from orpo_ray.training.launch import TrainingFailed

WAIT_SECONDS = 1.0
"""How long a request for news of a trial waits for some."""


@dataclass
class News:
    """What is new of one trial since the last request."""

    reports: list[dict[str, float]] = field(default_factory=list)
    has_ended: bool = False
    error: BaseException | None = None


class Mail:
    """Passes news of each trial from the thread that trains to those that ask. A `Listener` of the runs."""

    def __init__(self) -> None:
        self._news: dict[str, News] = {}
        self._asked: set[str] = set()
        self._stopped: set[str] = set()
        self._changed = threading.Condition()

    def open(self, names: Iterable[str]) -> None:
        """Expect news of trials that begin or go on."""
        with self._changed:
            self._news |= {name: News() for name in names}

    def tell(self, name: str, **state: object) -> None:
        """Drop what a run of its own shows on the console."""

    def warn(self, name: str, text: str) -> None:
        """Drop it, as trials with processes of their own do."""

    def report(self, name: str, metrics: dict[str, float]) -> None:
        """Take an evaluation of a trial, or the metrics of a checkpoint."""
        with self._changed:
            self._news[name].reports.append(metrics)
            self._changed.notify_all()

    def ended(self, name: str, error: BaseException | None) -> None:
        """Take the end of a trial."""
        if error is not None and not isinstance(error, OrpoRayError):
            error = TrainingFailed(f"{type(error).__name__}: {error}")  # not every exception can be pickled
        if error is not None:  # whose traceback would keep the model
            error.__traceback__ = error.__context__ = error.__cause__ = None
        with self._changed:
            news = self._news[name]
            if not news.has_ended:
                news.has_ended, news.error = True, error
            self._changed.notify_all()

    def asks_to_stop(self, name: str) -> bool:
        """Whether Tune has stopped a trial, or the trial has ended."""
        return name in self._stopped or self._news[name].has_ended

    def stop(self, name: str) -> None:
        """Ask a trial to leave."""
        self._stopped.add(name)

    def stop_silent(self, names: Iterable[str]) -> None:
        """Stop those of the trials that nobody has asked for."""
        self._stopped |= set(names) - self._asked

    def end_all(self, names: Iterable[str], error: BaseException) -> None:
        """End those of the trials that have not ended by an error of them all."""
        for name in names:
            self.ended(name, error)

    def take(self, name: str) -> News:
        """Return the news of a trial as soon as there are some, or none after `WAIT_SECONDS`."""

        def is_new() -> bool:
            news = self._news.get(name, News())
            return bool(news.reports) or news.has_ended

        with self._changed:
            self._asked.add(name)
            self._changed.wait_for(is_new, WAIT_SECONDS)
            news = self._news.get(name, News())
            if name in self._news:  # what is returned here is pickled later, and must not change
                self._news[name] = News(has_ended=news.has_ended, error=news.error)
            return news
