"""Rows in the format of each benchmark's file, written here."""

import json
import math
import re

import pytest
from datasets import Dataset, Features, List, Value

from trl_lightreasoner.evaluation import sets
from trl_lightreasoner.evaluation.sets import (
    BENCHMARKS,
    ROW_FEATURES,
    load_benchmark,
    load_problems,
    name_benchmarks,
    read_answers,
    read_gold,
    read_problems,
)
from trl_lightreasoner.grading.verdicts import grade


# As the files have them, with columns that nobody needs
FILES = {
    "gsm8k": [
        {"question": "Ann has 3 pies and buys 4. How many has she? ", "answer": "3+4=<<3+4=7>>7\n#### 7"},
        {"question": "What does the house cost?", "answer": "#### 1 is wrong.\n#### 1,200"},
    ],
    "math500": [
        {"problem": "What is $1/2$?", "solution": r"\boxed{9}", "answer": r"\frac{1}{2}", "level": 2},
        {"problem": "Name a set.", "solution": "", "answer": r"\{1, 2\}", "level": 5},
    ],
    "math": [
        {"problem": "Halve $x$.", "solution": r"First \boxed{2}, then \boxed{\frac{x}{2}}.", "type": "Algebra"},
        {"problem": "How many?", "solution": r"So $\boxed 7$ of them, in $\{a\}$.", "type": "Algebra"},
    ],
    "svamp": [
        {"Body": "There are 290 bananas in 2 groups", "Question": "How big is each?", "Answer": 145.0, "ID": "chal-1"},
        {"Body": "A pie costs $ 3.", "Question": "How much is half?", "Answer": 1.5, "ID": "chal-2"},
    ],
    "asdiv": [
        {"body": "Seven apples and two.", "question": "How many apples?", "answer": "9 (apples)", "formula": "7+2=9"},
        {"body": "Two numbers.", "question": "Which?", "answer": "3 (boys); 4 (girls)", "formula": ""},
        {"body": "Ben won.", "question": "Who won?", "answer": "Ben", "formula": ""},
        {"body": "It leaves at 3.", "question": "When?", "answer": "3:30 p.m.", "formula": ""},
    ],
    "minerva_math": [
        {"problem": "Find $s$ in cm.", "solution": r"\[ s=\boxed{1.6} \mathrm{~cm} \]", "type": "Astronomy"},
        {"problem": "Find $L$.", "solution": r"$L \simeq \boxed{4.5e33}$ ergs", "type": "Astronomy"},
    ],
    "olympiadbench": [
        {"question": "Find $N$.", "context": None, "final_answer": ["2"], "unit": None, "error": None},
        {"question": "How far?", "context": "A train.", "final_answer": ["$4.2$"], "unit": "km", "error": "1e-1"},
        {"question": "All roots?", "context": None, "final_answer": ["$1$", "$2$"], "unit": None, "error": None},
    ],
    "mmlu_stem": [
        {"question": "Which is prime?", "type": "math", "choices": ["4", "6", "7", "9"], "answer": 2},
        {"question": "Yes?", "type": "math", "choices": ["True", "False"], "answer": 0},
    ],
}
# question, gold, tolerance, unit
EXPECTED = {
    "gsm8k": [
        ("Ann has 3 pies and buys 4. How many has she?", ["7"], None, None),
        ("What does the house cost?", ["1200"], None, None),
    ],
    "math500": [("What is $1/2$?", [r"\frac{1}{2}"], None, None), ("Name a set.", [r"\{1, 2\}"], None, None)],
    "math": [("Halve $x$.", [r"\frac{x}{2}"], None, None), ("How many?", ["7"], None, None)],
    "svamp": [
        ("There are 290 bananas in 2 groups. How big is each?", ["145"], None, None),
        ("A pie costs $ 3. How much is half?", ["1.5"], None, None),
    ],
    "asdiv": [
        ("Seven apples and two. How many apples?", ["9"], None, "apples"),
        ("Ben won. Who won?", ["Ben"], None, None),
        ("It leaves at 3. When?", ["3:30 p.m."], None, None),
    ],
    "minerva_math": [("Find $s$ in cm.", ["1.6"], None, None), ("Find $L$.", ["4.5e33"], None, None)],
    "olympiadbench": [
        ("Find $N$.", ["2"], None, None),
        ("A train.\nHow far?", ["$4.2$"], pytest.approx(0.1 / 4.2), "km"),
        ("All roots?", ["$1$", "$2$"], None, None),
    ],
    "mmlu_stem": [
        ("Which is prime?\nAnswer Choices: (A) 4 (B) 6 (C) 7 (D) 9", ["C"], None, None),
        ("Yes?\nAnswer Choices: (A) True (B) False", ["A"], None, None),
    ],
}


def write(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, rows in FILES.items():
        write(folder / f"{name}.jsonl", rows)
    return str(folder)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_every_benchmark(name, data_dir):
    made = load_benchmark(name, data_dir)
    assert made.features == ROW_FEATURES
    rows = [(row["question"], row["gold"], row["tolerance"], row["unit"]) for row in made]
    assert rows == EXPECTED[name]
    assert set(made["kind"]) == {"choice" if name == "mmlu_stem" else "math"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_is_asked_for_what_the_docs_say(name, monkeypatch):
    asked = []

    def load_split(*args):
        asked.append(args)
        return Dataset.from_list(FILES[name])

    monkeypatch.setattr(sets, "load_split", load_split)
    made = load_benchmark(name)
    assert asked == [BENCHMARKS[name].dataset]
    assert [row["gold"] for row in made] == [gold for _, gold, *_ in EXPECTED[name]]


def test_svamp_with_numbers_as_text(tmp_path):
    rows = [{"Body": "a", "Question": "b?", "Answer": text} for text in ("145.0", "1.5", "1000000")]
    write(tmp_path / "svamp.jsonl", rows)
    assert [row["gold"] for row in load_benchmark("svamp", str(tmp_path))] == [["145"], ["1.5"], ["1000000"]]


def test_without_the_hub_the_folder_of_the_files_is_asked_for(monkeypatch):
    def fail(*args):
        raise ValueError("The dataset 'openai/gsm8k' cannot be loaded.")

    monkeypatch.setattr(sets, "load_split", fail)
    with pytest.raises(ValueError, match=r"cannot be loaded\. Or name the folder of a file of GSM8K in `data_dir`\.$"):
        load_benchmark("gsm8k")


def test_minerva_as_the_hub_names_its_columns(tmp_path):
    write(tmp_path / "minerva_math.jsonl", [{"question": "Find $s$.", "answer": "1.6"}])
    (row,) = load_benchmark("minerva_math", str(tmp_path))
    assert (row["question"], row["gold"]) == ("Find $s$.", ["1.6"])


@pytest.mark.parametrize("place", ["svamp.jsonl", "benchmarks/svamp.jsonl", "svamp/test.jsonl", "svamp.json"])
def test_places_of_a_file(place, tmp_path):
    write(tmp_path / place, FILES["svamp"])
    assert len(load_benchmark("svamp", str(tmp_path))) == 2


def test_the_first_problems_only(data_dir):
    assert load_benchmark("asdiv", data_dir, max_samples=2)["question"][:] == [q for q, *_ in EXPECTED["asdiv"][:2]]
    assert len(load_benchmark("asdiv", data_dir, max_samples=9)) == 3


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        (
            "svamp",
            {"Body": "a", "Question": "b"},
            "SVAMP in '{file}' has no column 'Answer'. It needs Body, Question, Answer, and has Body, Question.",
        ),
        (
            "math",
            {"problem": "a"},
            "MATH in '{file}' has no column 'answer or solution'. It needs problem | question, answer | solution, "
            "and has problem.",
        ),
        (
            "gsm8k",
            {"question": "a", "answer": "7"},
            "Row 0 of GSM8K in '{file}' is invalid: its answer has no '####'. Fix or remove it.",
        ),
        (
            "math",
            {"problem": "a", "solution": "7"},
            r"Row 0 of MATH in '{file}' is invalid: its solution has no \boxed{} answer. Fix or remove it.",
        ),
        (
            "svamp",
            {"Body": "a", "Question": "b", "Answer": "many"},
            "Row 0 of SVAMP in '{file}' is invalid: its answer 'many' is not a number. Fix or remove it.",
        ),
        (
            "mmlu_stem",
            {"question": "a", "choices": ["b"], "answer": 1},
            "Row 0 of MMLU-STEM in '{file}' is invalid: its answer 1 is not the index of one of 1 choices. "
            "Fix or remove it.",
        ),
        (
            "gsm8k",
            {"question": " ", "answer": "#### 7"},
            "Row 0 of GSM8K in '{file}' is invalid: its question or its answer is empty. Fix or remove it.",
        ),
        *(
            (name, row, f"Row 0 of {title} in '{{file}}' is invalid: {reason}. Fix or remove it.")
            for name, title, row, reason in [
                ("math500", "MATH-500", {"problem": "a", "answer": None}, "its column 'answer' is empty"),
                ("gsm8k", "GSM8K", {"question": None, "answer": "#### 7"}, "its column 'question' is empty"),
                ("svamp", "SVAMP", {"Body": "a", "Question": "b", "Answer": None}, "its column 'Answer' is empty"),
                ("asdiv", "ASDiv", {"body": "a", "question": "b", "answer": None}, "its column 'answer' is empty"),
                (
                    "olympiadbench",
                    "OlympiadBench",
                    {"question": "a", "final_answer": ["1", None], "unit": None, "error": None},
                    'its answer must be a list of texts, got ["1", null]',
                ),
                (
                    "mmlu_stem",
                    "MMLU-STEM",
                    {"question": "a", "choices": ["b", "c"], "answer": "B"},
                    "its answer 'B' is not the index of one of 2 choices",
                ),
            ]
        ),
        (
            "asdiv",
            {"body": "a", "question": "b", "answer": "1; 2"},
            "ASDiv in '{file}' has no usable row.",
        ),
    ],
)
def test_what_is_not_as_expected_is_told(name, row, sentence, tmp_path):
    file = tmp_path / f"{name}.jsonl"
    write(file, [row])
    with pytest.raises(ValueError, match=f"^{re.escape(sentence.replace('{file}', str(file)))}$"):
        load_benchmark(name, str(tmp_path))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError) as error:
        load_benchmark("math", str(tmp_path))
    assert str(error.value) == (
        f"There is no file of MATH in {str(tmp_path)!r}. It must be one of math.jsonl, benchmarks/math.jsonl, "
        "math/test.jsonl (or .json, .parquet)."
    )
    with pytest.raises(ValueError, match="^The folder '.*nowhere' of `data_dir` does not exist.$"):
        load_benchmark("math", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_number_is_graded_as_it_was_written_in_any_precision(dtype):
    pytest.importorskip("math_verify")
    written = ["0.1", "3.3", "12.55", "-0.7"]
    rows = {"question": written, "answer": [float(text) for text in written]}
    dataset = Dataset.from_dict(rows, features=Features({"question": Value("string"), "answer": Value(dtype)}))
    problems = read_problems(dataset, "question", "answer")
    assert [grade(rf"\boxed{{{row['question']}}}", row["gold"]).correct for row in problems] == [True] * 4


def test_numbers_in_lists_of_single_precision_keep_their_gaps():
    features = Features({"answer": List(Value("float32"))})
    dataset = Dataset.from_dict({"answer": [[0.1, None], [], None]}, features=features)
    assert read_answers(dataset, "answer") == [[0.1, None], [], None]


@pytest.mark.parametrize("answer", [math.nan, math.inf, [1.0, math.nan]])
def test_a_number_that_is_none_is_no_answer(answer):
    dataset = Dataset.from_dict({"question": ["What?"], "answer": [answer]})
    with pytest.raises(ValueError, match="Row 0 of the dataset has no answer to grade by"):
        read_problems(dataset, "question", "answer")


def test_a_benchmark_without_an_answer_in_a_column_of_numbers_is_refused(tmp_path):
    Dataset.from_dict({"Body": ["a"], "Question": ["b"], "Answer": [math.nan]}).to_parquet(tmp_path / "svamp.parquet")
    with pytest.raises(ValueError, match="its column 'Answer' is empty"):
        load_benchmark("svamp", str(tmp_path))


@pytest.mark.parametrize("answer", ["word " * 41, "There are 20.\nTwo are gone."])
def test_a_solution_without_a_marked_answer_is_refused(answer):
    with pytest.raises(ValueError, match="^Row 0 of the dataset has no answer to grade by in its column 'answer': "):
        read_problems(Dataset.from_dict({"question": ["What?"], "answer": [answer]}), "question", "answer")


def test_answers_that_are_sentences_are_counted_with_an_example(caplog):
    answers = ["It is 18 apples.", "Ben is taller than Ann.", "#### 3", "Ann", "The third one is right."]
    problems = read_problems(Dataset.from_dict({"question": ["What?"] * 5, "answer": answers}), "question", "answer")
    assert problems["gold"] == [
        ["18 apples"],
        ["Ben is taller than Ann."],
        ["3"],
        ["Ann"],
        ["The third one is right."],
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 5 answers in the column 'answer' of the dataset are sentences, such as 'Ben is taller than Ann.'. A "
        "completion is right only if it says the same words. Give the answer alone, or after '####'."
    ]


def test_answers_that_are_no_sentences_bring_no_warning(caplog):
    answers = ["18", "It is 18 apples.", "Mrs. Hilt", r"\frac{1}{2}", "She halves 36.\n#### 18"]
    read_gold(Dataset.from_dict({"answer": answers}), "answer", "the dataset")
    assert not caplog.records


def test_files_are_named_beside_benchmarks_whatever_is_in_their_names(tmp_path):
    path = tmp_path / "one, two.jsonl"
    write(path, [{"question": "What is 2+2?", "answer": "4"}])
    assert name_benchmarks(["gsm8k,svamp asdiv", str(path), "gsm8k"]) == ["gsm8k", "svamp", "asdiv", str(path)]
    assert name_benchmarks("gsm8k math") == ["gsm8k", "math"]
    with pytest.raises(ValueError, match="^There is no benchmark 'two.jsonl'. There are gsm8k, .* Or name a file of"):
        name_benchmarks(["gsm8k, two.jsonl"])


@pytest.mark.parametrize("column", ["question", "prompt"])
def test_the_problems_of_a_file_are_its_rows(column, tmp_path):
    write(tmp_path / "own.jsonl", [{column: f"What is {i}+1?", "answer": f"#### {i + 1}"} for i in range(5)])
    (problems,) = load_problems([str(tmp_path / "own.jsonl")], max_samples=3).items()
    assert problems[0] == "own"
    assert problems[1]["question"][:] == ["What is 0+1?", "What is 1+1?", "What is 2+1?"]
    assert problems[1]["gold"][:] == [["1"], ["2"], ["3"]]


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (" \n", "Row 1 of the dataset is empty in its column 'question'."),
        (5, "Row 1 of the dataset must have text or messages in its column 'question', got 5. Convert it."),
        (
            {"text": "2+2?"},
            "Row 1 of the dataset must have text or messages in its column 'question', got {\"text\": ",
        ),
    ],
    ids=str,
)
def test_a_question_that_is_none_is_told(question, sentence):
    dataset = Dataset.from_dict({"question": [question], "answer": ["4"]})
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        read_problems(dataset, "question", "answer", [1])


@pytest.mark.parametrize("name", ["gsm8k.jsonl", "held_out.jsonl", "other/own.jsonl"])
def test_a_file_named_as_something_else_is_refused(name, tmp_path):
    files = [tmp_path / "own.jsonl", tmp_path / name]
    for path in files:
        write(path, [{"question": "What is 2+2?", "answer": "4"}])
    with pytest.raises(ValueError, match=f"^The file '.*{name}' has the name of a benchmark or of another file"):
        load_problems([str(path) for path in files])


@pytest.mark.parametrize(("row", "missing"), [({"answer": "4"}, "question"), ({"prompt": "2+2?"}, "answer")])
def test_a_column_that_a_file_lacks_is_named(row, missing, tmp_path):
    write(tmp_path / "own.jsonl", [row])
    with pytest.raises(ValueError, match=f"own.jsonl' has no column '{missing}'. It needs question and answer, and"):
        load_problems([str(tmp_path / "own.jsonl")])
