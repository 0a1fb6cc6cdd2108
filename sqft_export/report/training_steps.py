"""A callback of transformers' Trainer that passes training steps on to the loggers of a run.

Apart from ``loggers.py``, which a run without loggers imports too: the Trainer's module takes
seconds to import.
"""

from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from sqft_export.report.loggers import RunLoggers


class TrainingSteps(TrainerCallback):
    """Passes the Trainer's figures of a step on to the run's loggers."""

    def __init__(self, loggers: "RunLoggers", name: str):
        self.loggers, self.name = loggers, name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in (logs or {}):
            self.loggers.log_steps(self.name, state.global_step, logs)
