"""NSGA-II (optuna) over accuracy and adapter size, started at the median and both extremes."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqft_export.search.rules import pick_maximal, pick_median, pick_minimal
from sqft_export.search.space import Ranks, Space

POPULATION = 10
TRIALS_PER_EVALUATION = 5  # a repeated configuration costs nothing; this bounds the trials


def search(space: Space) -> Ranks:
    """Return the best configuration that NSGA-II evaluates within the budget."""
    import optuna

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        ranks = {g: trial.suggest_categorical(g, list(space.ranks)) for g in space.groups}
        score = space.evaluate(ranks)
        if score is None:
            trial.study.stop()
            raise optuna.TrialPruned
        return score.accuracy, score.size

    with _warnings_only():
        sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=space.seed)
        # ``score.size`` is negative: the smaller adapter has the larger one.
        study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
        for pick in (pick_median, pick_maximal, pick_minimal):
            study.enqueue_trial(pick(space))
        study.optimize(objective, n_trials=TRIALS_PER_EVALUATION * space.budget)
    return space.best()


@contextmanager
def _warnings_only() -> Iterator[None]:
    """Let optuna log warnings only, instead of one line per trial."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
