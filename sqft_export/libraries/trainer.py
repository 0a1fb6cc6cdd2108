"""Private parts of transformers' Trainer: the files of its checkpoints, and its sampler.

Apart from ``libraries/transformers.py``, because the Trainer imports datasets and peft.
"""

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

DISTRIBUTION = "transformers"
PRIVATE = (
    "transformers:Trainer._get_train_sampler",
    "transformers:Trainer._load_optimizer_and_scheduler",
    "transformers:Trainer._load_rng_state",
    "transformers:Trainer._save",
    "transformers:Trainer._save_optimizer_and_scheduler",
    "transformers:Trainer._save_rng_state",
)


class HookedTrainer(Trainer):
    """A Trainer whose sampler and checkpoint files are chosen by methods with public names.

    Under FSDP the Trainer itself saves and loads the sharded optimizer.
    """

    def train_sampler(self, rows: Dataset) -> Sampler:
        """Return the sampler of the training rows."""
        raise NotImplementedError

    def save_weights(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Write the weights of the model; None: of its state dict."""
        raise NotImplementedError

    def save_optimizer(self, folder: Path) -> None:
        """Write the states of optimizer and schedule."""
        raise NotImplementedError

    def load_optimizer(self, folder: Path) -> None:
        """Read the states that :meth:`save_optimizer` wrote."""
        raise NotImplementedError

    def save_random_state(self, folder: Path) -> None:
        """Write the states of the random generators."""
        raise NotImplementedError

    def load_random_state(self, folder: Path) -> None:
        """Read the states that :meth:`save_random_state` wrote."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset=None):
        return self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.save_weights(Path(output_dir or self.args.output_dir), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            self.save_optimizer(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            self.load_optimizer(Path(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        self.save_random_state(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_random_state(Path(checkpoint))
