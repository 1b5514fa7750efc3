"""With an amateur the trainer samples prompts by itself, and trains as if somebody had sampled them before."""

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, LightReasonerTrainer

from .test_trainer_batches import config, flat


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def test_prompts_are_sampled_and_trained_on_as_in_two_stages(expert_path, amateur_path, prompts, tmp_path):
    def train(**kwargs) -> torch.Tensor:
        args = config(tmp_path / "out")
        trainer = LightReasonerTrainer(expert_path, args, peft_config=LoraConfig(**LORA), **kwargs)
        trainer.train()
        return flat(trainer.model)

    sampler = ContrastiveStepSampler(expert_path, amateur_path, ContrastiveSamplingConfig(str(tmp_path / "steps")))
    steps = sampler.sample(prompts)
    assert torch.equal(train(train_dataset=steps), train(train_dataset=prompts, amateur_model=amateur_path))
    kept = load_dataset("parquet", data_dir=str(tmp_path / "out" / "_steps" / "data"), split="train")
    assert kept["label_probs"][:] == steps["label_probs"][:]


def test_the_settings_of_the_sampling_can_be_given(expert, amateur, prompts, tmp_path):
    sampling_args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=3, beta=0.0)
    trainer = LightReasonerTrainer(
        expert, config(tmp_path), train_dataset=prompts, amateur_model=amateur, sampling_args=sampling_args
    )
    assert max(map(len, trainer.train_dataset["completion_ids"])) == 3
    assert (tmp_path / "steps" / "data").is_dir() and not (tmp_path / "_steps").exists()


def test_a_threshold_below_that_of_the_sampling_is_refused_before_it(expert, amateur, prompts, tmp_path):
    with pytest.raises(ValueError, match="`beta=0.2` is below 0.4, the `beta` of the sampling"):
        LightReasonerTrainer(expert, config(tmp_path, beta=0.2), train_dataset=prompts, amateur_model=amateur)
    assert not (tmp_path / "_steps").exists()


def test_steps_are_not_sampled_again(expert, amateur_path, steps, tmp_path):
    with pytest.raises(ValueError, match="^`amateur_model` needs a `train_dataset` of prompts, but this one"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, amateur_model=amateur_path)


def test_settings_of_a_sampling_need_an_amateur(expert, steps, tmp_path):
    sampling_args = ContrastiveSamplingConfig(str(tmp_path / "steps"))
    with pytest.raises(ValueError, match="^`sampling_args` needs an `amateur_model`"):
        LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, sampling_args=sampling_args)
