"""Convert the JSON lines of the method's published scripts, one step per line, to a Dataset of steps.

A line holds `prompt_id` (the question), `prefix` (the text before the step), `token_ids` and their `tokens`, `weights`
(v_C), and usually `step` and `kl_divergence`. Lines of one question whose prefixes continue each other become one
trajectory.

What a file does not record remains unknown: divergences are null except at its steps, and there is no amateur, alpha
or beta. The token that the expert sampled at the last step of a trajectory is also unknown. The label's most probable
token takes its place, after every context, so that nothing reads it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, logging

from .. import __version__
from ..models.loading import load_config, load_tokenizer
from ..text import shown_value
from ..vocabulary import Vocabulary, model_vocabulary
from .messages import prints_date, render_row
from .prompt_format import PromptFormat
from .prompts import encode_continuation
from .run_file import run_date
from .training_rows import check_row
from .writer import StepWriter, hash_ids


logger = logging.get_logger(__name__)

SYSTEM_PROMPT = "Please reason step by step."
_LARGEST = float(np.finfo(np.float32).max)  # divergence that a Dataset holds


def import_published_steps(
    file: str,
    output_dir: str,
    expert: str,
    processing_class: PreTrainedTokenizerBase | None = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    overwrite_output_dir: bool = False,
    trust_remote_code: bool = False,
) -> Dataset:
    """
    Read a file that the published scripts have sampled.

    Args:
        file (`str`): Path of the JSON lines.
        output_dir (`str`): Folder for the Dataset, in the same layout as that of `lightreasoner sample`.
        expert (`str`): Id or path of the expert that sampled the steps. Its config and tokenizer are read.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The expert's tokenizer. If `None`, it is loaded from the expert's folder or repository.
        system_prompt (`str`, *optional*): System message before each question; the published scripts' by default. An
            empty text leaves it out.
        overwrite_output_dir (`bool`): Whether to delete steps that `output_dir` already holds.
        trust_remote_code (`bool`): Whether to allow loading a tokenizer that ships custom Python code.

    Returns:
        [`~datasets.Dataset`] with the columns of `trl_lightreasoner.steps.dataset`, in the order of the file.

    Raises:
        `ValueError`: If a line is malformed, or its tokens are not the expert's. The message names the line.

    Example:

    ```python
    from trl_lightreasoner import LightReasonerTrainer, import_published_steps

    dataset = import_published_steps("cd_samples.jsonl", "steps", "Qwen/Qwen2.5-Math-1.5B")
    trainer = LightReasonerTrainer("Qwen/Qwen2.5-Math-1.5B", train_dataset=dataset)
    ```
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"There is no file {file!r}.")
    width = load_config(expert, "expert", trust_remote_code=trust_remote_code).get_text_config().vocab_size
    tokenizer = processing_class or load_tokenizer(expert, "expert", trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise ValueError(
            "The expert's tokenizer has no chat template, which the published scripts need for their prompts. Give "
            "a tokenizer that has one: saved with the expert, or in Python as `processing_class`."
        )
    date = run_date(output_dir, overwrite_output_dir)
    reader = _Reader(path, tokenizer, model_vocabulary(tokenizer, width, "expert"), width, system_prompt, date)
    rows = reader.read()
    prompts = Dataset.from_list([{"prompt": row.pop("prompt")} for row in rows])
    writer = StepWriter(output_dir, prompts, overwrite_output_dir, date=date)
    with open(path, "rb") as content:
        checksum = hashlib.file_digest(content, "sha256").hexdigest()
    model = {"model": expert, "revision": None, "dtype": None, "quantization": None, "adapter": None}
    metadata = {
        "method": "LightReasoner (arXiv 2510.07962), by the published scripts",
        "imported_from": path.name,
        "expert": model,
        "amateur": None,
        "settings": {"alpha": None, "beta": None},
        "prompt_format": PromptFormat("chat", system_prompt=system_prompt or "").to_dict(),
        **({"date": date.isoformat()} if prints_date(tokenizer) else {}),
        "versions": {"trl-lightreasoner": __version__},
    }
    try:
        tokens = hash_ids(ids for row in rows for ids in (row["prompt_ids"], row["completion_ids"], *row["label_ids"]))
        identity = {"expert": expert, "system_prompt": system_prompt, "file (SHA-256)": checksum, "tokens": tokens}
        done = writer.open(identity, metadata)
        if len(done) < len(rows):
            writer.write(list(range(len(rows))), {name: [row[name] for row in rows] for name in rows[0]})
        writer.finish(set(range(len(rows))))
        return writer.load()
    finally:
        writer.close()


class _Trajectory:
    """The longest prefix so far, as token ids and text, and (label ids, label probabilities, KL) by position."""

    def __init__(self):
        self.ids: list[int] = []
        self.text = ""
        self.steps: dict[int, tuple[list[int], list[float], float | None]] = {}

    def takes(self, prefix_ids: list[int]) -> bool:
        both = min(len(prefix_ids), len(self.ids))
        return len(prefix_ids) not in self.steps and prefix_ids[:both] == self.ids[:both]

    def row(self, prompt: list[dict[str, str]], prompt_ids: list[int]) -> dict[str, Any]:
        positions = sorted(self.steps)
        label_ids, label_probs, divergences = zip(*(self.steps[t] for t in positions), strict=True)
        completion_ids = [*self.ids, label_ids[-1][0]]
        known = dict(zip(positions, divergences, strict=True))
        return {
            "prompt": prompt,
            "completion": self.text,
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "kl_divergence": [known.get(t) for t in range(len(completion_ids))],
            "step_positions": positions,
            "label_ids": list(label_ids),
            "label_probs": list(label_probs),
        }


class _Reader:
    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        width: int,
        system_prompt: str | None,
        date: datetime,
    ):
        self.date = date
        self.path, self.tokenizer, self.vocabulary, self.width = path, tokenizer, vocabulary, width
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._texts: dict[int, tuple[str, str]] = {}
        self._ids: dict[str, list[int]] = {}

    def read(self) -> list[dict[str, Any]]:
        """Rows, without `sampling_metadata`."""
        prompts: dict[str, tuple[list, str, list[int]]] = {}
        trajectories: dict[str, list[_Trajectory]] = {}
        num_steps = num_other_lengths = num_not_finite = 0
        for number, line in self._lines():
            try:
                step = _parse(line)
                question, prefix = step["prompt_id"], step["prefix"]
                label = sorted(zip(self._label_ids(step), step["weights"], strict=True), key=lambda pair: -pair[1])
                if question not in prompts:
                    messages = [*self.system, {"role": "user", "content": question}]
                    text = render_row({"prompt": messages}, self.tokenizer, self.date)["prompt"]
                    ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                    prompts[question] = (messages, text, ids)
                _, text, prompt_ids = prompts[question]
                prefix_ids = encode_continuation(text, prompt_ids, prefix, self.tokenizer)
                if step["kl_divergence"] is not None and not step["kl_divergence"] <= _LARGEST:
                    step["kl_divergence"] = None
                    num_not_finite += 1
                made = _Trajectory()
                made.ids, made.text = prefix_ids, prefix
                made.steps[len(prefix_ids)] = (*map(list, zip(*label, strict=True)), step["kl_divergence"])
                check_row(made.row([], prompt_ids), self.vocabulary, self.width)
            except ValueError as error:
                reason = str(error).rstrip(".")
                raise ValueError(f"Line {number} of {str(self.path)!r} cannot be used: {reason}.") from None
            num_steps += 1
            num_other_lengths += step["step"] not in (None, len(prefix_ids))
            of_question = trajectories.setdefault(question, [])
            trajectory = next((each for each in reversed(of_question) if each.takes(prefix_ids)), None)
            if trajectory is None:
                of_question.append(made)
                continue
            trajectory.steps |= made.steps
            if len(prefix_ids) > len(trajectory.ids):
                trajectory.ids, trajectory.text = prefix_ids, prefix
        if not num_steps:
            raise ValueError(f"{str(self.path)!r} holds no step. Name the output of the published sampling script.")
        if num_not_finite:
            logger.warning(
                f"{num_not_finite:,} of {num_steps:,} divergences are not finite, as half precision makes them. They "
                "are unknown in the Dataset, which can be trained on with all of its steps only."
            )
        if num_other_lengths:
            logger.warning(
                f"{num_other_lengths:,} of {num_steps:,} prefixes have a different number of tokens than when they "
                "were sampled. This can happen to text that is decoded and tokenized again, and the published "
                "training reads them in the same way."
            )
        return [
            trajectory.row(prompts[question][0], prompts[question][2])
            for question, of_question in trajectories.items()
            for trajectory in of_question
        ]

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with (
            open(self.path, "rb") as file,
            tqdm(total=self.path.stat().st_size, unit="B", unit_scale=True, desc=f"Reading {self.path.name}") as bar,
        ):
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                if line.strip():
                    yield number, line

    def _label_ids(self, step: dict[str, Any]) -> list[int]:
        ids, texts = step["token_ids"], step["tokens"]
        if ids is None:
            return [self._find(text) for text in texts]
        for token_id, text in zip(ids, texts or [], strict=False):
            if text not in self._read_as(token_id):
                raise ValueError(
                    f"token {token_id} is {text!r} in the file, but {self._read_as(token_id)[0]!r} for this "
                    "tokenizer; name the expert that the file was sampled with"
                )
        return ids

    def _read_as(self, token_id: int) -> tuple[str, str]:
        """The text of a token, and its name in the vocabulary."""
        if token_id not in self._texts:
            known = token_id in self.vocabulary
            name = self.tokenizer.convert_ids_to_tokens(token_id) if known else ""
            self._texts[token_id] = (self.tokenizer.decode([token_id]) if known else "", name)
        return self._texts[token_id]

    def _find(self, text: str) -> int:
        if not self._ids:
            for token_id in sorted(set(self.tokenizer.get_vocab().values())):
                self._ids.setdefault(self._read_as(token_id)[0], []).append(token_id)
        ids = self._ids.get(text, [])
        if len(ids) != 1:
            raise ValueError(
                f"{len(ids) or 'no'} tokens of this tokenizer read {text!r}; name the expert that the file was "
                "sampled with, or a file with `token_ids`"
            )
        return ids[0]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        step = json.loads(line)
    except (ValueError, RecursionError) as error:  # in the JSON or in its encoding
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(step, dict):
        raise ValueError("it is not a JSON object")
    checks = {
        "prompt_id": (lambda value: _is_text(value) and value != "", "the text of the question"),
        "prefix": (_is_text, "the text before the step"),
        "weights": (lambda value: _is_list(value, _is_number), "a list of numbers"),
        "tokens": (lambda value: value is None or _is_list(value, _is_text), "a list of texts"),
        "token_ids": (lambda value: value is None or _is_list(value, _is_id), "a list of token ids"),
        "step": (lambda value: value is None or _is_id(value), "a whole number"),
        "kl_divergence": (lambda value: value is None or _is_number(value) and not value < 0, "a number, 0 or more"),
    }
    step = {name: step.get(name) for name in checks}
    for name, (is_right, what) in checks.items():
        if is_right(step[name]):
            continue
        if step[name] is None:
            raise ValueError(f"it has no `{name}`, {what}. Name the output of the published sampling script")
        raise ValueError(f"`{name}` must be {what}, got {shown_value(step[name])}")
    if step["tokens"] is None and step["token_ids"] is None:
        raise ValueError("it has neither `token_ids` nor `tokens`")
    for name in ("tokens", "token_ids"):
        if step[name] is not None and len(step[name]) != len(step["weights"]):
            raise ValueError(f"it has {len(step[name])} `{name}` and {len(step['weights'])} `weights`")
    return step


def _is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_right, value))


def _is_text(value: Any) -> bool:
    """Whether a value is text that has an encoding, unlike half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and float(value) is not None
    except OverflowError:  # JSON has whole numbers of any size
        return False


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
