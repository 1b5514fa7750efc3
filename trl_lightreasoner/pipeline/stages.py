"""Stages that `run` and `tune` share: open a pair, check it, sample it, train an adapter, and print the progress."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, logging

from ..evaluation.candidate import Candidate
from ..evaluation.evaluation_config import EvaluationConfig
from ..models.adapter_loading import load_adapter, load_adapter_config
from ..models.loading import load_config
from ..processes import Processes
from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from ..sampling.contrastive_step_sampler import ContrastiveStepSampler
from ..sampling.model_pair import name_skipped_layers
from ..steps.dataset import count_steps
from ..steps.prompt_format import PromptFormat
from ..steps.whole_files import write_json
from ..training.adapters import choose_target_modules, target_modules
from ..training.checkpoints import last_checkpoint
from ..training.lightreasoner_config import LightReasonerConfig
from ..training.lightreasoner_trainer import LightReasonerTrainer
from ..training.log_lines import log_in_lines
from ..training.memory import TrainingMemoryError, halve_batches
from .run_config import RunConfig


logger = logging.get_logger(__name__)

AnyRunConfig = TypeVar("AnyRunConfig", bound=RunConfig)


class Stages:
    """Prints each stage as it begins, and measures its duration."""

    def __init__(self):
        self.total = 0
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        print(f"{len(self._seconds) + 1}/{self.total} {what}", flush=True)
        start = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        seconds = {**self._seconds, "total": time.perf_counter() - self._start}
        return {name: round(value, 1) for name, value in seconds.items()}


def with_layers(args: AnyRunConfig) -> AnyRunConfig:
    """The settings with the indices of the layers that the amateur skips, as folders compare them."""
    is_own = args.amateur is None
    if not is_own and args.amateur_num_skipped_layers is None:
        return args
    Processes()  # of which the main one may say that layers are left out
    model, role = (args.expert, "expert") if is_own else (args.amateur, "amateur")
    return name_skipped_layers(args, load_config(model, role), is_own)


def open_pair(args: RunConfig, path: Path, command: str) -> ContrastiveStepSampler:
    """
    The two models, checked but not yet loaded.

    Args:
        args ([`RunConfig`]): Settings.
        path (`Path`): Where the steps go.
        command (`str`): What to call it in messages.

    Raises:
        `ValueError`: If there are several processes or GPUs, the expert is an adapter, or a setting or a model is
            invalid.
    """
    if Processes().count > 1:
        raise ValueError(
            f"`lightreasoner {command}` runs in a single process. Start it without `accelerate launch`, or use "
            "`sample`, `train` and `eval`, which support several processes."
        )
    if load_adapter_config(args.expert, "expert") is not None:
        raise ValueError(
            f"The expert {args.expert!r} is an adapter. Merge it into a full model with `lightreasoner merge`, or use "
            "`sample` and `train`, which trains it further."
        )
    if training_config(args, path).n_gpu > 1:
        raise ValueError(
            f"`lightreasoner {command}` uses a single GPU, but several are visible. Make only one visible with "
            "`CUDA_VISIBLE_DEVICES=0`, or use `sample`, `train` and `eval`, which support several processes."
        )
    return make_sampler(args, args.expert, path)


def make_sampler(args: RunConfig, expert: str, path: Path, **kwargs: Any) -> ContrastiveStepSampler:
    """The sampler of an expert and the amateur, with `kwargs` for settings of its own."""
    sampling_args = ContrastiveSamplingConfig(
        str(path),
        dtype=choose_dtype(args),
        amateur_chat_template=args.amateur_chat_template,
        amateur_skipped_layers=args.amateur_skipped_layers,
        amateur_system_prompt=args.amateur_system_prompt,
        amateur_prompt_template=args.amateur_prompt_template,
        alpha=args.alpha,
        contrast_strength=args.contrast_strength,
        expert_anchor=args.expert_anchor,
        max_new_tokens=args.max_new_tokens,
        **kwargs,
    )
    return ContrastiveStepSampler(expert, args.amateur, sampling_args)


def choose_dtype(args: RunConfig) -> str:
    """The data type of the models' weights."""
    return args.dtype or ("auto" if torch.accelerator.is_available() else "float32")


def check_pair(
    sampler: ContrastiveStepSampler, prompts: Dataset, prompt_format: PromptFormat, path: Path
) -> dict[str, Any]:
    """Check the pair, save the result to a file, and warn if the pair is not promising."""
    # Once sampling has begun, it refuses other models in this folder
    is_of_pair = path.is_file() and Path(sampler.args.output_dir, "run.json").is_file()
    if not is_of_pair:
        check = sampler.check(prompts, prompt_format=prompt_format)
        write_json(path, {"headline": check.headline, **check.to_dict()})
    check = json.loads(path.read_text(encoding="utf-8"))
    if not check["promising"]:
        print(f"Warning: {check['headline']} {check['reasons'][0]}")
    return check


def sample_steps(
    sampler: ContrastiveStepSampler, prompts: Dataset, prompt_format: PromptFormat, trained: Path
) -> tuple[Dataset, int, int]:
    """
    The Dataset of kept steps, how many steps its completions have, and how many of them are kept.

    Raises:
        `ValueError`: If `trained`, which is trained on them, exists without them, or no step is kept.
    """
    folder = Path(sampler.args.output_dir)
    if trained.exists() and not (folder / "run.json").is_file():  # nothing would tell if other steps replaced them
        raise ValueError(
            f"{str(trained)!r} was trained on steps that are no longer in {str(folder)!r}. Restore them, choose "
            "another `output_dir`, or set `overwrite_output_dir=True` to delete the existing files."
        )
    steps = sampler.sample(prompts, prompt_format)
    num_kept = count_steps(steps)
    if not num_kept:
        raise ValueError("No step is kept, so there is nothing to train on. Choose a weaker amateur.")
    return steps, sum(map(len, steps["completion_ids"])), num_kept


def evaluation_config(args: RunConfig, path: Path, prompt_format: PromptFormat) -> EvaluationConfig:
    """The settings of the evaluation on the held-out questions."""
    return EvaluationConfig(
        str(path),
        dtype=choose_dtype(args),
        max_new_tokens=args.eval_max_new_tokens,
        data_dir=args.data_dir,
        **prompt_format.to_dict(),
    )


def answer_with_adapter(candidate: Candidate, expert: PreTrainedModel, adapter: str) -> None:
    """Let a candidate answer as the expert with the adapter in a folder, and leave the expert without it."""
    adapted = load_adapter(expert, adapter)
    try:
        candidate.answer(adapted)
    finally:
        adapted.unload()


def training_config(args: RunConfig, output_dir: Path, **kwargs: Any) -> LightReasonerConfig:
    """The settings of a training. `kwargs` are settings that a run does not have."""
    return LightReasonerConfig(
        str(output_dir),
        beta=args.beta,
        learning_rate=args.learning_rate,
        max_steps=args.max_steps,
        logging_steps=min(10, args.max_steps),
        seed=args.seed,
        **kwargs,
    )


def train_adapter(
    expert: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: Dataset,
    training_args: LightReasonerConfig,
    args: RunConfig,
    eval_questions: Dataset | None = None,
    callback: TrainerCallback | None = None,
    measured: Dataset | None = None,
    earlier: Path | None = None,
) -> None:
    """
    Train and save an adapter, a new one or the one in the folder `earlier`, and leave the expert without an adapter.
    If `measured` rows are given, warnings.json next to the adapter names the warnings. An interrupted training resumes
    from its last checkpoint. So does one whose memory runs out, with half as many trajectories at a time and the same
    updates; without a checkpoint it begins again.
    """
    while True:
        try:
            return _train_adapter(
                expert, tokenizer, steps, training_args, args, eval_questions, callback, measured, earlier
            )
        except TrainingMemoryError:
            halved = halve_batches(training_args)
            if halved is None:
                raise
        # Not before the error is gone, which holds the memory of the training
        training_args = halved
        logger.warning(
            f"Memory ran out. Training begins again from its last checkpoint, if it has one, with "
            f"{training_args.per_device_train_batch_size} trajectories at a time, and the same updates."
        )


def _train_adapter(
    expert: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: Dataset,
    training_args: LightReasonerConfig,
    args: RunConfig,
    eval_questions: Dataset | None,
    callback: TrainerCallback | None,
    measured: Dataset | None,
    earlier: Path | None,
) -> None:
    """[`train_adapter`], once."""
    model: PreTrainedModel | PeftModel = expert
    peft_config = None
    if earlier is not None:
        model = load_adapter(expert, str(earlier), is_trainable=True)
    else:
        layers = args.lora_target_modules or choose_target_modules(steps, expert.config.model_type)
        peft_config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=0.05,
            target_modules=target_modules(layers),
            task_type="CAUSAL_LM",
        )
    trainer = LightReasonerTrainer(
        model,
        training_args,
        train_dataset=steps,
        processing_class=tokenizer,
        callbacks=None if callback is None else [callback],
        peft_config=peft_config,
        eval_questions=eval_questions,
    )
    try:
        if training_args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        log_in_lines(trainer)
        trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
        trainer.save_model()
        if measured is not None:
            trainer.evaluate(measured)
            write_json(
                Path(training_args.output_dir, "warnings.json"), {"warned": sorted(trainer.drift_warnings.told)}
            )
        trainer.save_state()  # last, with the log that the report plots
    finally:
        trainer.accelerator.unwrap_model(trainer.model).unload()
        del trainer  # a reference cycle that holds the optimizer
        clear_device_cache(garbage_collection=True)
