"""The seven benchmarks (MATH in two sizes), and files of questions, each read into rows with the same columns.

| column | type | meaning |
|---|---|---|
| question | text | what is asked; of multiple choice, with its options |
| gold | list of text | the answer; several, if all of them are asked for |
| kind | "math" or "choice" | how the answer is graded |
| tolerance | float or none | how far off a number may be, as a share of the answer |
| unit | text or none | what the number counts or measures |

They come from the Hub or from local files, whose columns may differ. A column that may have one of two names is
written "one | other".
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets

from ..grading.answers import last_boxed
from ..grading.references import MAX_UNMARKED, is_sentence, read_reference, read_references
from ..steps.prompt_sources import beside_messages
from ..steps.splits import load_split
from ..text import shown_value


logger = logging.getLogger(__name__)

ROW_FEATURES = Features(
    {
        "question": Value("string"),
        "gold": List(Value("string")),
        "kind": Value("string"),
        "tolerance": Value("float64"),
        "unit": Value("string"),
    }
)
HELD_OUT = "held_out"
_NARROW: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}
_MAY_BE_EMPTY = ("unit", "error")
# Possible paths of a benchmark's file under `data_dir`, and its format
_PLACES = ("{}", "benchmarks/{}", "{}/test")
_ENDINGS = (".jsonl", ".json", ".parquet")


class Benchmark(NamedTuple):
    """
    Facts about a benchmark.

    Attributes:
        title (`str`): Its name in tables.
        dataset (`tuple[str, str | None, str]`): Id on the Hub, configuration, split.
        columns (`tuple[str, ...]`): Columns that its rows must have.
        read (`Callable`): From such a row to one with our columns, or to `None` to skip it.
    """

    title: str
    dataset: tuple[str, str | None, str]
    columns: tuple[str, ...]
    read: Callable[[dict[str, Any]], dict[str, Any] | None]


def _row(question: str, *gold: str, kind: str = "math", tolerance: float | None = None, unit: str | None = None):
    if not all(isinstance(text, str) for text in (question, *gold)):
        raise ValueError("its question or its answer is not text")
    if not question.strip() or not all(text.strip() for text in gold) or not gold:
        raise ValueError("its question or its answer is empty")
    answers = [text.strip() for text in gold]
    return {"question": question.strip(), "gold": answers, "kind": kind, "tolerance": tolerance, "unit": unit or None}


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _read_gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["answer"], str) or "####" not in row["answer"]:
        raise ValueError("its answer has no '####'")
    return _row(row["question"], read_reference(row["answer"]).replace(",", ""))


def _read_problem(row: dict[str, Any]) -> dict[str, Any]:
    answer = row.get("answer")
    if answer is None and (answer := last_boxed(row["solution"])) is None:
        raise ValueError(r"its solution has no \boxed{} answer")
    return _row(row.get("problem") or row["question"], str(answer))


def _read_svamp(row: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = f"{float(row['Answer']):.12g}"
    except (ValueError, TypeError):
        raise ValueError(f"its answer {row['Answer']!r} is not a number") from None
    return _row(f"{_sentence(row['Body'])} {row['Question'].strip()}", answer)


def _read_asdiv(row: dict[str, Any]) -> dict[str, Any] | None:
    if ";" in row["answer"]:  # several answers. Common evaluations exclude them
        return None
    parts = re.fullmatch(r"(.*?)\s*(?:\((.*)\))?", row["answer"].strip(), flags=re.DOTALL)
    assert parts is not None  # any text is an answer
    answer, unit = parts.groups()
    return _row(f"{_sentence(row['body'])} {row['question'].strip()}", answer, unit=unit)


def _read_olympiadbench(row: dict[str, Any]) -> dict[str, Any]:
    context = f"{row['context'].strip()}\n" if row.get("context") else ""
    answers, error = row["final_answer"], row["error"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers) or not answers:
        raise ValueError(f"its answer must be a list of texts, got {shown_value(answers)}")
    tolerance = None
    if error:  # how far off the number may be, such as "1e-1"
        if not (number := float(answers[0].strip("$ "))):
            raise ValueError("its answer is 0, for which a relative `error` has no meaning")
        tolerance = float(error) / abs(number)
    return _row(context + row["question"], *answers, tolerance=tolerance, unit=row["unit"])


def _read_mmlu(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    if not isinstance(row["answer"], int) or not 0 <= row["answer"] < len(choices) <= len(ascii_uppercase):
        raise ValueError(f"its answer {row['answer']!r} is not the index of one of {len(choices)} choices")
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    return _row(f"{row['question'].strip()}\nAnswer Choices: {options}", ascii_uppercase[row["answer"]], kind="choice")


BENCHMARKS = {
    "gsm8k": Benchmark("GSM8K", ("openai/gsm8k", "main", "test"), ("question", "answer"), _read_gsm8k),
    "math500": Benchmark(
        "MATH-500",
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("problem | question", "answer | solution"),
        _read_problem,
    ),
    "math": Benchmark(
        "MATH",
        ("DigitalLearningGmbH/MATH-lighteval", "default", "test"),
        ("problem | question", "answer | solution"),
        _read_problem,
    ),
    "svamp": Benchmark(
        "SVAMP", ("ChilleD/SVAMP", None, "train+test"), ("Body", "Question", "Answer"), _read_svamp
    ),  # all of its thousand problems, as in common evaluations
    "asdiv": Benchmark("ASDiv", ("EleutherAI/asdiv", None, "validation"), ("body", "question", "answer"), _read_asdiv),
    "minerva_math": Benchmark(
        "Minerva Math",
        ("math-ai/minervamath", None, "test"),
        ("problem | question", "answer | solution"),
        _read_problem,
    ),
    "olympiadbench": Benchmark(
        "OlympiadBench",
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
        ("question", "final_answer", "unit", "error"),
        _read_olympiadbench,
    ),
    "mmlu_stem": Benchmark(
        "MMLU-STEM", ("TIGER-Lab/MMLU-STEM", None, "test"), ("question", "choices", "answer"), _read_mmlu
    ),
}


def title_of(name: str) -> str:
    """Display name of a set of problems."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name.replace("_", " ").capitalize()


def read_answers(dataset: Dataset, column: str) -> list[Any]:
    """
    A column of references in the form of [`read_references`].

    Python shows numbers of single or half precision with digits that nobody wrote: 0.1 as 0.10000000149011612. They
    get the fewest digits that distinguish them.

    Example:

    ```python
    >>> features = Features({"answer": Value("float32")})
    >>> read_answers(Dataset.from_dict({"answer": [0.1, 2.0]}, features=features), "answer")
    [0.1, 2.0]

    ```
    """
    feature = dataset.features[column]
    while isinstance(feature, List | LargeList):
        feature = feature.feature
    answers = dataset.with_format(None)[column][:]
    narrow = _NARROW.get(getattr(feature, "dtype", ""))
    return answers if narrow is None else [_shorten(answer, narrow) for answer in answers]


def _shorten(answer: Any, narrow: type[np.floating]) -> Any:
    if isinstance(answer, list):
        return [_shorten(part, narrow) for part in answer]
    return None if answer is None else float(str(narrow(answer)))


def read_gold(dataset: Dataset, column: str, name: str, numbers: list[int] | None = None) -> list[list[str]]:
    r"""
    The reference answers of rows, as they are graded by. A warning counts those that are sentences.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        column (`str`): Text, a number, or a list of these that must all be given. Of a solution the text after `####`
            counts, or the last `\boxed{}`; of a sentence its only number.
        name (`str`): What messages call the dataset.
        numbers (`list[int]`, *optional*): Numbers of the rows, for messages. If `None`, they count from 0.

    Raises:
        `ValueError`: If a row has no answer to grade by. The message names the row.
    """
    gold, sentences = [], []
    for number, answer in zip(numbers or range(len(dataset)), read_answers(dataset, column), strict=True):
        references = read_references(answer)
        unmarked = isinstance(answer, str) and references == [answer.strip()]
        if references is None or unmarked and ("\n" in answer.strip() or len(answer) > MAX_UNMARKED):
            raise ValueError(
                f"Row {number} of {name} has no answer to grade by in its column {column!r}: it must be the answer "
                f"alone, or a solution that has it after '####' or in \\boxed{{}}, got {shown_value(answer)}."
            )
        if unmarked and is_sentence(references[0]):
            sentences.append(answer)
        gold.append(references)
    if sentences:
        logger.warning(
            f"{len(sentences):,} of {len(gold):,} answers in the column {column!r} of {name} are sentences, such as "
            f"{shown_value(sentences[0])}. A completion is right only if it says the same words. Give the answer "
            "alone, or after '####'."
        )
    return gold


def check_question(question: Any, row: str, column: str) -> None:
    """
    Refuse a question that cannot be asked. `row` is what messages call its row.

    Raises:
        `ValueError`: If it is blank, or neither text nor messages.
    """
    if not question or isinstance(question, str) and not question.strip():
        raise ValueError(f"{row} is empty in its column {column!r}.")
    if not isinstance(question, str | list):
        raise ValueError(
            f"{row} must have text or messages in its column {column!r}, got {shown_value(question)}. Convert it."
        )


def read_problems(
    dataset: Dataset, question_column: str, answer_column: str, numbers: list[int] | None = None
) -> Dataset:
    """
    Problems from rows with a question and its answer.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        question_column (`str`): Text or messages.
        answer_column (`str`): References in the form of [`read_gold`].
        numbers (`list[int]`, *optional*): Numbers of the rows, for error messages. If `None`, they count from 0.

    Returns:
        [`~datasets.Dataset`] with the columns of `ROW_FEATURES`, and `question`, `chat_template_kwargs` and `tools`
        unchanged.

    Raises:
        `ValueError`: If a row has no question that is text or messages, or no answer to grade by. The message names
            the row.
    """
    rows = []
    pairs = zip(dataset[question_column], read_gold(dataset, answer_column, "the dataset", numbers), strict=True)
    for number, (question, references) in zip(numbers or range(len(dataset)), pairs, strict=True):
        check_question(question, f"Row {number} of the dataset", question_column)
        rows.append({"question": question, "gold": references, "kind": "math", "tolerance": None, "unit": None})
    features = Features({**ROW_FEATURES, "question": dataset.features[question_column]})
    problems = Dataset.from_list(rows, features=features)
    beside = beside_messages(dataset)
    return concatenate_datasets([problems, beside], axis=1) if beside.column_names else problems


def name_benchmarks(given: str | list[str]) -> list[str]:
    """
    The benchmarks and files of a setting, each once. Names, but not files, may be joined by spaces or commas.

    Raises:
        `ValueError`: If there is no such benchmark or file.
    """
    given = [given] if isinstance(given, str) else given
    parts = [[each] if Path(each).is_file() else each.replace(",", " ").split() for each in given]
    names = list(dict.fromkeys(name for part in parts for name in part))
    for name in names:
        if name not in BENCHMARKS and not Path(name).is_file():
            raise ValueError(
                f"There is no benchmark {name!r}. There are {', '.join(BENCHMARKS)}. Or name a file of questions with "
                "their answers."
            )
    return names


def load_problems(names: list[str], data_dir: str | None = None, max_samples: int | None = None) -> dict[str, Dataset]:
    """
    The problems of benchmarks and of files of questions.

    Args:
        names (`list[str]`): From [`name_benchmarks`]. A file has a column `question` or `prompt`, and `answer`.
        data_dir (`str`, *optional*): As for [`load_benchmark`].
        max_samples (`int`, *optional*): Number of problems to use of each, from the start.

    Returns:
        `dict[str, Dataset]`: By the name of the benchmark, or of the file without its ending, rows of `ROW_FEATURES`.

    Raises:
        `ValueError`: If there is no such file, two have one name, a column is missing, or a row is invalid.
    """
    problems: dict[str, Dataset] = {}
    for name in names:
        if name in BENCHMARKS:
            problems[name] = load_benchmark(name, data_dir, max_samples)
            continue
        key = Path(name).stem
        if key in {*BENCHMARKS, *problems, HELD_OUT}:
            raise ValueError(f"The file {name!r} has the name of a benchmark or of another file. Rename it.")
        problems[key] = _load_questions(name, max_samples)
    return problems


def _load_questions(path: str, max_samples: int | None) -> Dataset:
    dataset = load_split(path, None, "train")
    question = "prompt" if "prompt" in dataset.column_names else "question"
    for column in (question, "answer"):
        if column not in dataset.column_names:
            raise ValueError(
                f"{path!r} has no column {column!r}. It needs question and answer, and has "
                f"{', '.join(dataset.column_names)}."
            )
    return read_problems(dataset.select(range(min(len(dataset), max_samples or len(dataset)))), question, "answer")


def load_benchmark(name: str, data_dir: str | None = None, max_samples: int | None = None) -> Dataset:
    """
    The problems of a benchmark.

    Args:
        name (`str`): A key of `BENCHMARKS`.
        data_dir (`str`, *optional*): Folder with its file: `NAME.jsonl`, `benchmarks/NAME.jsonl` or `NAME/test.jsonl`,
            also with `.json` or `.parquet`. If `None`, it is loaded from the Hub.
        max_samples (`int`, *optional*): Number of problems to use, from the start.

    Returns:
        [`~datasets.Dataset`] with the columns of `ROW_FEATURES`.

    Raises:
        `ValueError`: If there is no such file, a column is missing, or a row is invalid.
    """
    benchmark = BENCHMARKS[name]
    if data_dir is None:
        source = benchmark.dataset[0]
        try:
            dataset = load_split(*benchmark.dataset)
        except ValueError as error:
            raise ValueError(f"{error} Or name the folder of a file of {benchmark.title} in `data_dir`.") from error
    else:
        source = _find_file(name, data_dir)
        dataset = load_split(source, None, "train")
    for column in benchmark.columns:
        if not set(column.split(" | ")) & set(dataset.column_names):
            expected = ", ".join(benchmark.columns)
            raise ValueError(
                f"{benchmark.title} in {source!r} has no column {column.replace(' | ', ' or ')!r}. It needs "
                f"{expected}, and has {', '.join(dataset.column_names)}."
            )
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(dataset):
        if len(rows) == max_samples:
            break
        try:
            _check_filled(row, benchmark.columns)
            read = benchmark.read(row)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"Row {number} of {benchmark.title} in {source!r} is invalid: {reason.rstrip('.')}. Fix or remove it."
            ) from error
        rows += [] if read is None else [read]
    if not rows:
        raise ValueError(f"{benchmark.title} in {source!r} has no usable row.")
    return Dataset.from_list(rows, features=ROW_FEATURES)


def _check_filled(row: dict[str, Any], columns: tuple[str, ...]) -> None:
    for column in columns:
        names = column.split(" | ")
        values = [row.get(name) for name in names]
        if column not in _MAY_BE_EMPTY and all(value is None or value != value for value in values):  # NaN
            there = [name for name in names if name in row]
            raise ValueError(f"its column {' or '.join(map(repr, there))} is empty")


def _find_file(name: str, data_dir: str) -> str:
    if not Path(data_dir).is_dir():
        raise ValueError(f"The folder {data_dir!r} of `data_dir` does not exist.")
    for place in _PLACES:
        for ending in _ENDINGS:
            path = Path(data_dir, place.format(name) + ending)
            if path.is_file():
                return str(path)
    places = ", ".join(f"{place.format(name)}.jsonl" for place in _PLACES)
    raise ValueError(
        f"There is no file of {BENCHMARKS[name].title} in {data_dir!r}. It must be one of {places} (or .json, "
        ".parquet)."
    )
