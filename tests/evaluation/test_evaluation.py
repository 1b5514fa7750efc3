"""From problems to a table. Where it matters what the model says, a decoder stands in that says it."""

import importlib.util
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from trl_lightreasoner import EvaluationConfig, evaluate
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.evaluation import answering, candidate
from trl_lightreasoner.evaluation.candidate import Candidate
from trl_lightreasoner.evaluation.evaluation import Evaluation
from trl_lightreasoner.evaluation.sets import read_problems
from trl_lightreasoner.generation import cuda_graphs
from trl_lightreasoner.generation.cuda_graphs import Generated
from trl_lightreasoner.generation.greedy import find_eos_ids, generate_greedy
from trl_lightreasoner.grading.verdicts import Verdict
from trl_lightreasoner.processes import Processes
from trl_lightreasoner.steps.prompt_format import SYSTEM_PROMPT, PromptFormat
from trl_lightreasoner.vocabulary import model_vocabulary

from ..conftest import die_at_call, find_port, join_group, make_model
from ..evaluation.test_sets import FILES, write


pytest.importorskip("math_verify")

NUM_PROBLEMS = 10


pytestmark = pytest.mark.usefixtures("propagated_logs")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    """Sums, whose answers differ, and multiple choice."""
    folder = tmp_path_factory.mktemp("data")
    sums = [
        {"question": f"{'So. ' * (i % 3)}What is {i}+{i * i}?", "answer": f"#### {i + i * i}"}
        for i in range(NUM_PROBLEMS)
    ]
    write(folder / "gsm8k.jsonl", sums)
    write(folder / "mmlu_stem.jsonl", FILES["mmlu_stem"])
    return str(folder)


@pytest.fixture
def config(data_dir, tmp_path):
    def make(**kwargs) -> EvaluationConfig:
        defaults = {"output_dir": str(tmp_path / "out"), "benchmarks": ["gsm8k"], "data_dir": data_dir}
        defaults |= {"max_new_tokens": 8, "per_device_batch_size": 4, "num_workers": 1}
        return EvaluationConfig(**{**defaults, **kwargs})

    return make


@pytest.fixture
def says(monkeypatch, tokenizer):
    """Let models answer by a function from the prompt's text; returns the prompts that were read."""

    def use(answer, after: str = "<|im_end|>") -> list[str]:
        read, going = [], []

        class Decoder:
            way = "by heart"

            def __init__(self, model, vocabulary, eos_ids, vllm=None):
                pass

            def __call__(self, prompt_ids, max_new_tokens):
                return Generated([self.go_on(ids)[:max_new_tokens] for ids in prompt_ids], None)

            def go_on(self, context: list[int]) -> list[int]:
                for prompt, whole in going:
                    if context[: len(prompt)] == prompt:
                        return whole[len(context) - len(prompt) :]
                read.append(tokenizer.decode(context))
                going.append((context, tokenizer(answer(read[-1]) + after)["input_ids"]))
                return going[-1][1]

        monkeypatch.setattr(candidate, "GreedyDecoder", Decoder)
        return read

    return use


def solve(prompt: str) -> int:
    one, other = re.findall(r"(\d+)\+(\d+)\?", prompt)[-1]
    return int(one) + int(other)


def answers_of(folder: str | Path, name: str = "gsm8k", role: str = "model") -> list[dict]:
    return Dataset.from_parquet(str(Path(folder, role, f"{name}.parquet"))).to_list()


# Answers


def test_answers_are_those_of_greedy_decoding(config, expert_path, expert):
    tokenizer = AutoTokenizer.from_pretrained(expert_path)  # loading gives it Qwen2's rules for words
    args = config()
    made = evaluate(expert_path, args)
    rows = answers_of(args.output_dir)
    vocabulary, eos_ids = model_vocabulary(tokenizer, expert.config.vocab_size), find_eos_ids(expert, tokenizer)
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        (expected,) = generate_greedy(expert, [ids], vocabulary, eos_ids, 8)
        assert row["completion"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert row["num_tokens"] == len(expected)
        assert row["ended"] == (expected[-1] in eos_ids)
    assert [row["gold"] for row in rows] == [[str(i + i * i)] for i in range(NUM_PROBLEMS)]
    scores = made.results["benchmarks"]["gsm8k"]
    assert scores["num_problems"] == NUM_PROBLEMS
    assert scores["model"]["num_cut"] == sum(not row["ended"] for row in rows)
    assert scores["model"]["mean_tokens"] == sum(row["num_tokens"] for row in rows) / NUM_PROBLEMS


@pytest.mark.parametrize("role", ["model", "baseline"])
def test_a_model_whose_numbers_overflow_has_no_accuracy(role, config, expert, tokenizer):
    broken = make_model(tokenizer).half()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight *= 60000  # beyond what float16 can hold
    kwargs = {"processing_class": tokenizer, "baseline_processing_class": tokenizer}
    models = {"model": expert, "baseline": make_model(tokenizer, seed=1), role: broken}
    with pytest.raises(ValueError, match=f"^The {role}'s logits at .* are not finite. Load the {role} in bfloat16"):
        evaluate(models["model"], config(prompt_style="raw"), models["baseline"], **kwargs)


def test_logits_that_are_not_finite_are_told_with_the_question(config, tokenizer, tmp_path):
    broken = make_model(tokenizer)
    with torch.no_grad():
        broken.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("~")] = float("nan")
    questions = [f"What is {i}+{i}?{'~' * (i == 5)}{' Say.' * i}" for i in range(8)]
    write(tmp_path / "own.jsonl", [{"question": question, "answer": "7"} for question in questions])
    own = config(benchmarks=[str(tmp_path / "own.jsonl")], prompt_style="raw")
    message = r"^The model's logits at token 0 of an answer to problem 5 of Own, 'What is 5\+5\?~.*', are not finite\."
    with pytest.raises(ValueError, match=message):
        evaluate(broken, own, processing_class=tokenizer)


def test_an_answer_that_is_right_counts(config, says, expert):
    says(lambda prompt: f"So it is \\boxed{{{solve(prompt)}}}.")
    made = evaluate(expert, config(max_new_tokens=40))
    assert made.results["benchmarks"]["gsm8k"]["model"]["accuracy"] == 1.0
    assert made.results["benchmarks"]["gsm8k"]["model"]["num_cut"] == 0


def test_a_file_of_questions_is_answered_as_a_benchmark_is(config, says, expert, tmp_path):
    says(lambda prompt: f"So it is \\boxed{{{solve(prompt)}}}.")
    rows = [{"question": f"What is {i}+1?", "answer": i + (1 if i else 5)} for i in range(4)]
    write(tmp_path / "own.jsonl", rows)
    made = evaluate(expert, config(benchmarks=str(tmp_path / "own.jsonl"), max_new_tokens=40))
    assert made.results["benchmarks"]["own"]["model"]["accuracy"] == 0.75
    assert "| Own " in made.table() and made.eval_results() == []


def test_of_multiple_choice_the_letter_counts(config, says, expert):
    prompts = says(lambda prompt: "\\boxed{C}")
    args = config(benchmarks="mmlu_stem", max_new_tokens=40)
    made = evaluate(expert, args)
    assert made.results["benchmarks"]["mmlu_stem"]["model"]["accuracy"] == 0.5
    assert any("Which is prime?\nAnswer Choices: (A) 4 (B) 6 (C) 7 (D) 9" in prompt for prompt in prompts)


def test_a_base_model_is_graded_on_its_first_answer(config, says, expert, monkeypatch):
    def run_on(prompt: str) -> str:
        own = "\n\nQuestion: What is 1+1?\nAnswer: It is \\boxed{-1}.\n\n"
        return f" It is \\boxed{{{solve(prompt)}}}.{own}{'x' * 90}"

    prompts = says(run_on, after="")
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 60)
    args = config(prompt_style="raw", max_new_tokens=200)
    made = evaluate(expert, args)
    scores = made.results["benchmarks"]["gsm8k"]["model"]
    assert scores["accuracy"] == 1.0
    assert scores["num_cut"] == 0  # the first answer came to its end
    assert scores["mean_tokens"] == 60  # and nothing was made after the look that found it
    assert len(prompts) == NUM_PROBLEMS
    assert "Question: What is 3+9?\nAnswer:" in prompts
    # The same words under a chat template are an answer withdrawn and boxed anew
    made = evaluate(expert, config(output_dir=f"{args.output_dir}-chat", max_new_tokens=400))
    assert made.results["benchmarks"]["gsm8k"]["model"]["accuracy"] == 0.0


def test_a_first_answer_that_is_being_withdrawn_is_not_the_end(config, says, expert, tokenizer, monkeypatch):
    begun = " The answer is 99. Let me"
    says(lambda prompt: f"{begun} recheck that. The answer is {solve(prompt)}. And so on and so forth.", after="")
    # The first look is in the middle of it
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", len(tokenizer(begun)["input_ids"]))
    made = evaluate(expert, config(prompt_style="raw", max_new_tokens=100))
    assert made.results["benchmarks"]["gsm8k"]["model"]["accuracy"] == 1.0


@pytest.mark.parametrize("style", ["chat", "raw"])
def test_pieces_are_one_completion(config, expert_path, monkeypatch, tmp_path, style):
    whole = config(prompt_style=style, max_new_tokens=20, output_dir=str(tmp_path / "whole"))
    evaluate(expert_path, whole)
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 3)
    evaluate(expert_path, config(prompt_style=style, max_new_tokens=20))
    assert answers_of(tmp_path / "out") == answers_of(tmp_path / "whole")
    assert max(row["num_tokens"] for row in answers_of(tmp_path / "out")) > 6


@pytest.mark.parametrize("style", ["chat", "raw"])
def test_answers_in_slots_are_those_in_pieces(config, expert_path, monkeypatch, tmp_path, style):
    evaluate(expert_path, config(prompt_style=style, max_new_tokens=20, output_dir=str(tmp_path / "pieces")))
    monkeypatch.setattr("trl_lightreasoner.generation.completions.why_no_graph", lambda model: None)
    fills, fill = [], cuda_graphs._Decoder.fill
    monkeypatch.setattr(cuda_graphs._Decoder, "fill", lambda self, *args: fills.append(args) or fill(self, *args))
    evaluate(expert_path, config(prompt_style=style, max_new_tokens=20, per_device_batch_size=3))
    assert answers_of(tmp_path / "out") == answers_of(tmp_path / "pieces")
    assert len(fills) > 1


def test_a_piece_has_as_many_rows_as_the_memory_holds(config, says, expert, monkeypatch):
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 10)
    monkeypatch.setattr(answering, "find_batch_size", lambda model, longest, num_rows, count: 7 if longest < 40 else 3)
    says(lambda prompt: "x" * 45 + f"\\boxed{{{solve(prompt)}}}", after="")
    sizes, call = [], candidate.GreedyDecoder.__call__

    def counted(self, prompt_ids, max_new_tokens):
        sizes.append((max(map(len, prompt_ids)) + max_new_tokens < 40, len(prompt_ids)))
        return call(self, prompt_ids, max_new_tokens)

    monkeypatch.setattr(candidate.GreedyDecoder, "__call__", counted)
    evaluate(
        expert, config(prompt_style="raw", prompt_template="{question}", max_new_tokens=50, per_device_batch_size=None)
    )
    assert {fits for fits, _ in sizes} == {True, False}
    assert all(size <= (7 if fits else 3) for fits, size in sizes)


def test_long_answers_of_several_batches_share_one(config, says, expert, monkeypatch):
    monkeypatch.setattr(answering, "TOKENS_A_PIECE", 30)
    monkeypatch.setattr(answering, "find_batch_size", lambda model, longest, num_rows, count: 3)
    says(lambda prompt: f"{'x' * 60 * (solve(prompt) % 3 == 0)}\\boxed{{{solve(prompt)}}}")
    sizes, call = [], candidate.GreedyDecoder.__call__

    def counted(self, prompt_ids, max_new_tokens):
        sizes.append(len(prompt_ids))
        return call(self, prompt_ids, max_new_tokens)

    monkeypatch.setattr(candidate.GreedyDecoder, "__call__", counted)
    made = evaluate(expert, config(max_new_tokens=100, per_device_batch_size=None))
    assert made.results["benchmarks"]["gsm8k"]["model"]["accuracy"] == 1.0
    assert sizes[:4] == [3, 3, 3, 1]  # a first piece of all ten
    num_long = sum((i + i * i) % 3 == 0 for i in range(NUM_PROBLEMS))
    assert sum(sizes[4:]) % num_long == 0 and max(sizes[4:]) == 3


def test_an_answer_that_is_cut_is_counted_and_graded(config, says, expert):
    says(lambda prompt: f"#### {solve(prompt)}\n" + "x" * 90, after="")
    made = evaluate(expert, config(max_new_tokens=30))
    scores = made.results["benchmarks"]["gsm8k"]["model"]
    assert (scores["accuracy"], scores["num_cut"], scores["mean_tokens"]) == (1.0, NUM_PROBLEMS, 30)


def test_a_prompt_without_room_counts_as_wrong(config, says, expert, caplog, tokenizer):
    says(lambda prompt: f"\\boxed{{{solve(prompt)}}}")
    lengths = [len(tokenizer(f"{'So. ' * (i % 3)}What is {i}+{i * i}?")["input_ids"]) for i in range(NUM_PROBLEMS)]
    args = config(prompt_style="raw", prompt_template="{question}", max_new_tokens=40)
    expert.config.max_position_embeddings = max(lengths)
    num_longest = lengths.count(max(lengths))
    made = evaluate(expert, args)
    assert f"{num_longest} of 10 prompts of GSM8K leave no room in the model's context" in caplog.text
    rows = answers_of(args.output_dir)
    empty = [i for i, row in enumerate(rows) if row["num_tokens"] == 0]
    assert empty == [i for i, length in enumerate(lengths) if length == max(lengths)]
    assert not any(rows[i]["correct"] or rows[i]["ended"] for i in empty)
    assert made.results["benchmarks"]["gsm8k"]["num_problems"] == NUM_PROBLEMS
    evaluate(expert, args)  # and goes on from there


def test_an_adapter_and_its_base_are_two_models(config, expert, expert_path, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(expert, lora).save_pretrained(tmp_path / "adapter")
    args = config()
    made = evaluate(str(tmp_path / "adapter"), args, baseline=expert_path)
    adapted, base = (answers_of(args.output_dir, role=role) for role in ("model", "baseline"))
    assert [row["prompt"] for row in adapted] == [row["prompt"] for row in base]
    assert [row["completion"] for row in adapted] != [row["completion"] for row in base]
    assert made.results["model"]["adapter"] == str(tmp_path / "adapter")
    assert made.results["baseline"]["adapter"] is None


def test_an_adapter_and_the_base_in_its_memory_are_no_two_models(config, expert, tokenizer):
    adapted = get_peft_model(expert, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for pair in ((adapted, expert), (expert, adapted), (expert, expert)):
        with pytest.raises(ValueError, match="^The model and the baseline are one model in memory, so both would"):
            evaluate(pair[0], config(), pair[1], tokenizer, tokenizer)


def test_a_base_with_an_adapter_on_its_layers_is_not_evaluated_as_the_base(config, expert, expert_path, tokenizer):
    adapted = get_peft_model(expert, LoraConfig(target_modules=["q_proj"]))
    for pair, role in (((expert, None), "model"), ((expert_path, expert), "baseline")):
        with pytest.raises(ValueError, match=f"^The {role} has an adapter on its layers, .* Pass the `PeftModel`"):
            evaluate(pair[0], config(), pair[1], tokenizer, tokenizer)
    with adapted.disable_adapter():
        evaluate(expert, config(max_samples=1), None, tokenizer)


def test_memory_that_runs_out_halves_the_batch(config, expert_path, monkeypatch, caplog, tmp_path):
    expected = config(output_dir=str(tmp_path / "expected"))
    evaluate(expert_path, expected)
    complete, sizes = answering.Answering.complete, []

    def limited(self, prompt_ids, room):
        if len(prompt_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(prompt_ids))
        return complete(self, prompt_ids, room)

    monkeypatch.setattr(answering.Answering, "complete", limited)
    args = config()
    evaluate(expert_path, args)
    assert sizes == [2] * 5 and "Memory ran out with a batch of 4 prompts. Continuing with 2." in caplog.text
    assert answers_of(args.output_dir) == answers_of(expected.output_dir)


# Prompts


def test_the_prompt_of_qwen_math(config):
    assert config().prompt_format().make_prompt("What is 2+2?") == [
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": "What is 2+2?"},
    ]
    assert config(system_prompt="").prompt_format().make_prompt("What is 2+2?") == [
        {"role": "user", "content": "What is 2+2?"}
    ]


def test_a_template_of_the_users_own(config, tmp_path):
    (tmp_path / "template.txt").write_text("{x} Q: {question}\nA:\n")
    for template in ("{x} Q: {question}\nA:", str(tmp_path / "template.txt")):
        assert config(prompt_style="raw", prompt_template=template).prompt_format().make_prompt("$\\frac{1}{2}$?") == (
            "{x} Q: $\\frac{1}{2}$?\nA:"
        )
    *_, message = config(prompt_template="{question} Think.").prompt_format().make_prompt("2+2?")
    assert message == {"role": "user", "content": "2+2? Think."}


def test_the_model_reads_the_chat_template_once(config, says, expert):
    prompts = says(lambda prompt: "7")
    evaluate(expert, config(max_samples=1))
    assert prompts == [
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nWhat is 0+0?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]


# Going on


def test_a_run_that_was_broken_off_goes_on(config, expert_path, amateur_path, monkeypatch, tmp_path, caplog):
    left_alone = config(output_dir=str(tmp_path / "left alone"))
    expected = evaluate(expert_path, left_alone, baseline=amateur_path)
    complete, sizes = answering.Answering.complete, []

    def break_off(self, prompt_ids, room):
        if len(sizes) == 4:  # in the second batch of the baseline
            raise RuntimeError("power cut")
        sizes.append(len(prompt_ids))
        return complete(self, prompt_ids, room)

    args = config()
    with monkeypatch.context() as patch:
        patch.setattr(answering.Answering, "complete", break_off)
        with pytest.raises(RuntimeError, match="power cut"):
            evaluate(expert_path, args, baseline=amateur_path)
    made = evaluate(expert_path, args, baseline=amateur_path)
    assert "Resuming: the model has already answered all 10 problems (GSM8K)." in caplog.text
    assert "Resuming: the baseline has already answered 4 of 10 problems (GSM8K)." in caplog.text
    assert made.results == expected.results
    for role in ("model", "baseline"):
        assert answers_of(args.output_dir, role=role) == answers_of(left_alone.output_dir, role=role)


def test_a_run_that_has_ended_is_graded_anew_and_answers_nothing(config, says, expert, monkeypatch):
    prompts = says(lambda prompt: "\\boxed{2}")
    args = config(max_new_tokens=40)
    first = evaluate(expert, args)
    count = len(prompts)
    assert evaluate(expert, args).results == first.results
    assert len(prompts) == count
    # Another benchmark joins
    evaluate(expert, config(max_new_tokens=40, benchmarks=["gsm8k", "mmlu_stem"]))
    assert len(prompts) == count + 2


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens = 8, but it is now 9"),
        ({"system_prompt": "Think."}, "system_prompt = "),
        ({"prompt_style": "raw"}, "prompt_style = 'chat', but it is now 'raw'"),
        ({"prompt_template": "Q: {question}"}, "prompt_template = "),
        ({"max_samples": 3}, "number of problems = 10, but it is now 3"),
        ({"dtype": "bfloat16"}, "model dtype = 'float32', but it is now 'bfloat16'"),
        ("weights", "model weights = "),
        ("gold", "rows (SHA-256) = "),
    ],
    ids=str,
)
def test_another_model_or_setting_in_the_folder_is_refused(
    changed, name, config, expert_path, amateur_path, data_dir, tmp_path
):
    evaluate(expert_path, config())
    model, settings = expert_path, changed if isinstance(changed, dict) else {}
    if changed == "weights":
        model = amateur_path
    elif changed == "gold":
        rows = [json.loads(line) for line in Path(data_dir, "gsm8k.jsonl").read_text().splitlines()]
        write(tmp_path / "other" / "gsm8k.jsonl", [*rows[:-1], {**rows[-1], "answer": "#### 0"}])
        settings = {"data_dir": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=f"was started with {re.escape(name)}"):
        evaluate(model, config(**settings))
    evaluate(model, config(**settings, overwrite_output_dir=True))


def answer(model: str, args: EvaluationConfig, rank: int, world_size: int, port: int, kill: int | None):
    """One process of `world_size`, which may kill itself at its `kill`-th rename."""
    torch.set_num_threads(1)
    if world_size > 1:
        join_group(rank, world_size, port)
        PartialState(cpu=True)
    if kill is not None:
        die_at_call("replace", kill)
    made = evaluate(model, args)
    assert made.results["benchmarks"]["gsm8k"]["num_problems"] == NUM_PROBLEMS  # every process has the whole


@pytest.fixture
def in_processes(forkserver, expert_path):
    def run(args: EvaluationConfig, world_size: int, kill: int | None = None) -> list[int]:
        """Exit statuses of the processes, by rank."""
        port = find_port()
        processes = [
            forkserver.Process(target=answer, args=(expert_path, args, rank, world_size, port, kill))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode is not None, "a process hangs"
        return [process.exitcode for process in processes]

    return run


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_goes_on(world_size, in_processes, config, expert_path, tmp_path):
    left_alone = config(output_dir=str(tmp_path / "left alone"), per_device_batch_size=2)
    evaluate(expert_path, left_alone)
    args = config(per_device_batch_size=2)
    # Renames: of run.json, of two batches; the third batch is lost
    assert in_processes(args, 1, kill=4) == [-signal.SIGKILL]
    assert len(list((tmp_path / "out" / "model" / "gsm8k" / "shards").glob("*.parquet"))) == 2
    assert in_processes(args, world_size) == [0] * world_size
    assert answers_of(args.output_dir) == answers_of(left_alone.output_dir)
    results = (json.loads(Path(each.output_dir, "results.json").read_text()) for each in (args, left_alone))
    assert next(results) == next(results)


def test_two_processes_answer_what_one_does(in_processes, config, expert_path, tmp_path):
    alone = config(output_dir=str(tmp_path / "alone"))
    evaluate(expert_path, alone)
    assert in_processes(config(), 2) == [0, 0]
    assert answers_of(tmp_path / "out") == answers_of(tmp_path / "alone")


# What comes out


def test_an_answer_that_cannot_be_graded_is_counted_and_shown(
    data_dir, expert_path, tmp_path, monkeypatch, capsys, propagated_logs, caplog
):
    failures = ["over 5 seconds", "RecursionError", "over 5 seconds", *[None] * 7]

    def grade_all(items, num_workers=None):
        return [Verdict("1", False, failure) for _, failure in zip(items, failures, strict=True)]

    monkeypatch.setattr(answering, "grade_all", grade_all)
    flags = ("--data_dir", data_dir, "--benchmarks", "gsm8k", "--output_dir", tmp_path / "out", "--max_new_tokens", 2)
    assert main([str(part) for part in ("eval", "--model", expert_path, *flags)]) == 0
    reasons = "over 5 seconds (2), RecursionError (1)"
    assert f"3 of 10 answers could not be graded: {reasons}. They count as wrong." in caplog.text
    said = "3 of 10 answers of the model could not be graded and count as wrong. The column `failure` of"
    assert f"{said} {tmp_path / 'out' / 'model'} says why." in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["benchmarks"]["gsm8k"]["model"]["num_undecided"] == 3
    assert [row["failure"] for row in answers_of(tmp_path / "out")] == failures


@pytest.fixture
def compared(config, says, expert, amateur, monkeypatch):
    """Of ten sums the model has 0 to 6 right, the baseline 4 to 7."""

    def grade_all(items, num_workers=None):
        asked.append(items)
        right = range(7) if len(asked) == 1 else range(4, 8)
        return [Verdict("1", i in right) for i in range(len(items))]

    asked = []
    says(lambda prompt: "\\boxed{1}")
    monkeypatch.setattr(answering, "grade_all", grade_all)
    args = config(max_new_tokens=40)
    return evaluate(expert, args, baseline=amateur), args


def test_a_pair_is_compared_problem_by_problem(compared):
    scores = compared[0].results["benchmarks"]["gsm8k"]
    assert (scores["model"]["accuracy"], scores["baseline"]["accuracy"]) == (0.7, 0.4)
    difference = scores["difference"]
    assert difference["difference"] == pytest.approx(0.3)
    assert (difference["gained"], difference["lost"]) == (4, 1)
    assert difference["p_value"] == 0.375  # 2 * (1 + 5) / 32
    error = ((5 / 10 - 0.3**2) / 10) ** 0.5
    assert difference["low"] == pytest.approx(0.3 - 1.959964 * error)


def test_the_table(compared):
    lines = compared[0].table().split("\n")
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        *("benchmark", "problems", "baseline", "model", "difference (95 %)", "p", "tokens", "cut")
    ]
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:6] == ["GSM8K", "10", "40.0 +- 15.5", "70.0 +- 14.5", "+30.0 (-9.7 to +69.7)", "0.38"]
    assert cells[7] == "0.0% / 0.0%"
    assert len({len(line) for line in lines}) == 1


def test_the_results_are_a_file(compared):
    made, args = compared
    assert json.loads(Path(args.output_dir, "results.json").read_text()) == made.results
    assert made.results["settings"]["max_new_tokens"] == 40
    assert {"trl-lightreasoner", "math-verify", "transformers"} <= set(made.results["versions"])
    (row, *_) = answers_of(args.output_dir)
    assert {"prompt", "completion", "extracted", "gold", "correct", "num_tokens", "ended"} <= set(row)
    assert (row["extracted"], row["correct"]) == ("1", True)


def test_the_summary_is_flat_numbers(compared):
    summary = compared[0].summary()
    assert all(isinstance(value, int | float) for value in summary.values())
    assert summary["eval/gsm8k/accuracy"] == 0.7
    assert summary["eval/gsm8k/baseline_accuracy"] == 0.4
    assert summary["eval/gsm8k/difference"] == pytest.approx(0.3)
    assert summary["eval/gsm8k/difference_p_value"] == 0.375


def test_a_model_card_takes_the_accuracies(compared):
    card = ModelCardData(model_name="adapter", eval_results=compared[0].eval_results())
    (index,) = card.to_dict()["model-index"]
    (result,) = index["results"]
    assert result["dataset"] == {"name": "GSM8K", "type": "openai/gsm8k"}
    assert result["metrics"][0]["value"] == 70.0


@pytest.mark.parametrize(
    ("max_samples", "told"), [(None, ""), (10, " on the first 10 problems"), (100, "")], ids=["all", "some", "fewer"]
)
def test_the_metadata_tell_if_some_problems_alone_were_answered(max_samples, told, compared):
    settings = {**compared[0].results["settings"], "max_samples": max_samples}
    (result,) = Evaluation({**compared[0].results, "settings": settings}).eval_results()
    assert result.metric_name == f"accuracy (zero-shot, greedy, pass@1){told}"


def test_the_average_counts_each_benchmark_once(config, says, expert, amateur):
    says(lambda prompt: f"\\boxed{{{min(solve(prompt), 60)}}}" if "+" in prompt else "\\boxed{C}")
    made = evaluate(expert, config(benchmarks="gsm8k mmlu_stem", max_new_tokens=40), baseline=amateur)
    average = made.results["average"]
    assert average["model"]["accuracy"] == pytest.approx((0.8 + 0.5) / 2)  # 8 + 64 and 9 + 81 are beyond 60
    assert average["model"]["standard_error"] == pytest.approx((0.8 * 0.2 / 10 + 0.5 * 0.5 / 2) ** 0.5 / 2)
    assert average["difference"]["difference"] == 0.0
    assert made.table().split("\n")[-1].startswith("| average ")


# The program


@pytest.fixture
def flags(expert_path, data_dir, tmp_path):
    return (
        *("eval", "--model", expert_path, "--data_dir", data_dir, "--benchmarks", "gsm8k,mmlu_stem"),
        *("--output_dir", tmp_path / "out", "--max_new_tokens", 8, "--per_device_batch_size", 4, "--num_workers", 1),
    )


def test_the_program_prints_the_table(flags, amateur_path, capsys, tmp_path):
    assert main([str(flag) for flag in (*flags, "--baseline", amateur_path)]) == 0
    stdout = capsys.readouterr().out
    assert "| GSM8K " in stdout and "| MMLU-STEM " in stdout and "| average " in stdout
    num_cut = sum(not row["ended"] for name in ("gsm8k", "mmlu_stem") for row in answers_of(tmp_path / "out", name))
    assert f"{num_cut} of 12 answers of the model did not end within 8 tokens" in stdout
    assert f"Answers and results.json are in {tmp_path / 'out'}." in stdout


@pytest.fixture
def unloadable(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(candidate, "load_model", fail)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--benchmarks", "gsm9k"], "There is no benchmark 'gsm9k'. There are gsm8k, math500, math, svamp, asdiv, "),
        (["--benchmarks", ","], "`--benchmarks` names none. There are gsm8k, "),
        (["--benchmarks", "svamp"], "There is no file of SVAMP in "),
        (["--data_dir", "nowhere"], "The folder 'nowhere' of `--data_dir` does not exist."),
        (
            ["--data_dir", "{bad}"],
            "GSM8K in '{bad}/gsm8k.jsonl' has no column 'answer'. It needs question, answer",
        ),
        (["--max_samples", "0"], "`--max_samples` must be a whole number, 1 or more, got 0."),
        (["--max_new_tokens", "0"], "`--max_new_tokens` must be a whole number, 1 or more, got 0."),
        (["--num_workers", "-1"], "`--num_workers` must be a whole number, 1 or more, got -1."),
        (["--prompt_style", "poem"], "Argument --prompt_style: invalid choice: 'poem'"),
        (["--prompt_template", "Q:"], "`--prompt_template` must be text with {question} in it, or a file with such"),
        (["--prompt_template", "{bad}/empty.txt"], "The prompt template '{bad}/empty.txt' has no {question} in it."),
        (["--model", "nowhere"], "The model 'nowhere' cannot be found."),
        (["--baseline", "nowhere"], "The baseline 'nowhere' cannot be found."),
        (
            ["--baseline", "{bad}/plain"],
            "The tokenizer of the baseline has no chat template. Set `--prompt_style raw`",
        ),
        (["--output_dir", "{bad}/empty.txt"], "Cannot write to '{bad}/empty.txt/model/gsm8k'"),
        (["--load_in_4bit", "--load_in_8bit"], "`--load_in_4bit` and `--load_in_8bit` cannot be combined."),
        (["--use_vllm"], "`--use_vllm` needs vLLM: "),
        (["--model_init_kwargs", "[1]"], "`--model_init_kwargs` must be a dict or a JSON object, such as"),
        (["--max_sample", "1"], "There is no flag `--max_sample`. Did you mean `--max_samples`?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_weights_are_loaded(
    argv, sentence, flags, unloadable, capsys, tmp_path, amateur, amateur_path
):
    bad = tmp_path / "bad"
    write(bad / "gsm8k.jsonl", [{"question": "a"}])
    (bad / "empty.txt").write_text("")
    amateur.save_pretrained(bad / "plain")
    tokenizer = AutoTokenizer.from_pretrained(amateur_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bad / "plain")
    assert main([str(flag).replace("{bad}", str(bad)) for flag in (*flags, *argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if ": error: " in line]
    assert line.startswith(f"lightreasoner eval: error: {sentence.replace('{bad}', str(bad))}")


def test_math_verify_that_is_not_installed_is_named(flags, unloadable, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "math_verify" else find(name, *args),
    )
    assert main([str(flag) for flag in flags]) == 2
    assert capsys.readouterr().err.endswith(
        "error: Grading needs math-verify: `pip install 'trl-lightreasoner[eval]'`.\n"
    )


def test_in_4_bits(config, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model(tokenizer, hidden_size=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--load_in_4bit", "--max_samples", 2, "--max_new_tokens", 4]
    flags += ["--data_dir", config().data_dir, "--benchmarks", "gsm8k", "--output_dir", tmp_path / "out"]
    assert main(["eval", *map(str, flags)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["quantization"]["load_in_4bit"] == "True"


def test_model_and_baseline_read_the_same_date_whenever_they_are_started(
    config, expert_path, tmp_path, today, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template

    def run() -> dict[str, list[str]]:
        evaluate(expert_path, config(), expert_path, tokenizer, tokenizer)
        files = {role: str(tmp_path / "out" / role / "gsm8k.parquet") for role in ("model", "baseline")}
        return {role: Dataset.from_parquet(file)["prompt"][:] for role, file in files.items()}

    answer = Candidate.answer

    def killed_before_the_baseline(candidate):
        if candidate.role == "baseline":
            raise KeyboardInterrupt
        answer(candidate)

    today(28)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Candidate, "answer", killed_before_the_baseline)
        run()
    assert not (tmp_path / "out" / "baseline" / "gsm8k" / "run.json").exists()
    today(29)
    prompts = run()
    assert prompts["model"] == prompts["baseline"]
    assert all("28 Nov 2026" in prompt for prompt in prompts["model"])
    today(30)
    assert run() == prompts


@pytest.mark.parametrize("is_other", [False, True])
def test_a_baseline_with_another_chat_template_is_told(is_other, config, expert_path, caplog):
    tokenizers = [AutoTokenizer.from_pretrained(expert_path) for _ in range(2)]
    if is_other:
        tokenizers[1].chat_template = "Be brief." + tokenizers[1].chat_template
    evaluate(expert_path, config(max_samples=1), expert_path, *tokenizers)
    assert ("The model and the baseline read other prompts (GSM8K)" in caplog.text) == is_other


@pytest.mark.parametrize("style", ["chat", "raw"])
def test_a_baseline_that_was_trained_in_another_prompt_format_is_told(style, config, expert_path, tmp_path, caplog):
    baseline = shutil.copytree(expert_path, tmp_path / "baseline")
    PromptFormat(style, system_prompt=SYSTEM_PROMPT if style == "chat" else "").save(baseline)
    evaluate(expert_path, config(max_samples=1), baseline=str(baseline))
    said = (
        "The baseline was trained on prompts with plain text 'Question: {question}\\nAnswer:', but is evaluated with"
    )
    assert (said in caplog.text) == (style == "raw")


@pytest.fixture
def messages(tmp_path) -> str:
    """A file of two questions that are messages, one of them with the system prompt."""
    system, user = {"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is 3+4?"}
    write(tmp_path / "own.jsonl", [{"prompt": each, "answer": "7"} for each in ([system, user], [user])])
    return str(tmp_path / "own.jsonl")


def test_questions_that_are_messages_are_not_graded_as_plain_text(messages, config, expert, unloadable):
    with pytest.raises(ValueError, match="^The questions of Own are messages, .* or set `prompt_style='chat'`.$"):
        evaluate(expert, config(benchmarks=[messages], prompt_style="raw"))


@pytest.mark.parametrize(("system_prompt", "number"), [(None, 1), ("Be brief.", 2), ("", 0)])
def test_messages_without_the_system_prompt_are_counted(system_prompt, number, messages, config, expert, caplog):
    evaluate(expert, config(benchmarks=[messages], system_prompt=system_prompt))
    assert caplog.text.count("questions of Own are messages without the system prompt") == (number > 0)
    assert (f"{number} of 2 questions of Own" in caplog.text) == (number > 0)


def test_what_stands_beside_the_messages_of_a_problem_reaches_the_template(config, expert_path):
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    tokenizer.chat_template += "{% if shout is defined %}{{ shout }}{% endif %}"
    rows = {"question": ["2+2?", "3+3?"], "answer": ["4", "6"], "chat_template_kwargs": [{"shout": "NOW"}, None]}
    problems = {"held_out": read_problems(Dataset.from_dict(rows), "question", "answer")}
    args = config(prompt_style="chat")
    candidate = Candidate("model", expert_path, tokenizer, None, args, problems, Processes())
    texts = tokenizer.batch_decode(candidate.asked["held_out"].prompt_ids)
    assert [text.endswith("NOW") for text in texts] == [True, False]
