"""Settings with which a recipe that would take more than a day fits one."""

from sqft_export.plan.workload import Workload
from sqft_export.recipe.schema import Recipe

DAY_SECONDS = 24 * 3600.0
BENCHMARK_MINUTES = 30  # limit of the benchmark in a run of one day


def settings_for_a_day(
    recipe: Recipe, seconds: dict[str, float | None], workload: Workload
) -> str | None:
    """Return settings with which the given passes take at most a day; None if they already do.

    :param seconds: predicted seconds of the passes that are to run.
    """
    known = {name: taken or 0.0 for name, taken in seconds.items()}
    if sum(known.values()) <= DAY_SECONDS:
        return None
    settings = []
    if known.get("benchmark", 0) > 60 * BENCHMARK_MINUTES:
        known["benchmark"] = 60.0 * BENCHMARK_MINUTES
        settings.append(f"benchmark.minutes={BENCHMARK_MINUTES}")
    trained = known.get("adapt", 0) + known.get("teacher", 0)
    left = DAY_SECONDS - (sum(known.values()) - trained)
    if left < trained:
        if left <= 0 or not trained:
            return "none: use an accelerator, or a machine with more processors"
        steps = recipe.training.total_steps(workload.examples or 0)
        settings.append(f"adapt.epochs=null adapt.steps={int(steps * left / trained)}")
    return " ".join(settings)
