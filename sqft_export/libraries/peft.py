"""Private parts of peft: adapters on layers of a class that peft does not know."""

from peft import LoraConfig
from torch import nn

DISTRIBUTION = "peft"
PRIVATE = ("peft:LoraConfig._register_custom_module",)


def register_adapter(config: LoraConfig, layer: type[nn.Module], adapter: type[nn.Module]) -> None:
    """Use the class ``adapter`` on layers of the class ``layer``."""
    config._register_custom_module({layer: adapter})
