import copy

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer


LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def config(folder, **kwargs) -> LightReasonerConfig:
    kwargs = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 1, **kwargs}
    return LightReasonerConfig(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **kwargs)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model, other) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in weights_of(model).items())


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_stopping_and_resuming_gives_the_weights_of_training_straight_on(peft_config, expert_path, steps, tmp_path):
    straight = LightReasonerTrainer(
        expert_path, config(tmp_path / "a", save_steps=2), train_dataset=steps, peft_config=peft_config
    )
    straight.train()
    halfway = str(tmp_path / "a" / "checkpoint-2")
    resumed = LightReasonerTrainer(
        expert_path, config(tmp_path / "b", save_strategy="no"), train_dataset=steps, peft_config=peft_config
    )
    untrained = weights_of(resumed.model)
    resumed.train(resume_from_checkpoint=halfway)
    assert resumed.state.global_step == 4
    assert not same(resumed.model, untrained)
    assert same(resumed.model, weights_of(straight.model))
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == [
        log["loss"] for log in straight.state.log_history if "loss" in log
    ]


def test_resuming_from_the_last_checkpoint_of_the_output_folder(expert_path, steps, tmp_path):
    args = config(tmp_path, max_steps=2, save_steps=1)
    LightReasonerTrainer(expert_path, args, train_dataset=steps, peft_config=LORA).train()
    resumed = LightReasonerTrainer(
        expert_path, config(tmp_path, max_steps=3, save_strategy="no"), train_dataset=steps, peft_config=LORA
    )
    resumed.train(resume_from_checkpoint=True)
    steps_logged = [log["step"] for log in resumed.state.log_history if "loss" in log]
    assert steps_logged == [1, 2, 3]


def test_a_saved_adapter_loads_onto_its_base(expert, expert_path, tokenizer, steps, tmp_path):
    trainer = LightReasonerTrainer(
        expert, config(tmp_path / "out", save_strategy="no"), train_dataset=steps, peft_config=LORA
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(expert_path), str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].base_model_name_or_path == expert_path
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model))
    assert not torch.allclose(logits_of(loaded), logits_of(AutoModelForCausalLM.from_pretrained(expert_path)))


def test_an_adapter_remembers_the_revision_of_its_base_model(expert_path, steps, tmp_path):
    args = config(tmp_path / "out", save_strategy="no", model_init_kwargs={"revision": "v1"})
    trainer = LightReasonerTrainer(expert_path, args, train_dataset=steps, peft_config=copy.copy(LORA))
    trainer.save_model(str(tmp_path / "adapter"))
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).revision == "v1"


def test_a_saved_model_loads_by_itself(expert, steps, tmp_path):
    trainer = LightReasonerTrainer(expert, config(tmp_path / "out", save_strategy="no"), train_dataset=steps)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded), logits_of(expert))


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_tokenizer_is_saved_with_the_model(peft_config, expert_path, tokenizer, steps, tmp_path):
    trainer = LightReasonerTrainer(expert_path, config(tmp_path), train_dataset=steps, peft_config=peft_config)
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert saved.chat_template == tokenizer.chat_template
    assert saved.eos_token == tokenizer.eos_token


def test_the_tokenizer_that_was_passed_is_the_one_saved(expert, expert_path, steps, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    tokenizer.chat_template = "{{ messages }}"
    trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=steps, processing_class=tokenizer)
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages }}"


def test_a_checkpoint_of_an_adapter_holds_the_adapter_only(expert_path, steps, tmp_path):
    args = config(tmp_path, max_steps=1, save_steps=1)
    trainer = LightReasonerTrainer(expert_path, args, train_dataset=steps, peft_config=LORA)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()


class Worsening(LightReasonerTrainer):
    """Climbs the loss instead of descending it, so that every update is worse than the one before."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = -loss if model.training else loss
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_best_model_is_loaded_at_the_end(peft_config, expert_path, steps, tmp_path):
    args = config(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True
    )
    trainer = Worsening(expert_path, args, train_dataset=steps, eval_dataset=steps, peft_config=peft_config)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert trainer.state.best_metric == losses[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_a_model_is_tagged_with_the_method(expert_path, steps, tmp_path):
    trainer = LightReasonerTrainer(expert_path, config(tmp_path), train_dataset=steps)
    assert set(trainer.model.model_tags) == {"trl", "light-reasoner"}


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_model_card_names_tags_and_dataset(peft_config, expert_path, steps, tmp_path):
    trainer = LightReasonerTrainer(expert_path, config(tmp_path), train_dataset=steps, peft_config=peft_config)
    trainer.save_model()
    trainer.create_model_card(model_name="My model", dataset_name="someone/steps", tags="trl")
    card = ModelCard.load(tmp_path / "README.md")
    assert [card.data.tags.count(tag) for tag in ("trl", "light-reasoner")] == [1, 1]
    assert "My model" in card.text and "someone/steps" in card.text


def test_pushing_makes_the_model_card_with_trls_arguments(expert_path, steps, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: pushed.append(kwargs["folder_path"]))
    trainer = LightReasonerTrainer(expert_path, config(tmp_path), train_dataset=steps)
    trainer.hub_model_id = "someone/adapter"
    trainer.push_to_hub(dataset_name="someone/steps")
    assert pushed == [str(tmp_path)]
    assert "someone/steps" in ModelCard.load(tmp_path / "README.md").text
