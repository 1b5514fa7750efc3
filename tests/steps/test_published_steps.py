"""The published scripts' JSON lines become rows that train as they would have."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer, import_published_steps, sampling_metadata
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.steps.columns import read_columns
from trl_lightreasoner.steps.dataset import STEP_FEATURES, count_steps, raise_beta
from trl_lightreasoner.steps.prompt_format import PromptFormat
from trl_lightreasoner.steps.splits import load_split


GOLDEN = Path(__file__).parents[1] / "data" / "sampling_golden"


pytestmark = pytest.mark.usefixtures("propagated_logs")


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_lines(file: Path, lines: list) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def golden() -> list[dict]:
    return read_lines(GOLDEN / "samples.jsonl")


@pytest.fixture(scope="module")
def expert_golden() -> str:
    return str(GOLDEN / "expert")


@pytest.fixture
def lossy(steps, expert_path) -> list[dict]:
    """Lines of a tokenizer whose text, decoded and tokenized again, is not always what was generated."""
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    return [
        {
            "prompt_id": row["prompt"],
            "step": t,
            "prefix": tokenizer.decode(row["completion_ids"][:t]),
            "tokens": [tokenizer.decode([token_id]) for token_id in ids],
            "token_ids": ids,
            "weights": probs,
            "kl_divergence": row["kl_divergence"][t],
        }
        for row in steps
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
    ]


@torch.no_grad()
def published_loss(lines: list[dict], folder: str) -> float:
    """What the published training computes for each line alone, at the right position."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    for line in lines:
        messages = [
            {"role": "system", "content": "Please reason step by step."},
            {"role": "user", "content": line["prompt_id"]},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        context = tokenizer(prompt + line["prefix"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        logps = model(context).logits[0, -1, : len(tokenizer)].log_softmax(-1)
        pairs = zip(line["token_ids"], line["weights"], strict=True)
        losses.append(sum(p * (math.log(p) - logps[token_id].item()) for token_id, p in pairs))
    return sum(losses) / len(losses)


def trained_loss(dataset, folder: str, tmp_path: Path) -> float:
    args = LightReasonerConfig(str(tmp_path / "out"), beta=0, use_cpu=True, disable_tqdm=True, report_to="none")
    trainer = LightReasonerTrainer(folder, args, train_dataset=dataset, eval_dataset=dataset)
    return trainer.evaluate()["eval_loss"]


def test_the_loss_is_that_of_the_published_training(golden, expert_golden, tmp_path):
    dataset = import_published_steps(str(GOLDEN / "samples.jsonl"), str(tmp_path / "steps"), expert_golden)
    assert count_steps(dataset) == len(golden) > len(dataset)
    assert trained_loss(dataset, expert_golden, tmp_path) == pytest.approx(
        published_loss(golden, expert_golden), rel=1e-5
    )


def test_so_it_is_where_text_is_tokenized_otherwise_than_it_was_generated(lossy, expert_path, tmp_path, caplog):
    file = write_lines(tmp_path / "lossy.jsonl", lossy)
    dataset = import_published_steps(file, str(tmp_path / "steps"), expert_path)
    assert count_steps(dataset) == len(lossy)
    assert f"of {len(lossy)} prefixes have a different number of tokens than when they were sampled" in caplog.text
    assert trained_loss(dataset, expert_path, tmp_path) == pytest.approx(published_loss(lossy, expert_path), rel=1e-4)


def test_steps_of_a_question_share_a_row(golden, expert_golden, tmp_path):
    dataset = import_published_steps(str(GOLDEN / "samples.jsonl"), str(tmp_path / "steps"), expert_golden)
    questions = list(dict.fromkeys(line["prompt_id"] for line in golden))
    assert [prompt[1]["content"] for prompt in dataset["prompt"]] == questions
    for question, row in zip(questions, dataset, strict=True):
        lines = [line for line in golden if line["prompt_id"] == question]
        assert row["step_positions"] == [line["step"] for line in lines]  # a token is a character here
        assert row["completion"] == lines[-1]["prefix"]
        assert [sorted(ids) for ids in row["label_ids"]] == [line["token_ids"] for line in lines]
        assert all(probs == sorted(probs, reverse=True) for probs in row["label_probs"])


def test_what_the_file_does_not_say_stays_open(golden, expert_golden, tmp_path):
    dataset = import_published_steps(str(GOLDEN / "samples.jsonl"), str(tmp_path / "steps"), expert_golden)
    assert {name: dataset.features[name] for name in STEP_FEATURES} == STEP_FEATURES
    row = dataset[0]
    assert len(row["kl_divergence"]) == len(row["completion_ids"])
    known = [t for t, divergence in enumerate(row["kl_divergence"]) if divergence is not None]
    assert known == row["step_positions"]
    metadata = sampling_metadata(dataset)
    assert metadata["expert"]["model"] == expert_golden and metadata["imported_from"] == "samples.jsonl"
    assert metadata["amateur"] is None and metadata["settings"] == {"alpha": None, "beta": None}


def test_beta_can_be_raised_where_the_divergence_is_known(golden, expert_golden, tmp_path):
    dataset = import_published_steps(str(GOLDEN / "samples.jsonl"), str(tmp_path / "steps"), expert_golden)
    raised = raise_beta(dataset, 0.6)
    assert count_steps(raised) == sum(line["kl_divergence"] >= 0.6 for line in golden) < len(golden)
    assert sampling_metadata(raised)["settings"]["beta"] == 0.6
    without = [{name: value for name, value in golden[0].items() if name != "kl_divergence"}]
    dataset = import_published_steps(write_lines(tmp_path / "x.jsonl", without), str(tmp_path / "x"), expert_golden)
    with pytest.raises(ValueError, match="Row 0 has a kept step of unknown divergence"):
        raise_beta(dataset, 0.6)


def test_tokens_alone_are_enough(golden, expert_golden, tmp_path):
    lines = [{name: line[name] for name in ("prompt_id", "prefix", "tokens", "weights")} for line in golden]
    made = import_published_steps(write_lines(tmp_path / "a.jsonl", lines), str(tmp_path / "a"), expert_golden)
    whole = import_published_steps(str(GOLDEN / "samples.jsonl"), str(tmp_path / "b"), expert_golden)
    for name in ("prompt_ids", "completion_ids", "step_positions", "label_ids", "label_probs"):
        assert made[name][:] == whole[name][:]


def test_a_line_that_comes_twice_counts_twice(golden, expert_golden, tmp_path):
    file = write_lines(tmp_path / "twice.jsonl", [*golden[:3], golden[1]])
    dataset = import_published_steps(file, str(tmp_path / "steps"), expert_golden)
    assert dataset["step_positions"][:] == [[line["step"] for line in golden[:3]], [golden[1]["step"]]]


def test_other_answers_to_a_question_are_other_rows(golden, expert_golden, tmp_path):
    other = {**golden[2], "prefix": "1+1=2"}
    dataset = import_published_steps(
        write_lines(tmp_path / "two.jsonl", [*golden[:3], other]), str(tmp_path / "steps"), expert_golden
    )
    assert dataset["completion"][:] == [golden[2]["prefix"], "1+1=2"]


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e39])
def test_a_divergence_that_is_not_finite_is_unknown(number, golden, expert_golden, tmp_path, caplog):
    lines = [{**golden[0], "kl_divergence": number}, golden[1]]
    file = write_lines(tmp_path / "inf.jsonl", lines)
    dataset = import_published_steps(file, str(tmp_path / "steps"), expert_golden)
    known = [dataset[0]["kl_divergence"][line["step"]] for line in lines]
    assert known == [None, pytest.approx(golden[1]["kl_divergence"])]
    assert "1 of 2 divergences are not finite" in caplog.text
    assert [len(columns.positions) for columns in read_columns(dataset)] == [2]  # as a report reads them


@pytest.mark.parametrize("system_prompt", ["", "Think."])
def test_prompts_are_those_of_the_stored_format(system_prompt, golden, expert_golden, tmp_path):
    file = write_lines(tmp_path / "one.jsonl", golden[:1])
    dataset = import_published_steps(file, str(tmp_path / "steps"), expert_golden, system_prompt=system_prompt)
    prompt_format = PromptFormat(**sampling_metadata(dataset)["prompt_format"])
    assert dataset["prompt"][0] == prompt_format.make_prompt(golden[0]["prompt_id"])


LINE = {"prompt_id": "Why?", "step": 2, "prefix": "G0", "tokens": ["C", "a"], "token_ids": [38, 68]}
LINE |= {"weights": [0.75, 0.25], "kl_divergence": 0.5}


def changed(**changes):
    return lambda line: {name: value for name, value in {**line, **changes}.items() if value is not ...}


BAD_LINES = {
    "half a line": (lambda line: json.dumps(line)[:40], "it is not JSON"),
    "no object": (lambda line: [1], "it is not a JSON object"),
    "no prefix": (changed(prefix=...), "it has no `prefix`, the text before the step. Name the output of the"),
    "no question": (changed(prompt_id=""), "`prompt_id` must be the text of the question, got ''"),
    "no weights": (changed(weights=[]), "`weights` must be a list of numbers, got []"),
    "texts for weights": (changed(weights=["1"]), '`weights` must be a list of numbers, got ["1"]'),
    "no tokens": (changed(tokens=..., token_ids=...), "it has neither `token_ids` nor `tokens`"),
    "too few": (changed(weights=[1.0]), "it has 2 `tokens` and 1 `weights`"),
    "sum": (changed(weights=[0.5, 0.4]), "the label at step 2 sums to 0.9, not to 1"),
    "negative": (changed(weights=[-0.5, 1.5]), "the label at step 2 has a probability that is negative"),
    "huge": (changed(weights=[10**400, 0.25]), "`weights` must be a list of numbers, got [1000"),
    "negative divergence": (changed(kl_divergence=-0.5), "`kl_divergence` must be a number, 0 or more, got -0.5"),
    "half a character": (changed(prefix="G\ud800"), "`prefix` must be the text before the step, got 'G\\ud800'"),
    "deep": (lambda line: "[" * 100_000, "it is not JSON (maximum recursion depth exceeded"),
    "twice": (changed(tokens=["C", "C"], token_ids=[38, 38]), "the label at step 2 names a token twice: [38, 38]"),
    "out of range": (changed(tokens=..., token_ids=[38, 5000]), "label id 5000 at step 2 is outside the model's"),
    "another tokenizer": (
        changed(tokens=["C", "b"]),
        "token 68 is 'b' in the file, but 'a' for this tokenizer; name the expert that the file was sampled with",
    ),
    "unknown": (changed(tokens=["C", "xyz"], token_ids=...), "no tokens of this tokenizer read 'xyz'"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_in_one_sentence(spoil, reason, golden, expert_golden, tmp_path, capsys):
    bad = spoil(LINE)
    lines = [json.dumps(golden[0]), "", bad if isinstance(bad, str) else json.dumps(bad)]
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(lines))
    argv = ["import", str(file), "--output_dir", str(tmp_path / "steps"), "--expert", expert_golden]
    assert main(argv) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert sentence.startswith(f"lightreasoner import: error: Line 3 of {str(file)!r} cannot be used: {reason}")
    assert not (tmp_path / "steps").exists()


def test_bytes_that_are_no_text_are_a_bad_line(golden, expert_golden, tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b'{"prompt_id": "\xff"}\n')
    with pytest.raises(ValueError, match="Line 1 of .* cannot be used: it is not JSON"):
        import_published_steps(str(file), str(tmp_path / "steps"), expert_golden)


def test_an_empty_file_is_refused(expert_golden, tmp_path):
    (tmp_path / "samples.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no step. Name the output of the published sampling script."):
        import_published_steps(str(tmp_path / "samples.jsonl"), str(tmp_path / "steps"), expert_golden)


def test_another_chat_template_is_another_import(expert_golden, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(expert_golden)
    file = str(GOLDEN / "samples.jsonl")
    import_published_steps(file, str(tmp_path / "steps"), expert_golden, processing_class=tokenizer)
    tokenizer.chat_template = "! " + tokenizer.chat_template
    with pytest.raises(ValueError, match="was started with tokens = "):
        import_published_steps(file, str(tmp_path / "steps"), expert_golden, processing_class=tokenizer)


def test_the_program_leaves_a_folder_that_can_be_trained_on(golden, expert_golden, tmp_path, capsys):
    steps = str(tmp_path / "steps")
    argv = ["import", str(GOLDEN / "samples.jsonl"), "--output_dir", steps, "--expert", expert_golden]
    for _ in range(2):  # again, it gives the same back
        assert main(argv) == 0
        assert f"trajectories with {len(golden):,} kept steps are in {steps}." in capsys.readouterr().out
    assert count_steps(load_split(steps, None, "train")) == len(golden)
    assert main([*argv, "--system_prompt", "Think."]) == 2
    assert "was started with system_prompt = 'Please reason" in capsys.readouterr().err
    train = ["train", "--model_name_or_path", expert_golden, "--dataset_name", steps, "--use_cpu", "--max_steps", "1"]
    assert main([*train, "--output_dir", str(tmp_path / "adapter")]) == 0


def test_the_program_takes_the_file_first(expert_golden, tmp_path, capsys):
    assert main(["import", "--output_dir", str(tmp_path), "--expert", expert_golden, "--file", "a", "b"]) == 2
    assert "Unexpected argument 'b'. The file comes first: `lightreasoner import FILE" in capsys.readouterr().err


def test_the_program_names_a_file_that_is_missing(expert_golden, tmp_path, capsys):
    assert main(["import", "nowhere.jsonl", "--output_dir", str(tmp_path), "--expert", expert_golden]) == 2
    assert capsys.readouterr().err.strip().endswith("error: There is no file 'nowhere.jsonl'.")


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_template_that_prints_the_date_does_not_end_an_import_at_midnight(
    is_finished, expert_golden, tmp_path, today
):
    shutil.copytree(expert_golden, tmp_path / "expert")
    tokenizer = AutoTokenizer.from_pretrained(expert_golden)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "expert")

    def read() -> Dataset:
        return import_published_steps(str(GOLDEN / "samples.jsonl"), str(tmp_path / "steps"), str(tmp_path / "expert"))

    today(28)
    made = read()
    assert "28Nov2026" in tokenizer.decode(made["prompt_ids"][0])  # of which the golden tokenizer knows no blanks
    if not is_finished:
        shutil.rmtree(tmp_path / "steps" / "data")
    today(29)
    assert read().to_dict() == made.to_dict()
