"""LightReasoner for TRL: contrastive step selection with an expert and an amateur, and training on the kept steps."""

from importlib import import_module


__version__ = "0.1.0"

TYPE_CHECKING = False  # as `typing` has it, which `python -m` would look for in the current folder

# Where each public name lives. PyTorch and transformers are imported when a name is first used, so that importing the
# package costs nothing and `lightreasoner --help` answers at once.
_MODULES = {
    "ContrastiveSamplingConfig": "sampling.contrastive_sampling_config",
    "ContrastiveStepSampler": "sampling.contrastive_step_sampler",
    "DataCollatorForLightReasoner": "training.data_collator",
    "EvaluationConfig": "evaluation.evaluation_config",
    "LightReasonerConfig": "training.lightreasoner_config",
    "LightReasonerTrainer": "training.lightreasoner_trainer",
    "PairCheck": "sampling.pair_check",
    "PromptFormat": "steps.prompt_format",
    "RunConfig": "pipeline.run_config",
    "RunResult": "pipeline.run",
    "TuneConfig": "pipeline.tune_config",
    "TuneResult": "pipeline.tune",
    "check_steps": "sampling.pair_check",
    "count_steps": "steps.dataset",
    "evaluate": "evaluation.evaluation",
    "grade": "grading.verdicts",
    "grade_all": "grading.verdicts",
    "import_published_steps": "steps.published_steps",
    "kl_quantiles": "steps.dataset",
    "push_dataset_to_hub": "hub.sharing",
    "push_evaluation_to_hub": "hub.sharing",
    "raise_beta": "steps.dataset",
    "run_pipeline": "pipeline.run",
    "sampling_metadata": "steps.dataset",
    "tune": "pipeline.tune",
    "write_report": "report.write_report",
}

__all__ = [
    "ContrastiveSamplingConfig",
    "ContrastiveStepSampler",
    "DataCollatorForLightReasoner",
    "EvaluationConfig",
    "LightReasonerConfig",
    "LightReasonerTrainer",
    "PairCheck",
    "PromptFormat",
    "RunConfig",
    "RunResult",
    "TuneConfig",
    "TuneResult",
    "check_steps",
    "count_steps",
    "evaluate",
    "grade",
    "grade_all",
    "import_published_steps",
    "kl_quantiles",
    "push_dataset_to_hub",
    "push_evaluation_to_hub",
    "raise_beta",
    "run_pipeline",
    "sampling_metadata",
    "tune",
    "write_report",
]

if TYPE_CHECKING:
    from .evaluation.evaluation import evaluate
    from .evaluation.evaluation_config import EvaluationConfig
    from .grading.verdicts import grade, grade_all
    from .hub.sharing import push_dataset_to_hub, push_evaluation_to_hub
    from .pipeline.run import RunResult, run_pipeline
    from .pipeline.run_config import RunConfig
    from .pipeline.tune import TuneResult, tune
    from .pipeline.tune_config import TuneConfig
    from .report.write_report import write_report
    from .sampling.contrastive_sampling_config import ContrastiveSamplingConfig
    from .sampling.contrastive_step_sampler import ContrastiveStepSampler
    from .sampling.pair_check import PairCheck, check_steps
    from .steps.dataset import count_steps, kl_quantiles, raise_beta, sampling_metadata
    from .steps.prompt_format import PromptFormat
    from .steps.published_steps import import_published_steps
    from .training.data_collator import DataCollatorForLightReasoner
    from .training.lightreasoner_config import LightReasonerConfig
    from .training.lightreasoner_trainer import LightReasonerTrainer


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
