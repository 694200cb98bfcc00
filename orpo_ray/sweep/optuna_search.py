"""Search with Optuna's tree-structured Parzen estimator (TPE), for one metric or two.

The record of the sweep is what counts. Optuna's study is made anew of the record at each start, in a file that
`optuna-dashboard` opens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from orpo_ray.config.tune_schema import TuneConfig, natural_mode
from orpo_ray.extras import require
from orpo_ray.storage.run_folder import OPTUNA_FILE, RunFolder
from orpo_ray.sweep.record import STEP, Trial
from orpo_ray.sweep.space import Dimension, Params, Space

DIRECTIONS: dict[str, Any] = {"max": "maximize", "min": "minimize"}
NAME_KEY = "trial"  # attribute of Optuna's trials: the name of the run folder
MOST_AT_RANDOM = 10


class OptunaSampler:
    """Implements `Sampler`; the arguments are those of `make_sampler`.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(
        self, tune: TuneConfig, space: Space, name: str, folder: RunFolder, trials: Sequence[Trial] = ()
    ) -> None:
        require("optuna", "tune.searcher: tpe", "set tune.searcher: random")
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._tune, self._space, self._folder = tune, space, folder
        modes = [tune.direction, *([natural_mode(tune.second_metric)] if tune.second_metric else [])]
        path = folder.path / OPTUNA_FILE
        path.unlink(missing_ok=True)
        # Trials of several fields depend on each other; and running ones must not be asked for again.
        options: dict[str, Any] = {"multivariate": True, "constant_liar": True, "seed": tune.seed + len(trials)}
        at_random = min(MOST_AT_RANDOM, max(2, tune.num_trials // 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(n_startup_trials=at_random, **options)
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
                sampler=sampler,
                study_name=name,
                directions=[DIRECTIONS[mode] for mode in modes],
            )
            self._study.set_metric_names([tune.metric, *([tune.second_metric] if tune.second_metric else [])])
        self._distributions = {each.key: _distribution(each) for each in space}
        self._asked: dict[int, Any] = {}
        """Number of a trial that is not over -> Optuna's trial."""
        for trial in trials:
            self._add(trial)
        folder.push(OPTUNA_FILE)

    def ask(self, number: int) -> Params | None:
        """Return the values that Optuna suggests."""
        found = self._study.ask(self._distributions)
        found.set_user_attr(NAME_KEY, f"{number:04d}")
        self._asked[number] = found
        return {each.key: _from_optuna(each, found.params[each.key]) for each in self._space}

    def tell(self, trial: Trial) -> None:
        """Tell Optuna the evaluations of a trial, and its end."""
        found = self._asked.get(trial.number)
        if found is None:
            return
        if self._tune.second_metric is None:
            reported = self._study.trials[found.number].intermediate_values
            for step, value in _values_by_step(trial, self._tune.metric).items():
                if step not in reported:
                    found.report(value, step)
        if trial.is_over:
            del self._asked[trial.number]
            state, values = self._outcome(trial)
            self._study.tell(found, values, state=state)
        self._folder.push(OPTUNA_FILE)

    def _add(self, trial: Trial) -> None:
        """Add a trial of an earlier session."""
        import optuna

        params = {each.key: _to_optuna(each, trial.params[each.key]) for each in self._space}
        if not trial.is_over:
            self._study.enqueue_trial(params)
            found = self._study.ask(self._distributions)
            found.set_user_attr(NAME_KEY, trial.name)
            self._asked[trial.number] = found
            self.tell(trial)
            return
        state, values = self._outcome(trial)
        self._study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=self._distributions,
                values=values,
                state=state,
                intermediate_values=None if self._tune.second_metric else _values_by_step(trial, self._tune.metric),
                user_attrs={NAME_KEY: trial.name},
            )
        )

    def _outcome(self, trial: Trial) -> tuple[Any, list[float] | None]:
        """Return Optuna's state and values of a trial that is over."""
        from optuna.trial import TrialState

        second = self._tune.second_metric
        values = [trial.value(metric) for metric in (self._tune.metric, *([second] if second else []))]
        known = [value for value in values if value is not None]
        if trial.state == "failed" or len(known) < len(values):
            return TrialState.FAIL, None
        # A trial that was stopped early is compared with others at the steps that it reached.
        return (TrialState.COMPLETE, known) if trial.state == "finished" else (TrialState.PRUNED, None)


def _values_by_step(trial: Trial, metric: str) -> dict[int, float]:
    return {int(line[STEP]): line[metric] for line in trial.history if metric in line}


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    if dimension.choices:
        return distributions.CategoricalDistribution([_to_optuna(dimension, each) for each in dimension.choices])
    kind: Any = distributions.IntDistribution if dimension.is_whole else distributions.FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)


def _to_optuna(dimension: Dimension, value: Any) -> Any:
    """Return a value as Optuna stores it; lists and mappings as JSON."""
    if dimension.choices and isinstance(value, list | dict):
        return json.dumps(value)
    return value


def _from_optuna(dimension: Dimension, value: Any) -> Any:
    if not dimension.choices:
        return value
    return next(each for each in dimension.choices if _to_optuna(dimension, each) == value)
