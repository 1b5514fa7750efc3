"""The loss with an SFT dataset is two means over the whole update, whatever its cut."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    DataCollatorForLightReasoner,
    LightReasonerTrainer,
)

from ..conftest import QUESTIONS, make_model
from .test_packed_attention import make_trainer, naive  # noqa: F401
from .test_trainer_batches import LEARNING_RATE, config, flat, naive_losses


SFT_WEIGHT = 0.3
ANSWERS = ["7", "4", "Ben has 21 coins now", "180 miles", "7 is one"]
PROMPT = [{"role": "user", "content": "What is 2+2?"}]
DEMONSTRATIONS = Dataset.from_dict({"prompt": QUESTIONS[:5], "completion": ANSWERS})


@pytest.fixture(scope="module")
def rows(steps) -> Dataset:
    """8 rows of 1 to 8 kept steps."""
    rows = (steps.to_list() * 2)[:8]
    for i, row in enumerate(rows):
        for name in ("step_positions", "label_ids", "label_probs"):
            row[name] = row[name][: i + 1]
    return Dataset.from_list(rows)


def naive_cross_entropies(model, tokenizer, demonstrations) -> torch.Tensor:
    """The cross-entropy of every token of the completions, over the tokens of the tokenizer."""
    losses = []
    for row in demonstrations:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        completion.append(tokenizer.eos_token_id)
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        losses.append(cross_entropy(logits, torch.tensor(completion), reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4)])
def test_the_update_is_that_of_the_two_means(
    batch_size, accumulation, with_weights, rows, expert_path, tokenizer, tmp_path
):
    weights = [[(i + k) % 3 + 0.5 for k in range(len(row["step_positions"]))] for i, row in enumerate(rows)]
    model = AutoModelForCausalLM.from_pretrained(expert_path)
    before = flat(model)
    divergences = naive_losses(model, tokenizer, rows)
    # Beside 8 rows stand 5 demonstrations and the first 3 again
    cross_entropies = naive_cross_entropies(model, tokenizer, DEMONSTRATIONS.select([0, 1, 2, 3, 4, 0, 1, 2]))
    flat_weights = sum(weights, []) if with_weights else [1.0] * len(divergences)
    divergence = sum(w * each for w, each in zip(flat_weights, divergences, strict=True)) / sum(flat_weights)
    loss = divergence + SFT_WEIGHT * cross_entropies.mean()
    loss.backward()
    expected = torch.cat([(p - LEARNING_RATE * p.grad).detach().flatten() for p in model.parameters()])

    model = AutoModelForCausalLM.from_pretrained(expert_path)
    args = config(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        sft_weight=SFT_WEIGHT,
    )
    dataset = rows.add_column("step_weights", weights) if with_weights else rows
    trainer = LightReasonerTrainer(
        model, args, train_dataset=dataset, processing_class=tokenizer, sft_dataset=DEMONSTRATIONS
    )
    trainer.train()
    assert trainer.state.global_step == 1
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["sft_loss"] == pytest.approx(cross_entropies.mean().item(), rel=1e-5)
    assert logged["num_kept_steps"] == len(divergences)
    assert (flat(model) - expected).norm() < 1e-4 * (expected - before).norm()


def test_a_weight_of_0_trains_as_no_demonstrations_and_logs_alike(rows, expert_path, tmp_path):
    trained = []
    for kwargs, weight in (({}, None), ({"sft_dataset": DEMONSTRATIONS}, 0)):
        model = AutoModelForCausalLM.from_pretrained(expert_path)
        trainer = LightReasonerTrainer(model, config(tmp_path, sft_weight=weight), train_dataset=rows, **kwargs)
        trainer.train()
        names = ("loss", "entropy", "mean_token_accuracy", "num_kept_steps")
        trained.append((flat(model), [trainer.state.log_history[0][name] for name in names]))
    torch.testing.assert_close(trained[0][0], trained[1][0])
    assert trained[1][1] == pytest.approx(trained[0][1], rel=1e-5)


def test_demonstrations_leave_the_evaluation_alone(rows, expert, tmp_path):
    losses = []
    for kwargs in ({}, {"sft_dataset": DEMONSTRATIONS}):
        trainer = LightReasonerTrainer(expert, config(tmp_path), train_dataset=rows, eval_dataset=rows, **kwargs)
        losses += [trainer.evaluate()["eval_loss"], trainer.evaluate(trainer.train_dataset)["eval_loss"]]
    assert losses == losses[:1] * 4


def test_packed_batches_with_demonstrations_have_the_gradient_of_padded_ones(
    tokenizer,
    rows,
    tmp_path,
    naive,  # noqa: F811
):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    results = []
    for packs in (False, True):
        torch.manual_seed(0)
        kwargs = {"peft_config": lora, "sft_dataset": DEMONSTRATIONS}
        trainer = make_trainer(make_model(tokenizer), tokenizer, rows, tmp_path, packs, **kwargs)
        batch = trainer.data_collator(list(trainer.train_dataset))
        loss = trainer.training_step(trainer.model, batch, torch.tensor(36))
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        results.append((loss, torch.cat([parameter.grad.flatten() for parameter in trained])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_demonstrations_that_are_not_all_read_are_told(rows, expert, tmp_path, caplog, propagated_logs):
    args = config(tmp_path)
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows.select([0, 1]), sft_dataset=DEMONSTRATIONS)
    assert "Only the first 2 of the 5 rows of `sft_dataset` are used, one for each row" in caplog.text
    assert trainer.args.sft_weight == 1.0 and args.sft_weight is None


def test_tokens_beyond_max_length_are_left_out(rows, expert, tokenizer, tmp_path):
    length = max(len(row["prompt_ids"]) + row["step_positions"][-1] for row in rows)
    long = Dataset.from_dict({"prompt": ["2+2="], "completion": ["and" * 100]})
    trainer = LightReasonerTrainer(expert, config(tmp_path, max_length=length), train_dataset=rows, sft_dataset=long)
    row = trainer.train_dataset[0]
    assert len(row["sft_prompt_ids"]) + row["sft_step_positions"][-1] == length


@pytest.fixture
def dated(tokenizer):
    """A tokenizer whose chat template prints today's date."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    return tokenizer


@pytest.fixture
def steps_of_yesterday(expert, amateur, dated, tmp_path, today) -> Dataset:
    today(27)
    args = ContrastiveSamplingConfig(str(tmp_path / "steps"), max_new_tokens=4, beta=0.0)
    steps = ContrastiveStepSampler(expert, amateur, args, dated, dated).sample(Dataset.from_dict({"prompt": [PROMPT]}))
    assert "27 Nov 2026" in dated.decode(steps["prompt_ids"][0])
    today(28)
    return steps


def test_demonstrations_and_questions_show_the_date_of_the_steps(expert, dated, steps_of_yesterday, tmp_path):
    steps = steps_of_yesterday
    trainer = LightReasonerTrainer(
        expert,
        config(tmp_path),
        train_dataset=steps,
        processing_class=dated,
        sft_dataset=Dataset.from_dict({"prompt": [PROMPT], "completion": [[{"role": "assistant", "content": "4"}]]}),
        eval_questions=Dataset.from_dict({"prompt": [PROMPT], "answer": ["4"]}),
    )
    assert trainer.train_dataset["sft_prompt_ids"][0] == steps["prompt_ids"][0]
    assert trainer._questions.prompt_ids[0] == steps["prompt_ids"][0]


def test_questions_beside_streamed_steps_show_their_date(expert, dated, steps_of_yesterday, tmp_path):
    trainer = LightReasonerTrainer(
        expert,
        config(tmp_path, max_steps=1),
        train_dataset=steps_of_yesterday.to_iterable_dataset(),
        processing_class=dated,
        eval_questions=Dataset.from_dict({"prompt": [PROMPT], "answer": ["4"]}),
    )
    assert trainer._questions.prompt_ids[0] == steps_of_yesterday["prompt_ids"][0]


def test_demonstrations_beside_streamed_rows_are_refused(rows, expert, tmp_path):
    with pytest.raises(ValueError, match="^`sft_dataset` cannot be combined with a streamed `train_dataset`"):
        LightReasonerTrainer(
            expert,
            config(tmp_path, max_steps=1),
            train_dataset=rows.to_iterable_dataset(),
            sft_dataset=DEMONSTRATIONS,
        )


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), True])
def test_a_weight_that_cannot_be_meant_is_refused(weight, tmp_path):
    with pytest.raises(ValueError, match="^`sft_weight` must be a"):
        config(tmp_path, sft_weight=weight)


def test_a_weight_without_demonstrations_is_refused(rows, expert, tmp_path):
    with pytest.raises(ValueError, match="^`sft_weight` needs an `sft_dataset`"):
        LightReasonerTrainer(expert, config(tmp_path, sft_weight=0.5), train_dataset=rows)


def test_a_collator_that_leaves_the_demonstrations_out_is_refused(rows, expert, tmp_path):
    def collate(examples):
        names = ("prompt_ids", "completion_ids", "step_positions", "label_ids", "label_probs")
        return DataCollatorForLightReasoner()([{name: example[name] for name in names} for example in examples])

    trainer = LightReasonerTrainer(
        expert, config(tmp_path), data_collator=collate, train_dataset=rows, sft_dataset=DEMONSTRATIONS
    )
    with pytest.raises(ValueError, match="^The batches of the `data_collator` lack `sft_mask`"):
        trainer.train()
