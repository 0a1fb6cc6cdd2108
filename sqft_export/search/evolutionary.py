"""NSGA-II over accuracy and adapter size (optuna's), from the median and the two extremes."""

from sqft_export.search import Ranks, Space, maximal, median, minimal

POPULATION = 10
TRIALS_PER_EVALUATION = 5  # a configuration met again costs nothing, but there must be an end


def search(space: Space) -> Ranks:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=space.seed)
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    for start in (median, maximal, minimal):
        study.enqueue_trial(start.search(space))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        ranks = {g: trial.suggest_categorical(g, list(space.ranks)) for g in space.groups}
        score = space.evaluate(ranks)
        if score is None:
            trial.study.stop()
            raise optuna.TrialPruned
        return score.accuracy, score.size

    study.optimize(objective, n_trials=TRIALS_PER_EVALUATION * space.budget)
    return space.best()
