"""LightReasoner for TRL: contrastive step selection with an expert and an amateur, and training on the kept steps."""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Where each public name lives. PyTorch and transformers are imported when a name is first used, so that importing the
# package costs nothing and `lightreasoner --help` answers at once.
_MODULES = {
    "ContrastiveSamplingConfig": "contrastive_sampling_config",
    "ContrastiveStepSampler": "contrastive_step_sampler",
    "DataCollatorForLightReasoner": "data_collator",
    "EvaluationConfig": "evaluation_config",
    "LightReasonerConfig": "lightreasoner_config",
    "LightReasonerTrainer": "lightreasoner_trainer",
    "evaluate": "evaluation",
    "import_published_steps": "published_steps",
    "push_dataset_to_hub": "sharing",
    "push_evaluation_to_hub": "sharing",
    "raise_beta": "step_dataset",
    "sampling_metadata": "step_dataset",
    "write_report": "step_report",
}

__all__ = [
    "ContrastiveSamplingConfig",
    "ContrastiveStepSampler",
    "DataCollatorForLightReasoner",
    "EvaluationConfig",
    "LightReasonerConfig",
    "LightReasonerTrainer",
    "evaluate",
    "import_published_steps",
    "push_dataset_to_hub",
    "push_evaluation_to_hub",
    "raise_beta",
    "sampling_metadata",
    "write_report",
]

if TYPE_CHECKING:
    from .contrastive_sampling_config import ContrastiveSamplingConfig
    from .contrastive_step_sampler import ContrastiveStepSampler
    from .data_collator import DataCollatorForLightReasoner
    from .evaluation import evaluate
    from .evaluation_config import EvaluationConfig
    from .lightreasoner_config import LightReasonerConfig
    from .lightreasoner_trainer import LightReasonerTrainer
    from .published_steps import import_published_steps
    from .sharing import push_dataset_to_hub, push_evaluation_to_hub
    from .step_dataset import raise_beta, sampling_metadata
    from .step_report import write_report


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
