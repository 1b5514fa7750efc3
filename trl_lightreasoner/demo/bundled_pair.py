"""The bundled pair: its folder, its prompts, and the grading of a model's answers."""

from pathlib import Path

from ..generation.greedy import find_eos_ids, generate_greedy
from ..models.weights import get_base_model
from ..steps.prompts import encode_rows
from ..vocabulary import model_vocabulary
from .task import extract_answer


PAIR = Path(__file__).parent / "pair"
# The pair was also trained on comparisons, the third kind, but they are excluded. The sloppy way reads their first
# relation the wrong way round, and the demo's short training does not correct this.
KIND_SHARES = {"chain": 2, "shop": 1}


def as_prompt(problem: dict) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem["question"]}]


def solve(model, tokenizer, problems: list[dict]) -> list[tuple[str, bool]]:
    """The model's greedy answer to each problem, and whether it is correct."""
    vocabulary = model_vocabulary(tokenizer, get_base_model(model).config.vocab_size)
    eos_ids = find_eos_ids(model, tokenizer)
    rows = [{"prompt": as_prompt(problem)} for problem in problems]
    prompt_ids = encode_rows(rows, tokenizer, set(eos_ids))["prompt_ids"]
    completion_ids = generate_greedy(model, prompt_ids, vocabulary, eos_ids, max_new_tokens=128)
    answers = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [
        (answer, extract_answer(answer) == problem["answer"])
        for problem, answer in zip(problems, answers, strict=True)
    ]
