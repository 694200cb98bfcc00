"""How news of trials travel from a host to Tune's functions."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest

from orpo_ray.sweep.mail import Mail, News
from orpo_ray.training.launch import TrainingFailed


def mail_of(*names: str) -> Mail:
    mail = Mail()
    mail.open(names)
    return mail


def test_news_of_each_trial_are_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_ray.sweep.mail.WAIT_SECONDS", 0.01)
    mail = mail_of("a", "b")
    assert mail.take("c") == News()  # it is not expected yet
    mail.report("a", {"step": 1})
    mail.report("a", {"step": 2})
    assert mail.take("a").reports == [{"step": 1}, {"step": 2}]
    assert mail.take("a").reports == mail.take("b").reports == []
    mail.ended("a", OSError("full"))
    mail.end_all("ab", RuntimeError("lost"))
    ends = pickle.loads(pickle.dumps([mail.take(name) for name in ("a", "b", "a")]))
    assert [str(end.error) for end in ends] == ["OSError: full", "RuntimeError: lost", "OSError: full"]
    assert all(isinstance(end.error, TrainingFailed) and end.has_ended for end in ends)


def test_trials_that_were_stopped_or_have_ended_or_that_nobody_asks_for_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_ray.sweep.mail.WAIT_SECONDS", 0.01)
    mail = mail_of(*"abcd")
    mail.stop("a")
    mail.ended("b", None)
    assert [mail.asks_to_stop(name) for name in "abcd"] == [True, True, False, False]
    mail.take("c")
    mail.stop_silent("acd")
    assert [mail.asks_to_stop(name) for name in "abcd"] == [True, True, False, True]


def test_an_error_does_not_keep_what_it_was_raised_in() -> None:
    class Model:
        pass

    def fail() -> weakref.ref[Model]:
        model = Model()
        try:
            try:
                raise OSError("full")
            except OSError as error:
                raise TrainingFailed("it failed") from error
        except TrainingFailed as error:
            mail.ended("a", error)
        return weakref.ref(model)

    mail = mail_of("a")
    left = fail()
    gc.collect()
    assert left() is None
    assert str(mail.take("a").error) == "it failed"
