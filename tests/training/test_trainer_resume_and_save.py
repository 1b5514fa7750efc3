import copy
import json

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
)


pytestmark = pytest.mark.usefixtures("propagated_logs")


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


# Six rows, two an update: three updates an epoch
TWO_EPOCHS = [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 2}]
OTHER_SHARE = "uses a different fraction of the dataset than at the checkpoint. Training ends after 6 updates in total"


@pytest.mark.parametrize("asked", TWO_EPOCHS, ids=["updates", "epochs"])
@pytest.mark.parametrize(
    ("batch", "accumulation", "epochs"),
    [(1, 2, None), (2, 2, "1.00 of the data instead of 0.67"), (1, 1, "0.33 of the data instead of 0.67")],
)
def test_the_number_of_updates_stays_when_resuming_with_another_batch(
    asked, batch, accumulation, epochs, expert_path, steps, tmp_path, caplog
):
    assert len(steps) == 6
    made = {"gradient_accumulation_steps": 1, "save_steps": 1, **asked}
    straight = LightReasonerTrainer(expert_path, config(tmp_path / "a", **made), train_dataset=steps)
    straight.train()
    other = {**made, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    resumed = LightReasonerTrainer(expert_path, config(tmp_path / "b", **other), train_dataset=steps)
    caplog.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == resumed.state.max_steps == straight.state.max_steps == 6
    if epochs is None:  # the same rows an update
        assert OTHER_SHARE not in caplog.text
        weights = weights_of(straight.model)
        for name, weight in weights_of(resumed.model).items():
            torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)
    else:
        assert caplog.text.count(f"{OTHER_SHARE} and resumes at epoch {epochs}") == 1
    # And once more
    again = LightReasonerTrainer(expert_path, config(tmp_path / "c", **other), train_dataset=steps)
    caplog.clear()
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert again.state.global_step == 6
    assert same(again.model, weights_of(resumed.model))


@pytest.mark.parametrize("more", [{"max_steps": 7}, {"max_steps": -1, "num_train_epochs": 2.3}])
def test_a_finished_run_goes_on_when_more_is_asked_for(more, expert_path, steps, tmp_path, caplog):
    asked = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 1}
    LightReasonerTrainer(expert_path, config(tmp_path, **asked), train_dataset=steps).train()
    trainer = LightReasonerTrainer(expert_path, config(tmp_path, **{**asked, **more}), train_dataset=steps)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7
    assert "complete" not in caplog.text and OTHER_SHARE not in caplog.text


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("max_steps", [3, 2, 1])  # three updates are an epoch, after two begins no other
@pytest.mark.parametrize("streams", [False, True])
def test_resuming_a_finished_run_says_so(peft_config, max_steps, streams, expert_path, steps, tmp_path, caplog):
    dataset = steps.to_iterable_dataset() if streams else steps
    asked = {"gradient_accumulation_steps": 1}

    def trainer_of(number: int) -> LightReasonerTrainer:
        args = config(tmp_path, **asked, max_steps=number)
        return LightReasonerTrainer(expert_path, args, train_dataset=dataset, peft_config=copy.copy(peft_config))

    finished = trainer_of(max(max_steps, 2))
    finished.train()
    for checkpoint in (True, str(tmp_path / f"checkpoint-{max(max_steps, 2)}")):
        trainer = trainer_of(max_steps)
        caplog.clear()
        trainer.train(resume_from_checkpoint=checkpoint)
        (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("trl_lightreasoner")]
        assert warning == (
            f"Training is complete: the checkpoint has {max(max_steps, 2)} of {max_steps} updates. Raise `max_steps` "
            "or `num_train_epochs` to continue."
        )
        assert trainer.state.global_step == max(max_steps, 2)
        assert same(trainer.model, weights_of(finished.model))
    # Without a checkpoint it begins anew
    trainer.train()
    assert trainer.state.global_step == max_steps


def test_a_checkpoint_says_how_many_epochs_were_asked_for(expert_path, steps, tmp_path):
    args = config(tmp_path, max_steps=-1, num_train_epochs=0.3, gradient_accumulation_steps=1)
    LightReasonerTrainer(expert_path, args, train_dataset=steps).train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RememberTraining"]["attributes"]["num_train_epochs"] == 0.3


def test_a_checkpoint_that_says_nothing_of_epochs_is_gone_on_from(expert_path, steps, tmp_path):
    asked = {"gradient_accumulation_steps": 1, "save_steps": 2}
    LightReasonerTrainer(expert_path, config(tmp_path, **asked, max_steps=2), train_dataset=steps).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["RememberTraining"]
    file.write_text(json.dumps(state))
    trainer = LightReasonerTrainer(expert_path, config(tmp_path, **asked, max_steps=4), train_dataset=steps)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and (tmp_path / "checkpoint-4").is_dir()


def test_epochs_that_follow_from_max_steps_are_not_taken_for_asked_for(expert_path, steps, tmp_path, caplog):
    asked = {"gradient_accumulation_steps": 1}  # three updates an epoch
    LightReasonerTrainer(expert_path, config(tmp_path, **asked, max_steps=4), train_dataset=steps).train()
    args = config(tmp_path, **asked, max_steps=-1, num_train_epochs=2)
    trainer = LightReasonerTrainer(expert_path, args, train_dataset=steps)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert "complete" not in caplog.text and OTHER_SHARE not in caplog.text


@pytest.mark.parametrize("updates, warns", [(2, False), (4, True)])  # three read all rows once
def test_streamed_rows_that_begin_anew_are_told_of(updates, warns, expert_path, steps, tmp_path, caplog):
    rows = steps.to_iterable_dataset()
    asked = {"gradient_accumulation_steps": 1, "max_steps": 8, "save_steps": updates}
    LightReasonerTrainer(expert_path, config(tmp_path, **asked), train_dataset=rows).train()
    trainer = LightReasonerTrainer(expert_path, config(tmp_path, **asked), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{updates}"))
    assert ("resumes from the first row" in caplog.text) == warns


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


@pytest.mark.parametrize(("is_chat", "passes_tokenizer", "is_told"), [(1, 0, 1), (1, 1, 0), (0, 0, 0)])
def test_another_chat_template_than_that_of_the_sampling_is_told(
    is_chat, passes_tokenizer, is_told, expert_path, amateur_path, tmp_path, caplog
):
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    tokenizer.chat_template = "Be brief." + tokenizer.chat_template
    prompt = [{"role": "user", "content": "2+2?"}] if is_chat else "2+2?"
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0)
    steps = ContrastiveStepSampler(expert_path, amateur_path, args, processing_class=tokenizer).sample([prompt])
    own = {"processing_class": tokenizer} if passes_tokenizer else {}
    LightReasonerTrainer(expert_path, config(tmp_path / "out"), train_dataset=steps, peft_config=LORA, **own)
    assert ("sampled with another chat template than that of the model's tokenizer" in caplog.text) == bool(is_told)


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
