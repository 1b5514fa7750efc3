"""Questions that are answered while a model is trained: the accuracy is that of its answers, and can be acted on."""

import importlib.util

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Qwen2Config, TrainingArguments

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
    grade,
)
from trl_lightreasoner.contrast import NonFiniteLogitsError
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.evaluation import answering
from trl_lightreasoner.generation.cuda_graphs import Generated
from trl_lightreasoner.generation.greedy import find_eos_ids, generate_greedy
from trl_lightreasoner.grading.answers import first_answer
from trl_lightreasoner.training import accuracy
from trl_lightreasoner.training.accuracy import EvalQuestions, as_questions
from trl_lightreasoner.training.combinations import check_answers
from trl_lightreasoner.vocabulary import model_vocabulary

from ..conftest import make_tokenizer


pytest.importorskip("math_verify")
pytestmark = pytest.mark.usefixtures("propagated_logs")

EXPERT, AMATEUR = str(PAIR / "expert"), str(PAIR / "amateur")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
NUM_QUESTIONS = 6


def problems(number: int, split: str) -> list[dict]:
    return make_problems(number, seed=0, split=split, kind_shares=KIND_SHARES)


@pytest.fixture(scope="module")
def demo_steps(tmp_path_factory) -> Dataset:
    """Kept steps of the bundled pair."""
    prompts = Dataset.from_list([{"prompt": as_prompt(problem)} for problem in problems(8, "train")])
    args = ContrastiveSamplingConfig(str(tmp_path_factory.mktemp("steps")), beta=0.1, max_new_tokens=64)
    return ContrastiveStepSampler(EXPERT, AMATEUR, args).sample(prompts)


@pytest.fixture(scope="module")
def questions() -> Dataset:
    """Some of which the bundled expert solves."""
    rows = problems(NUM_QUESTIONS, "test")
    return Dataset.from_list([{"prompt": as_prompt(row), "answer": f"So.\n#### {row['answer']}"} for row in rows])


def config(folder, **kwargs) -> LightReasonerConfig:
    kwargs = {"max_steps": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 2, "logging_steps": 1, **kwargs}
    kwargs = {"report_to": "none", "save_strategy": "no", "eval_max_new_tokens": 48, **kwargs}
    return LightReasonerConfig(str(folder), use_cpu=True, disable_tqdm=True, **kwargs)


def make_trainer(
    steps, questions, folder, model=EXPERT, peft_config=LORA, eval_dataset=None, callbacks=None, **kwargs
):
    return LightReasonerTrainer(
        model,
        config(folder, **kwargs),
        train_dataset=steps,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        callbacks=callbacks,
        eval_questions=questions,
    )


def evaluations(trainer) -> dict[int, list[float]]:
    """The accuracies that were logged, by update."""
    logged: dict[int, list[float]] = {}
    for log in trainer.state.log_history:
        if "eval_accuracy" in log:
            logged.setdefault(log["step"], []).append(log["eval_accuracy"])
    return logged


@pytest.fixture
def says(monkeypatch):
    """Let evaluations find, one after the other, shares of right answers as given; the last one stays."""

    def use(*accuracies: float) -> None:
        left = list(accuracies)

        def measure(self, model, vocabulary, accelerator):
            value = left.pop(0) if len(left) > 1 else left[0]
            return {"accuracy": value, "accuracy_standard_error": 0.1, "accuracy_num_cut": 0}

        monkeypatch.setattr(EvalQuestions, "measure", measure)

    return use


# What is measured


@torch.no_grad()
def naive_accuracy(model, tokenizer, questions, max_new_tokens: int = 48) -> tuple[float, int]:
    """Answers by `generate`, graded one by one, and how many did not end."""
    model, was_training = model.eval(), model.training
    right = cut = 0
    for row in questions:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        output = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        )
        completion = output[0, len(ids) :].tolist()
        right += grade(tokenizer.decode(completion, skip_special_tokens=True), row["answer"].split("#### ")[1]).correct
        cut += completion[-1] != tokenizer.eos_token_id
    model.train(was_training)
    return right / len(questions), cut


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "full"])
def test_the_accuracy_is_that_of_answers_graded_one_by_one(peft_config, demo_steps, questions, tmp_path):
    trainer = make_trainer(demo_steps, questions, tmp_path, peft_config=peft_config)
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    measured = []
    for _ in range(2):
        metrics = trainer.evaluate()
        expected, cut = naive_accuracy(trainer.model, tokenizer, questions)
        measured.append(expected)
        assert metrics["eval_accuracy"] == expected
        error = (expected * (1 - expected) / NUM_QUESTIONS) ** 0.5
        assert metrics["eval_accuracy_standard_error"] == pytest.approx(error)
        assert metrics["eval_accuracy_num_cut"] == cut
        trainer.train()
    assert 0 < measured[0] < 1


def test_the_first_point_is_the_experts(demo_steps, questions, tmp_path):
    expected, _ = naive_accuracy(
        AutoModelForCausalLM.from_pretrained(EXPERT), AutoTokenizer.from_pretrained(EXPERT), questions
    )
    trainer = make_trainer(demo_steps, questions, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = evaluations(trainer)
    assert list(logged) == [0, 2, 3] and logged[0] == [expected]
    assert all("eval_loss" not in log for log in trainer.state.log_history)


def test_beside_rows_all_is_logged_together(demo_steps, questions, tmp_path):
    trainer = make_trainer(
        demo_steps, questions, tmp_path, eval_dataset=demo_steps, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in logs] == [0, 2, 3]
    assert all({"eval_accuracy", "eval_accuracy_standard_error", "eval_kl_to_expert"} <= set(log) for log in logs)
    assert "eval_accuracy" not in trainer.evaluate(demo_steps)  # rows of the user's own alone
    assert "test_accuracy" not in trainer.predict(demo_steps).metrics


def test_beside_several_sets_of_rows_questions_are_answered_once(demo_steps, questions, tmp_path, monkeypatch):
    calls, measure = [], EvalQuestions.measure
    monkeypatch.setattr(EvalQuestions, "measure", lambda self, *args: calls.append(1) or measure(self, *args))
    sets = {"one": demo_steps, "other": demo_steps}
    metrics = make_trainer(demo_steps, questions, tmp_path, eval_dataset=sets).evaluate()
    assert {"eval_one_loss", "eval_other_loss", "eval_accuracy"} <= set(metrics)
    assert "eval_one_accuracy" not in metrics and len(calls) == 1


def test_answering_changes_nothing_about_training(demo_steps, questions, tmp_path):
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    weights = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            demo_steps, questions, tmp_path, peft_config=lora, eval_strategy=strategy, eval_steps=1, max_steps=3
        )
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *weights))


def test_under_autocast_adapters_answer_too(demo_steps, questions, tmp_path):
    trainer = make_trainer(
        demo_steps,
        questions,
        tmp_path,
        bf16=True,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        model_init_kwargs={"dtype": "bfloat16"},
    )
    trainer.train()
    assert list(evaluations(trainer)) == [0, 1]


def test_plain_text_is_graded_by_its_first_answer(expert_path, steps, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    texts = {"Question: 1+1?\nAnswer:": "2", "Question: 2+2?\nAnswer:": "4", "Question: 3+3?\nAnswer:": "7"}
    lengths = []

    class Decoder:
        def __init__(self, model, vocabulary, eos_ids):
            pass

        def __call__(self, prompt_ids, max_new_tokens):
            return Generated([self.go_on(ids)[:max_new_tokens] for ids in prompt_ids], None)

        def go_on(self, context):
            for prompt in texts:
                ids = tokenizer(prompt)["input_ids"]
                if context[: len(ids)] == ids:
                    answer = f" It is #### {2 * int(prompt[10])}\n\nQuestion: What is 1?\nAnswer: #### -1\n" + "x" * 90
                    lengths.append(len(context) - len(ids))
                    return tokenizer(answer)["input_ids"][lengths[-1] :]

    monkeypatch.setattr(accuracy, "GreedyDecoder", Decoder)
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 50)
    questions = Dataset.from_dict({"prompt": list(texts), "answer": list(texts.values())})
    trainer = make_trainer(steps, questions, tmp_path, model=expert_path, eval_max_new_tokens=150)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(2 / 3) and metrics["eval_accuracy_num_cut"] == 0
    assert set(lengths) == {0}  # nothing was made behind the piece that held the answer


def test_a_raw_prompt_is_read_as_the_sampler_reads_it(expert, expert_path, steps, prompts, tmp_path):
    questions = prompts.select(range(3)).add_column("answer", ["7", "4", "21"])
    trainer = make_trainer(steps, questions, tmp_path, model=expert_path, peft_config=None, eval_max_new_tokens=12)
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    vocabulary, eos_ids = model_vocabulary(tokenizer, expert.config.vocab_size), find_eos_ids(expert, tokenizer)
    right = 0
    for row in questions:
        (ids,) = generate_greedy(expert, [tokenizer(row["prompt"])["input_ids"]], vocabulary, eos_ids, 12)
        right += grade(first_answer(tokenizer.decode(ids, skip_special_tokens=True)), row["answer"]).correct
    assert trainer.evaluate()["eval_accuracy"] == right / 3


def test_a_list_of_answers_asks_for_all_of_them(tokenizer):
    questions = Dataset.from_dict({"prompt": ["2+2?"], "answer": [["#### 1", r"so \boxed{2}"]]})
    assert EvalQuestions(questions, tokenizer, Qwen2Config(), 8).references == [["1", "2"]]


def test_numbers_of_single_precision_are_the_references_that_were_written(tokenizer):
    features = Features({"prompt": Value("string"), "answer": Value("float32")})
    questions = Dataset.from_dict({"prompt": ["1/10?"], "answer": [0.1]}, features=features)
    assert EvalQuestions(questions, tokenizer, Qwen2Config(), 8).references == [["0.1"]]
    assert as_questions(questions, str)["answer"][:] == [0.1]


@pytest.mark.parametrize("number", [0, 2])
def test_questions_that_are_trained_on_are_told(number, demo_steps, questions, tmp_path, caplog):
    rows = make_trainer(demo_steps, None, tmp_path).train_dataset
    trained = [{"prompt": row["prompt"], "answer": "1"} for row in rows.select(range(number))]
    make_trainer(demo_steps, Dataset.from_list([*questions.to_list(), *trained]), tmp_path)
    said = f"{number} of {NUM_QUESTIONS + number} prompts of `eval_questions` are also trained on"
    assert (said in caplog.text) == (number > 0) == ("also trained on" in caplog.text)


def test_batches_are_halved_when_memory_runs_out(demo_steps, questions, tmp_path, monkeypatch, caplog):
    trainer = make_trainer(demo_steps, questions, tmp_path)
    expected = trainer.evaluate()["eval_accuracy"]
    complete, sizes = answering.Answering.complete, []

    def limited(self, prompt_ids, room):
        if len(prompt_ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(prompt_ids))
        return complete(self, prompt_ids, room)

    monkeypatch.setattr(answering.Answering, "complete", limited)
    assert trainer.evaluate()["eval_accuracy"] == expected
    assert sizes == [3] * 2 and "Memory ran out with a batch of 6 prompts. Continuing with 3." in caplog.text


def test_a_question_without_room_counts_as_wrong_with_a_warning(demo_steps, questions, tmp_path, caplog):
    long = Dataset.from_list([{"prompt": as_prompt({"question": "word " * 3000}), "answer": "1"}])
    rows = Dataset.from_list([*questions.to_list(), *long.to_list()])
    expected = make_trainer(demo_steps, questions, tmp_path).evaluate()["eval_accuracy"]
    metrics = make_trainer(demo_steps, rows, tmp_path).evaluate()
    assert "1 of 7 prompts of `eval_questions` are empty or leave no room in the model's context" in caplog.text
    assert metrics["eval_accuracy"] == pytest.approx(expected * 6 / 7)


def test_logits_that_are_not_finite_are_told_with_their_row(demo_steps, questions, tmp_path, monkeypatch):
    def overflow(self, prompt_ids, room):
        longest = max(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
        raise NonFiniteLogitsError("model", longest, "token 0 of an answer")

    monkeypatch.setattr(answering.Answering, "complete", overflow)
    trainer = make_trainer(demo_steps, questions, tmp_path)
    longest = max(range(len(questions)), key=lambda row: len(questions[row]["prompt"][-1]["content"]))
    with pytest.raises(NonFiniteLogitsError, match=f"answer to row {longest} of `eval_questions` are not finite"):
        trainer.evaluate()


# What can be done by it


def test_the_best_model_by_accuracy_is_loaded_at_the_end(says, demo_steps, questions, tmp_path):
    says(0.9, 0.1, 0.5, 0.3)
    trainer = make_trainer(
        demo_steps,
        questions,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    assert evaluations(trainer) == {0: [0.9], 1: [0.1], 2: [0.5], 3: [0.3]}
    assert trainer.state.best_metric == 0.5 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(EXPERT, dtype="float32"), tmp_path / "checkpoint-2"
    )
    for name, weight in best.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [((0.2, 0.1, 0.3, 0.9, 0.4), 4), ((0.2, 0.9, 0.3, 0.3, 0.3), 2), ((0.2, 0.9, 0.3, 0.3, 0.1), 2)],
)
def test_the_best_model_is_the_best_of_the_saved_ones(accuracies, best, says, demo_steps, questions, tmp_path, caplog):
    says(*accuracies)
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = make_trainer(
        demo_steps, questions, tmp_path, **schedule, load_best_model_at_end=True, metric_for_best_model="accuracy"
    )
    trainer.train()
    state = trainer.state
    assert (state.best_global_step, trainer.best_update, state.best_metric) == (best, best, accuracies[best])
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    weights = get_peft_model_state_dict(trainer.model)
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    said = f"`eval_accuracy` was 0.9 after update {accuracies.index(0.9)}, and is {accuracies[best]} in the best"
    assert f"A better model was not saved: {said}" in caplog.text and "made the model worse" not in caplog.text


@pytest.mark.parametrize(
    ("accuracies", "is_told"), [((0.6, 0.5, 0.4), True), ((0.5, 0.5, 0.4), False), ((0.4, 0.5, 0.4), False)]
)
def test_it_is_told_if_the_expert_was_better_than_the_best_model(
    accuracies, is_told, says, demo_steps, questions, tmp_path, caplog
):
    says(*accuracies)
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(
        demo_steps, questions, tmp_path, **schedule, load_best_model_at_end=True, metric_for_best_model="accuracy"
    )
    trainer.train()
    said = "`eval_accuracy` was 0.6 before the first update, and is 0.5 in the best checkpoint, which is loaded."
    assert (said in caplog.text) == is_told == ("Training made the model worse" in caplog.text)
    assert "was not saved" not in caplog.text


def test_the_better_of_two_values_is_the_lower_one_if_less_is_better(says, demo_steps, questions, tmp_path, caplog):
    says(0.2, 0.5, 0.4)
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": False}
    make_trainer(demo_steps, questions, tmp_path, **schedule, **best).train()
    assert "`eval_accuracy` was 0.2 before the first update, and is 0.4 in the best checkpoint" in caplog.text
    assert "was not saved" not in caplog.text


def test_that_the_expert_is_closest_to_itself_is_not_told(says, demo_steps, questions, tmp_path, caplog):
    says(0.5)
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "kl_to_expert"}
    trainer = make_trainer(demo_steps, questions, tmp_path, eval_dataset=demo_steps, **schedule, **best)
    trainer.train()
    assert trainer.best_update is not None and "Training made the model worse" not in caplog.text


def test_the_best_value_of_another_evaluation_is_not_resumed_from(says, demo_steps, questions, tmp_path):
    says(0.5)
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

    def resume(checkpoint=None, metric="accuracy", asked=questions, evaluated=demo_steps) -> None:
        settings = {**schedule, "load_best_model_at_end": True, "metric_for_best_model": metric}
        settings |= {"eval_dataset": evaluated, "max_steps": 1 if checkpoint is None else 2}
        make_trainer(demo_steps, asked, tmp_path, **settings).train(resume_from_checkpoint=checkpoint)

    resume()
    checkpoint = str(tmp_path / "checkpoint-1")
    refused = f"^Training cannot resume from '{checkpoint}': "
    with pytest.raises(ValueError, match=f"{refused}metric_for_best_model was 'accuracy' and is now 'kl_to_expert'"):
        resume(checkpoint, metric="kl_to_expert")
    others = [questions.select(range(2)), questions.map(lambda row: {"answer": f"{row['answer']}0"})]
    for other in (*({"asked": each} for each in others), {"evaluated": demo_steps.select(range(4))}):
        with pytest.raises(ValueError, match=f"{refused}the rows or questions of the evaluation have changed"):
            resume(checkpoint, **other)
    resume(checkpoint)


def test_beside_a_set_of_rows_early_stopping_counts_an_evaluation_once(says, demo_steps, questions, tmp_path):
    says(0.5)
    trainer = make_trainer(
        demo_steps,
        questions,
        tmp_path,
        eval_dataset={"rows": demo_steps},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        max_steps=8,
        metric_for_best_model="rows_loss",
        greater_is_better=True,  # the loss falls, so that the first is the best
    )
    trainer.train()
    losses = [log["eval_rows_loss"] for log in trainer.state.log_history if "eval_rows_loss" in log]
    assert losses == sorted(losses, reverse=True) and trainer.state.global_step == 3


@pytest.mark.parametrize("with_rows", [False, True])
def test_early_stopping_by_accuracy_stops(with_rows, says, demo_steps, questions, tmp_path, caplog):
    says(0.5, 0.4, 0.3)
    trainer = make_trainer(
        demo_steps,
        questions,
        tmp_path,
        eval_dataset=demo_steps if with_rows else None,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        max_steps=8,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert "did not find" not in caplog.text


def test_a_run_that_goes_on_has_one_first_point(demo_steps, questions, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(demo_steps, questions, tmp_path, **settings)
    whole.train()
    resumed = make_trainer(demo_steps, questions, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {update: len(values) for update, values in evaluations(resumed).items()} == {0: 1, 2: 1, 3: 1}
    assert evaluations(resumed) == evaluations(whole)
    assert resumed.args.eval_on_start is True  # another training of it begins with one


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"eval_strategy": "steps", "eval_steps": 3}, [0, 3]),
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": False}, [3]),
        ({}, []),
    ],
)
def test_when_questions_are_answered(kwargs, expected, says, demo_steps, questions, tmp_path):
    says(0.5)
    trainer = make_trainer(demo_steps, questions, tmp_path, **kwargs)
    trainer.train()
    assert list(evaluations(trainer)) == expected


def test_without_questions_nothing_is_evaluated_first(demo_steps, tmp_path):
    trainer = make_trainer(demo_steps, None, tmp_path, eval_dataset=demo_steps, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [3]


def test_plain_training_arguments_begin_with_the_expert_too(says, demo_steps, questions, tmp_path):
    says(0.5)
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "report_to": "none", "save_strategy": "no"}
    trainer = LightReasonerTrainer(
        EXPERT,
        TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=demo_steps,
        peft_config=LORA,
        eval_questions=questions,
    )
    trainer.train()
    assert list(evaluations(trainer)) == [0, 1]


# What is refused, before any weights are loaded


@pytest.fixture
def unloadable(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("weights were loaded before the mistake was found")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            {"prompt": ["2+2?"]},
            r"`eval_questions` must have the columns `prompt` and `answer`, got 'prompt'\.",
        ),
        (
            {"question": ["2+2?"], "answer": ["4"]},
            r"`eval_questions` must have the columns `prompt` and `answer`, got 'question', 'answer'\.",
        ),
        ({"prompt": [], "answer": []}, r"`eval_questions` holds no question\."),
        (
            {"prompt": ["2+2?", "3+3?"], "answer": ["4", " "]},
            r"Row 1 of `eval_questions` has no answer to grade by in its column 'answer': .* got ' '\.",
        ),
        (
            {"prompt": ["2+2?"], "answer": [None]},
            r"Row 0 of `eval_questions` has no answer to grade by in its column 'answer': .* got nothing",
        ),
        (
            {"prompt": ["2+2?"], "answer": ["2 and 2\nare 4."]},
            r"Row 0 of `eval_questions` has no answer to grade by in its column 'answer': .* after '####'",
        ),
        (
            {"prompt": [None, "2+2?"], "answer": ["4", "4"]},
            r"`eval_questions`: Row 0: `prompt` must be text or a list",
        ),
    ],
)
def test_questions_that_cannot_be_graded_are_refused(rows, sentence, unloadable, expert_path, steps, tmp_path):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        make_trainer(steps, Dataset.from_dict(rows), tmp_path, model=expert_path)


def test_what_is_no_dataset_is_refused(unloadable, expert_path, steps, tmp_path):
    streamed = IterableDataset.from_generator(lambda: iter([{"prompt": "2+2?", "answer": "4"}]))
    with pytest.raises(TypeError, match="`eval_questions` must be a `datasets.Dataset`, got `IterableDataset`"):
        make_trainer(steps, streamed, tmp_path, model=expert_path)


def test_messages_without_a_chat_template_are_refused(unloadable, questions, steps, expert_path, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="The prompts of `eval_questions` are messages, but the model's tokenizer"):
        LightReasonerTrainer(
            expert_path,
            config(tmp_path),
            train_dataset=steps,
            processing_class=tokenizer,
            peft_config=LORA,
            eval_questions=questions,
        )


def test_the_loss_of_no_rows_cannot_choose_the_best_model(unloadable, questions, steps, expert_path, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ValueError, match="Set `metric_for_best_model='accuracy'`, or hold out kept steps"):
        make_trainer(steps, questions, tmp_path, model=expert_path, load_best_model_at_end=True, **settings)


def test_questions_do_not_go_with_fsdp(unloadable, questions, steps, expert_path, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ValueError, match="^`eval_questions` cannot be combined with FSDP: a model with split weights cannot"
    ):
        make_trainer(steps, questions, tmp_path, model=expert_path)


@pytest.mark.parametrize(("stage", "is_refused"), [(2, False), (3, True)])
def test_questions_do_not_go_with_zero_3(stage, is_refused, tmp_path, monkeypatch):
    class Settings:
        def is_zero3(self):
            return stage == 3

    class Plugin:
        hf_ds_config = Settings()

    args = config(tmp_path)
    monkeypatch.setattr(args, "deepspeed_plugin", Plugin())
    if not is_refused:
        check_answers(args, has_rows=False)
        return
    with pytest.raises(ValueError, match="`eval_questions` cannot be .* DeepSpeed ZeRO-3: .* Launch with DDP"):
        check_answers(args, has_rows=False)


def test_math_verify_that_is_not_installed_is_named(unloadable, questions, steps, expert_path, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "math_verify" else find(name, *args)
    )
    with pytest.raises(ImportError, match=r"^Grading needs math-verify: `pip install 'trl-lightreasoner\[eval\]'`\.$"):
        make_trainer(steps, questions, tmp_path, model=expert_path)


# From a file's rows


@pytest.mark.parametrize(
    ("question", "sentence"), [(" ", "is empty in its column"), (5, "must have text or messages in its column")]
)
def test_a_question_that_cannot_be_asked_is_refused(question, sentence):
    with pytest.raises(ValueError, match=f"^Row 0 {sentence} 'question'"):
        as_questions(Dataset.from_list([{"question": question, "answer": "4"}]), str)


def test_questions_are_put_into_the_form_of_the_prompts():
    rows = Dataset.from_dict({"question": ["2+2?"], "answer": ["4"], "id": [7]})
    made = as_questions(rows, lambda question: f"Question: {question}\nAnswer:")
    assert made.to_list() == [{"prompt": "Question: 2+2?\nAnswer:", "answer": "4"}]
    messages = [{"role": "user", "content": "2+2?"}]
    made = as_questions(Dataset.from_dict({"prompt": [messages], "answer": ["4"]}), lambda question: question)
    assert made.to_list() == [{"prompt": messages, "answer": "4"}]
    with pytest.raises(ValueError, match="columns `question` or `prompt`, and `answer`. The columns are"):
        as_questions(Dataset.from_dict({"question": ["2+2?"]}), str)
