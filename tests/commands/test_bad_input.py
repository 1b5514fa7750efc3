"""What people get wrong, and the sentence they see. The tables are the overview; each row is one mistake."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    T5Config,
    logging,
)
from transformers.modeling_outputs import BaseModelOutput

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
    evaluate,
    raise_beta,
    run_pipeline,
    sampling_metadata,
    tune,
)
from trl_lightreasoner.commands import cli
from trl_lightreasoner.steps import writer as step_writer


NAN = float("nan")
USER = {"role": "user", "content": "What is 2+2?"}
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('There is no role ' + message['role']) }}{% endif %}{{ message['content'] }}{% endfor %}"
)

PROGRESS = ("Running on: ", "Sampling, by generate:")
# What the two commands are given where the row does not say otherwise
FLAGS = {
    "sample": {
        "expert": "{expert}",
        "amateur": "{amateur}",
        "dataset_name": "{folder}/good.jsonl",
        "output_dir": "{out}",
        "max_new_tokens": "2",
    },
    "train": {
        "model_name_or_path": "{expert}",
        "dataset_name": "{folder}/steps.jsonl",
        "output_dir": "{out}",
        "use_cpu": "true",
        "max_steps": "4",
        "disable_tqdm": "true",
    },
}


class Mistake(NamedTuple):
    """One row: what the user changes, and the whole sentence (regex), in which `{folder}` stands for itself."""

    id: str
    flags: dict[str, str | None]  # instead of those of FLAGS; None: without a value
    sentence: str
    loads: bool = False  # whether it takes the weights of a model to find it
    error: type[Exception] = ValueError


def rows_of(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# Files of prompts, made under {folder}
PROMPTS = {
    "good.jsonl": rows_of({"prompt": "What is 2+2?"}, {"prompt": "Name a prime."}),
    "question.jsonl": rows_of({"question": "What is 2+2?"}),
    "null.jsonl": rows_of({"prompt": "What is 2+2?"}, {"prompt": None}),
    "number.jsonl": rows_of({"prompt": 7}),
    "dict.jsonl": rows_of({"prompt": USER}),
    "null_completion.jsonl": rows_of({"prompt": "2+2=", "completion": None}),
    "number_completion.jsonl": rows_of({"prompt": "2+2=", "completion": 4}),
    "text_completion.jsonl": rows_of({"prompt": [USER], "completion": "4"}),
    "two_completions.jsonl": rows_of({"prompt": [USER], "completion": [USER, USER]}),
    "chat.jsonl": rows_of({"prompt": [USER]}),
    "no_role.jsonl": rows_of({"prompt": [{"content": "2+2="}]}),
    "null_role.jsonl": rows_of({"prompt": [{"role": None, "content": "2+2="}, USER]}),
    "later_no_role.jsonl": rows_of({"prompt": [USER, {"content": "2+2="}]}),
    "no_content.jsonl": rows_of({"prompt": [{"role": "user"}]}),
    "null_content.jsonl": rows_of({"prompt": [{"role": "user", "content": None}]}),
    "number_content.jsonl": rows_of({"prompt": [{"role": "user", "content": 7}]}),
    "wizard.jsonl": rows_of({"prompt": [{"role": "wizard", "content": "2+2="}]}),
    "middle_wizard.jsonl": rows_of({"prompt": [{"role": "wizard", "content": "2+2="}, USER]}),
    "sharegpt.jsonl": rows_of({"prompt": [{"from": "human", "value": "2+2="}]}),
    "strings.jsonl": rows_of({"prompt": ["2+2=", "3+3="]}),
    "no_messages.jsonl": rows_of({"prompt": []}),
    "empty_text.jsonl": rows_of({"prompt": ""}),
    "long.jsonl": rows_of({"prompt": "$ " * 300}),
    "taken.jsonl": rows_of({"prompt": "2+2=", "label_ids": 1}),
    "header.csv": "prompt\n",
    "empty.jsonl": "",
    "cut.jsonl": '{"prompt": "2+2="}\n{"prompt": "3+',
    "empty.txt": "",
    "blank_line.jsonl": rows_of({"prompt": "2+2="}) + "\n" + rows_of({"prompt": 7}),
    "text_and_number.jsonl": rows_of({"prompt": "2+2="}, {"prompt": 7}),
    "late_type.jsonl": rows_of(*[{"prompt": "2+2=", "other": 1, "long": "9" * 2**20}] * 11, {"other": "text"}),
    "late_point.jsonl": rows_of(*[{"prompt": "2+2=", "other": 1, "long": "9" * 2**20}] * 11, {"other": 1.5}),
    "late_column.jsonl": rows_of(*[{"prompt": "2+2=", "long": "9" * 2**20}] * 11, {"other": "text"}),
    "list.jsonl": "7\n8\n",
    "text.parquet": "prompt\n",
    "notes.docx": "2+2=",
    "file": "2+2=",
    "list.yaml": "- beta\n",
    "broken.yaml": "beta: [1\n",
    "unknown.yaml": "bta: 0.4\n",
    "type.yaml": "beta: high\n",
    "no_list.yaml": "beta: [0.4]\n",
}
SKIPPED = r"Every prompt of the dataset was skipped \(1 {}; the models' context is 256 tokens\). Shorten the " + (
    r"prompts, or {}\."
)
EMPTY = r"Every row of the dataset is empty: `prompt` holds no text, or the expert's tokenizer makes .*"
SPLITS = r".* Should be one of \['train'\]\. Rows of another split can be held out, such as .*"
NO_DATASET = (
    r"It must be a file \(\.json, \.jsonl, \.parquet, \.csv, \.txt\), a folder, or the id of a dataset on the Hub\. "
    r"Private and gated ones need `hf auth login`, offline ones must be in the cache\."
)
NO_MODEL = (
    r"cannot be found\. It must be a folder with a config\.json, or the id of a model on the Hub\. Private and gated "
    r"models need `hf auth login`, offline ones must be in the cache\."
)
NEEDS_CAUSAL = r"LightReasoner needs a causal language model, such as Qwen2\.5\."
BOTH = (
    r"Row 0: `prompt` and `completion` must both be text or both be lists of messages with `role` and `content`, got "
)
FILTER = r"Filter such rows out"
SHAPES = r"of another shape: .* and \d+ more\."


def prompts(name: str, sentence: str, **flags: str) -> Mistake:
    return Mistake(f"prompts: {name}", {"dataset_name": "{folder}/" + name, **flags}, sentence)


def model(name: str, sentence: str, flag: str = "expert", **kwargs: Any) -> Mistake:
    return Mistake(f"{flag}: {name}", {flag: "{folder}/" + name}, sentence, **kwargs)


def setting(
    name: str,
    value: str | None,
    sentence: str,
    loads: bool = False,
    error: type[Exception] = ValueError,
    **flags: str,
) -> Mistake:
    return Mistake(f"--{name} {value}", {name: value, **flags}, sentence, loads, error)


SAMPLE = [
    # Prompts
    prompts(
        "question.jsonl",
        r"The dataset has no column 'prompt'; it has 'question'\. Name the one that holds the prompts with "
        r"`--prompt_column`\.",
    ),
    prompts(
        "question.jsonl",
        r"The dataset has no column 'questoin'; it has 'question'\. Name the one .*",
        prompt_column="questoin",
    ),
    prompts(
        "null.jsonl", rf"Row 1: `prompt` must be text or a list of messages, got nothing .* {FILTER}, or convert .*"
    ),
    prompts(
        "number.jsonl", rf"Row 0: `prompt` must be text or a list of messages, got 7\. {FILTER}, or convert them\."
    ),
    prompts("dict.jsonl", rf"Row 0: `prompt` must be text or a list of messages, got {{.role.*\. {FILTER}, or .*"),
    prompts(
        "null_completion.jsonl",
        rf"Row 0: `completion` must be text or a list of one message, got nothing .* {FILTER}, or remove the column "
        r"to "
        r"let the expert answer\.",
    ),
    prompts(
        "number_completion.jsonl", r"Row 0: `completion` must be text or a list of one message, got 4\. Filter .*"
    ),
    prompts("text_completion.jsonl", BOTH + r"\[{.role.: .user., .content.: .What is 2\+2\?.}\] and '4'\."),
    prompts("two_completions.jsonl", r"Row 0: `completion` must be one assistant message, got 2 of them\."),
    prompts("no_role.jsonl", BOTH + r"\[{.content.: .2\+2=.}\]\."),
    prompts("null_role.jsonl", rf"Row 0: A message of `prompt` has no role: {{.role.: null.*}}\. {FILTER}\."),
    prompts(
        "later_no_role.jsonl", rf"Row 0: A message of `prompt` has no role: {{.*.content.: .2\+2=..*}}\. {FILTER}\."
    ),
    prompts("no_content.jsonl", rf"Row 0: A message of `prompt` has no content: {{.role.: .user.}}\. {FILTER}\."),
    prompts(
        "null_content.jsonl",
        rf"Row 0: A message of `prompt` has no content: {{.role.: .user., .content.: null}}\. {FILTER}\.",
    ),
    prompts("number_content.jsonl", r"Row 0: The content of a message of `prompt` must be text, got 7\. Convert it\."),
    prompts(
        "number.jsonl", r"Row 0: The content of `prompt` must be text, got 7\. Convert it\.", conversational="true"
    ),
    prompts("wizard.jsonl", r"Row 0: Invalid role in the last message: wizard"),
    prompts(
        "middle_wizard.jsonl",
        r"Row 0: The chat template refuses the messages \[{.role.: .wizard..*}\]: There is no role wizard\.",
        expert="{folder}/strict_template",
    ),
    prompts("sharegpt.jsonl", BOTH + r"\[{.from.: .human., .value.: .2\+2=.}\]\."),
    prompts("strings.jsonl", BOTH + r"\[.2\+2=., .3\+3=.\]\."),
    prompts("no_messages.jsonl", EMPTY),
    prompts("empty_text.jsonl", EMPTY),
    prompts("long.jsonl", SKIPPED.format("no room", "choose models with a longer context")),
    prompts(
        "long.jsonl",
        SKIPPED.format("longer than `max_prompt_length=9`", "raise `max_prompt_length`"),
        max_prompt_length="9",
    ),
    prompts(
        "taken.jsonl",
        r"The input already has columns named \['label_ids'\], which sampling writes\. Rename or remove them first\.",
    ),
    prompts(
        "chat.jsonl",
        r"The prompts are conversational, but the expert's tokenizer has no chat template\. Give "
        r"the prompts as text, or a tokenizer with a chat template: saved with the expert, .*\.",
        expert="{folder}/no_template",
    ),
    prompts(
        "good.jsonl", r"The prompts are conversational, but .*", expert="{folder}/no_template", system_prompt="Hi."
    ),
    prompts("chat.jsonl", r"Row 0: The chat template refuses the messages .*", expert="{folder}/broken_template"),
    # Datasets
    prompts("header.csv", r"The dataset '{folder}/header\.csv' has no row in its split 'train'\."),
    prompts("empty.parquet", r"The dataset '{folder}/empty\.parquet' has no row in its split 'train'\."),
    prompts("empty.jsonl", r"The dataset '.*' cannot be read: it is empty\. Repair or replace the file\."),
    prompts(
        "cut.jsonl",
        r"The dataset '.*' cannot be read: line 2 is not JSON \(Unterminated string starting at\)\. Fix or .*",
    ),
    prompts("empty.txt", r"The dataset '.*' cannot be read: it is empty\. Repair or replace the file\."),
    prompts(
        "blank_line.jsonl",
        r"The dataset '.*' cannot be read: line 3 has a number in the column 'prompt', where line 1 has text\. Give "
        r"all rows one type, or remove the column\.",
    ),
    prompts(
        "late_type.jsonl",
        r"The dataset '.*' cannot be read: line 12 has text in the column 'other', where line 1 has a number\. .*",
    ),
    prompts(
        "late_point.jsonl",
        r"The dataset '.*' cannot be read: line 12 has a number with a point in the column 'other', where line 1 has "
        r"a whole number\. Give all .*",
    ),
    prompts(
        "late_column.jsonl",
        r"The dataset '.*' cannot be read: line 12 has a column 'other', which line 1 lacks\. Give all rows the "
        r"same columns, or remove it\.",
    ),
    prompts("list.jsonl", r"The dataset '.*' cannot be read: line 1 must be an object, such as .*, got 7\. Fix it\."),
    prompts("latin_1.jsonl", r"The dataset '.*' cannot be read: line 2 is not in UTF-8\. Save the file as UTF-8\."),
    prompts(
        "latin_1", r"The dataset '.*' cannot be read: in 'a\.txt' line 2 is not in UTF-8\. Save the file as UTF-8\."
    ),
    prompts(
        "text_and_number.jsonl",
        rf"Row 1: `prompt` must be text or a list of messages, got 7\. {FILTER}, or convert them\.",
        expert="{folder}/no_template",
    ),
    prompts(
        "text_and_number.jsonl",
        r"Row 1: The content of `prompt` must be text, got 7\. Convert it\.",
        prompt_style="raw",
    ),
    prompts("cut.parquet", r"The dataset '.*' cannot be read: Parquet magic bytes not found .* Repair or replace .*"),
    prompts("text.parquet", r"The dataset '.*' cannot be read: Parquet file size is 7 bytes, .* Repair or replace .*"),
    prompts(
        "notes.docx", r"'.*' is not a dataset file\. Known endings are \.json, \.jsonl, \.parquet, \.csv, \.txt\."
    ),
    prompts("nowhere.jsonl", r"There is no file or folder '{folder}/nowhere\.jsonl'\."),
    prompts("no_files", r"The dataset '{folder}/no_files' cannot be loaded: .* any data files\. " + NO_DATASET),
    prompts("no_template", r"'{folder}/no_template' is a model, not a dataset\. Name a file, or the .*"),
    setting("dataset_name", "", r"There is no file or folder ''\."),
    setting("dataset_name", "no/where", r"The dataset 'no/where' cannot be loaded: .*\. " + NO_DATASET),
    setting("dataset_split", "dev", r"The dataset '.*' has no split 'dev': " + SPLITS),
    setting("dataset_split", "train[", r"Unrecognized instruction format: train\["),
    setting("dataset_split", "train[:0]", r"The dataset '.*' has no row in its split 'train\[:0\]'\."),
    # Settings
    setting("alpha", "0", r"`alpha` must be in \(0, 1\], got 0\.0\. The paper uses 0\.2\."),
    setting("alpha", "1.5", r"`alpha` must be in \(0, 1\], got 1\.5\. The paper uses 0\.2\."),
    setting("alpha", "nan", r"`alpha` must be in \(0, 1\], got nan\. The paper uses 0\.2\."),
    setting("alpha", "small", r"Argument --alpha: invalid float value: 'small'\."),
    setting("alpha", None, r"Argument --alpha: expected one argument\."),
    setting("beta", "-1", r"`beta` must be a finite number of nats, 0 or more, got -1\.0\. The paper uses 0\.4\."),
    setting("beta", "nan", r"`beta` must be a finite number of nats, 0 or more, got nan\. The paper uses 0\.4\."),
    setting("contrast_strength", "-1", r"`contrast_strength` must be a number from 0 to 100, got -1\.0\."),
    setting("contrast_strength", "nan", r"`contrast_strength` must be a number from 0 to 100, got nan\."),
    setting("expert_anchor", "inf", r"`expert_anchor` must be a number from 0 to 100, got inf\."),
    setting("contrast_strength", "0", r"`contrast_strength` and `expert_anchor` are both 0, .*"),
    setting("bta", "0.4", r"There is no flag `--bta`\. Did you mean `--beta`\?"),
    setting("max_new_tokens", "0", r"`max_new_tokens` must be a whole number, 1 or more, got 0\."),
    setting("per_device_batch_size", "0", r"`per_device_batch_size` must be a whole number, 1 or more, got 0\."),
    setting("dtype", "int8", r"Argument --dtype: invalid choice: 'int8' \(choose from 'auto', 'bfloat16', .*\)\."),
    setting("config", "{folder}/nowhere.yaml", r"The config file '{folder}/nowhere\.yaml' does not exist\."),
    setting("config", "{folder}", r"The config file '{folder}' is a folder\."),
    setting("config", "{folder}/list.yaml", r"The config file '.*' must hold lines of the form `name: value`\."),
    setting("config", "{folder}/broken.yaml", r"The config file is not valid YAML: .*\."),
    setting("config", "{folder}/unknown.yaml", r"There is no key `bta`\. Did you mean `beta`\?"),
    setting("config", "{folder}/type.yaml", r"`beta` in the config file: invalid float value: 'high'\."),
    setting("config", "{folder}/no_list.yaml", r"`beta` in the config file must be one value, got \[0\.4\]\."),
    setting(
        "model_init_kwargs",
        '{"device_map": "cuda:0"}',
        r"`device_map` asks for a CUDA GPU \('cuda:0'\), but PyTorch finds none here\. Remove it, or check the "
        r"driver and the build of PyTorch\.",
    ),
    setting("model_init_kwargs", '{"device_map": {"": "cuda"}}', r"`device_map` asks for a CUDA GPU .*"),
    setting(
        "model_init_kwargs",
        "{oops",
        r"`model_init_kwargs` must be a dict or a JSON object, such as '.*', got '{oops'\.",
    ),
    setting(
        "model_init_kwargs",
        '{"frobnicate": 1}',
        r"The model '.*' cannot be loaded: .* got an unexpected keyword argument 'frobnicate'\.",
        loads=True,
    ),
    setting("model_init_kwargs", '{"dtype": "float7"}', r"The model '.*' cannot be loaded: .*'float7'\.", loads=True),
    # Folders to write to
    setting("output_dir", "", r"`output_dir` must name a folder, got ''\."),
    setting("output_dir", "{folder}/file", r"'{folder}/file' is a file\. Choose another `output_dir`\."),
    setting(
        "output_dir",
        "{folder}/file/steps",
        r"Cannot write to '{folder}/file/steps' \(Not a directory\)\. Choose another `output_dir`, or fix the "
        r"permissions\.",
        error=OSError,
    ),
    setting(
        "output_dir",
        "{folder}/other_data",
        r"'{folder}/other_data' holds files that are not from a run of this version\. Choose another `output_dir`, or "
        r"set `overwrite_output_dir=True` to delete them\.",
    ),
    # Models
    setting("expert", "", rf"The expert '' {NO_MODEL}"),
    setting("expert", "no/where", rf"The expert 'no/where' {NO_MODEL}"),
    model("file", rf"The expert '{{folder}}/file' {NO_MODEL}"),
    model("no_files", rf"The expert '{{folder}}/no_files' {NO_MODEL}"),
    model("half_adapter", r"The expert '{folder}/half_adapter' is an adapter without its adapter_config\..*"),
    model("no_files", rf"The amateur '{{folder}}/no_files' {NO_MODEL}", "amateur"),
    model("bad_config", r"The config\.json of the expert '{folder}/bad_config' cannot be read: .*not a valid JSON.*"),
    model("text_size", r"The config\.json of the expert '.*' cannot be read: .*'hidden_size' expected int, got str.*"),
    model("no_type", r"Unrecognized model in {folder}/no_type\. Should have a `model_type` key in its config\.json\."),
    model("new_type", r"The checkpoint you are trying to load has model type `new` but Transformers does not .*"),
    model("encoder", rf"The expert \(`bert`\) has no next-token distribution\. {NEEDS_CAUSAL}"),
    model("encoder_decoder", rf"The amateur is an encoder-decoder model \(`t5`\)\. {NEEDS_CAUSAL}", "amateur"),
    model(
        "no_weights",
        r"The expert '{folder}/no_weights' has no weights: the folder holds no \*\.safetensors file\. Download or "
        r"save it again\.",
    ),
    model("no_weights", r"The amateur '{folder}/no_weights' has no weights: .*", "amateur"),
    model(
        "cut",
        r"'{folder}/cut/model\.safetensors' is damaged \(.*incomplete metadata.*\)\. Download or save it again\.",
    ),
    model("cut", r"'{folder}/cut/model\.safetensors' is damaged \(.*\)\. Download or save it again\.", "amateur"),
    model("garbage", r"'{folder}/garbage/model\.safetensors' is damaged \(.*\)\. Download or save it again\."),
    model(
        "empty_weights", r"'{folder}/empty_weights/model\.safetensors' is damaged \(.*\)\. Download or save it again\."
    ),
    model(
        "other_shape",
        rf"The weights of the model '{{folder}}/other_shape' do not fit its config\.json: {SHAPES} Save the model "
        r"again with `save_pretrained`, or fix its config\.json\.",
        loads=True,
    ),
    model(
        "nan",
        r"The expert's logits at the first tokens of an answer to row \d are not finite\. Load the expert in .* NaN\.",
        loads=True,
    ),
    model("nan", r"The amateur's logits at step 0 of row 1 are not finite\. .*", "amateur", loads=True),
    # Adapters
    model("no_base", rf"The expert '{{folder}}/nowhere' {NO_MODEL}"),
    model(
        "null_base",
        r"The expert '{folder}/null_base' is an adapter that does not name its base model\. Set "
        r"`base_model_name_or_path` in its adapter_config\.json\.",
    ),
    model("bad_adapter", r"The adapter_config\.json of the expert '{folder}/bad_adapter' cannot be read: .*"),
    model("new_adapter", r"The adapter_config\.json of the expert '{folder}/new_adapter' cannot be read: 'NEW'\."),
    model("no_adapter_weights", r"The expert '{folder}/no_adapter_weights' has no weights: .*"),
    model(
        "other_base",
        rf"The adapter '{{folder}}/other_base' does not fit its base model '.*': {SHAPES} It must be the model .*",
        loads=True,
    ),
    model("other_modules", r"Target modules {'qkv'} not found in the base model\. .*", loads=True),
    # Vocabularies
    model(
        "no_tokenizer",
        r"The expert has no tokenizer: '{folder}/no_tokenizer' holds no tokenizer\.json\. Save the "
        r"model's tokenizer there, or in Python pass it as `processing_class`\.",
    ),
    model(
        "no_tokenizer",
        r"The amateur has no tokenizer: .*, or in Python pass it as `amateur_processing_class`\.",
        "amateur",
    ),
    model("bad_tokenizer", r"The tokenizer of the expert '{folder}/bad_tokenizer' cannot be loaded: .*\."),
    model("empty_tokenizer", r"The tokenizer of the expert '{folder}/empty_tokenizer' cannot be loaded: .*\."),
    model(
        "other_tokenizer",
        r"The bytes of the amateur's tokens cannot be determined, so it cannot be paired with a model that has "
        r"different tokens\. Choose two models of one family, or two with byte-level BPE or SentencePiece, .*\.",
        "amateur",
    ),
]

ROW = r"Row 0 of the train dataset cannot be used for training: "
MAKE = r"Make it with `ContrastiveStepSampler` or `lightreasoner sample`\."


def rows(change: str, sentence: str) -> Mistake:
    return Mistake(f"rows: {change}", {"dataset_name": f"{{folder}}/{change}.jsonl"}, sentence)


# A good row of two steps, and what each file changes of it
GOOD = {
    "prompt_ids": [5, 6],
    "completion_ids": [7, 8, 9],
    "kl_divergence": [0.5, 0.1, 0.9],
    "step_positions": [0, 2],
    "label_ids": [[7, 3], [9]],
    "label_probs": [[0.75, 0.25], [1.0]],
}
STEPS = {
    "position outside": {"step_positions": [0, 3]},
    "position negative": {"step_positions": [-1, 2]},
    "positions not ascending": {"step_positions": [2, 0]},
    "probability negative": {"label_probs": [[1.5, -0.5], [1.0]]},
    "probabilities of 0.6": {"label_probs": [[0.35, 0.25], [1.0]]},
    "probability null": {"label_probs": [[None, 0.25], [1.0]]},
    "label outside": {"label_ids": [[7, 999], [9]]},
    "label twice": {"label_ids": [[7, 7], [9]]},
    "prompt outside": {"prompt_ids": [5, 999]},
    "labels ragged": {"label_ids": [[7], [9]]},
    "labels too few": {"label_ids": [[7, 3]]},
    "ids as text": {"prompt_ids": "5 6"},
    "ids null": {"prompt_ids": None},
    "tokens as text": {"completion_ids": ["a", "b"]},
}

TRAIN = [
    # Rows of steps
    rows("position outside", ROW + r"step position 3 is outside the completion of 3 tokens\."),
    rows("position negative", ROW + r"step position -1 is outside the completion of 3 tokens\."),
    rows("positions not ascending", ROW + r"step positions are not ascending: \[2, 0\]\."),
    rows(
        "probability negative",
        ROW + r"the label at step 0 has a probability that is negative or not finite: \[1\.5, -0\.5\]\.",
    ),
    rows("probabilities of 0.6", ROW + r"the label at step 0 sums to 0\.6, not to 1\."),
    # `datasets` before 5.2 reads the null as a number
    rows("probability null", ROW + r"(label_probs has a gap \(null\)|the label at step 0 .*)\."),
    rows("label outside", ROW + r"label id 999 at step 0 is outside the model's vocabulary\."),
    rows("label twice", ROW + r"the label at step 0 names a token twice: \[7, 7\]\."),
    rows("prompt outside", ROW + r"token id 999 is outside the model's 312 embeddings\."),
    rows("labels ragged", ROW + r"the label at step 0 has 1 ids and 2 probabilities\."),
    rows(
        "labels too few",
        ROW + r"there are 2 step positions, 1 lists of label ids and 2 lists of label probabilities\.",
    ),
    rows(
        "ids as text",
        r"The column 'prompt_ids' of the train dataset must hold lists of whole numbers, got Value\('string'\)\. "
        + MAKE,
    ),
    rows(
        "ids null", r"The column 'prompt_ids' of the train dataset must hold lists .*, got Value\('null'\)\. " + MAKE
    ),
    rows("tokens as text", r"The column 'completion_ids' of the train dataset must hold lists of whole numbers, .*"),
    rows(
        "published",
        r"The train dataset has no column 'prompt_ids'; it has 'prefix', 'tokens', 'weights'\. " + MAKE,
    ),
    rows("good", r"The train dataset has no column 'prompt_ids'; it has 'prompt'\. " + MAKE),
    Mistake(
        "rows: no kept step",
        {"dataset_name": "{folder}/no_steps.parquet"},
        r"The train dataset has no step to train on: no row has one; sample with a lower `beta` or a weaker amateur\.",
    ),
    Mistake(
        "rows: none",
        {"dataset_name": "{folder}/no_rows.parquet"},
        r"The dataset '{folder}/no_rows\.parquet' has no row in its split 'train'\.",
    ),
    setting(
        "max_length",
        "1",
        r"The train dataset has no step to train on: all 2 of its steps are beyond `max_length=1`; raise it\.",
    ),
    setting(
        "dataset_name",
        "{folder}/unfinished",
        r"Sampling into '{folder}/unfinished' is not finished\. Rerun the same `lightreasoner sample` command to "
        r"resume it\.",
    ),
    setting(
        "dataset_name",
        "{folder}/adapter",
        r"'{folder}/adapter' is a model, not a dataset\. Name a file, or the .*",
    ),
    setting("dataset_train_split", "dev", r"The dataset '.*' has no split 'dev': " + SPLITS),
    setting("eval_strategy", "steps", r"The dataset '.*' has no split 'test': " + SPLITS),
    # Settings
    setting("max_length", "0", r"`max_length` must be a whole number, 1 or more, got 0\."),
    setting("learning_rate", "nan", r"`learning_rate` must be a finite number, 0 or more, got nan\."),
    setting("learning_rate", "-1", r"`learning_rate` must be a finite number, 0 or more, got -1\.0\."),
    setting("weight_decay", "nan", r"`weight_decay` must be a finite number, 0 or more, got nan\."),
    setting("max_grad_norm", "nan", r"`max_grad_norm` must be a finite number, 0 or more, got nan\."),
    setting(
        "label_smoothing_factor",
        "0.1",
        r"`label_smoothing_factor` cannot be used with labels that are distributions\. Remove it\.",
    ),
    setting(
        "auto_find_batch_size",
        "true",
        r"`auto_find_batch_size` cannot be used: when memory runs out, .* Lower `per_device_train_batch_size` and "
        r"raise `gradient_accumulation_steps` by the same factor for equal updates\.",
    ),
    setting("num_train_epochs", "0", r"`num_train_epochs` must be a finite number above 0, got 0\.0\."),
    setting(
        "per_device_train_batch_size", "0", r"`per_device_train_batch_size` must be a whole number, 1 or more, .*"
    ),
    setting(
        "gradient_accumulation_steps", "0", r"`gradient_accumulation_steps` must be a whole number, 1 or more, .*"
    ),
    setting("lora_r", "0", r"`lora_r` must be a whole number, 1 or more, got 0\."),
    setting(
        "lora_r",
        "4",
        r"`--lora_r` applies only to a new adapter, but '{folder}/adapter' is an existing adapter, which is trained "
        r"further\. Leave it out, or first merge the adapter into a plain model with `lightreasoner merge`\.",
        model_name_or_path="{folder}/adapter",
    ),
    setting(
        "lora_target_modules",
        "v_proj",
        r"`--lora_target_modules` applies only to a new adapter, but `--use_peft false` trains all weights\. .*",
        use_peft="false",
    ),
    setting("lora_dropout", "nan", r"`lora_dropout` must be in \[0, 1\), got nan\."),
    setting("seed", "-1", r"Seed must be between 0 and 2\*\*32 - 1"),
    setting("gradient_checkpointing_kwargs", "{oops", r"A setting is not the JSON that it must be: '{oops' \(.*\)\."),
    setting(
        "load_best_model_at_end", "true", r"--load_best_model_at_end requires the save and eval strategy to match.*"
    ),
    setting(
        "report_to",
        "swanlab",
        r"`report_to` cannot be \['swanlab'\]: SwanLabCallback requires swanlab to be installed.*",
    ),
    setting("report_to", "paper", r"paper is not supported, only .* are supported\."),
    setting(
        "lr_scheduler_type", "magic", r"Argument --lr_scheduler_type: invalid choice: 'magic' \(choose from .*\)\."
    ),
    setting("config", "{folder}/list.yaml", r"The config file '{folder}/list\.yaml' must hold lines of the form .*"),
    # Without a GPU
    Mistake(
        "--bf16 on a CPU",
        {"bf16": "true", "use_cpu": "false"},
        r"Your setup doesn't support bf16/gpu\. You need to assign use_cpu if you want to train the model on CPU\.",
    ),
    setting("model_init_kwargs", '{"device_map": "cuda"}', r"`device_map` asks for a CUDA GPU \('cuda'\), but .*"),
    setting(
        "attn_implementation",
        "flash_attention_2",
        r"FlashAttention2 has been toggled on, but .*",
        loads=True,
        error=ImportError,
    ),
    # Folders
    setting("output_dir", "", r"`output_dir` must name a folder, got ''\."),
    setting("output_dir", "{folder}/file", r"'{folder}/file' is a file\. Choose another `output_dir`\."),
    setting(
        "output_dir",
        "{folder}/file/adapter",
        r"Cannot write to '{folder}/file/adapter' \(Not a directory\)\. Choose another `output_dir`, or fix the "
        r"permissions\.",
        error=OSError,
    ),
    setting(
        "resume_from_checkpoint",
        "{folder}/nowhere",
        r"'{folder}/nowhere' is not a checkpoint: it has no trainer_state\.json\. Name a folder such as "
        r"'{out}/checkpoint-500'\.",
    ),
    setting("resume_from_checkpoint", "{folder}/no_files", r"'{folder}/no_files' is not a checkpoint: .*"),
    setting(
        "resume_from_checkpoint",
        "true",
        r"There is no complete checkpoint in '{out}' to resume from\. Remove `resume_from_checkpoint` to start "
        r"from the beginning\.",
    ),
    *(
        setting(name, "{folder}/nowhere.json", rf"The file '{{folder}}/nowhere\.json' of `{name}` does not exist\. .*")
        for name in ("accelerator_config", "fsdp_config", "deepspeed")
    ),
    setting("accelerator_config", "{folder}/file", r"The file '{folder}/file' of `accelerator_config` is not JSON .*"),
    setting("fsdp_config", "{folder}/list.json", r"The file '.*' of `fsdp_config` must hold a JSON object.*"),
    # Models
    *(
        model(
            row.id.removeprefix("expert: "),
            row.sentence.replace("expert", "model"),
            "model_name_or_path",
            loads=row.loads,
        )
        for row in SAMPLE
        if row.id.startswith("expert: ") and row.id != "expert: nan"
    ),
    model(
        "nan",
        r"The gradient was not finite 3 times in a row, so training stopped at update 3\. .* NaN in the base .*",
        "model_name_or_path",
        loads=True,
        error=FloatingPointError,
    ),
    Mistake("no model", {"model_name_or_path": "{omit}"}, r"`--expert` is required: the expert that .*"),
    Mistake("no dataset", {"dataset_name": "{omit}"}, r"`--dataset_name` is required: a dataset on the Hub, or .*"),
    setting(
        "lora_target_modules", "qkv", r"Target modules {'qkv'} not found in the base model\. Please .*", loads=True
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, expert_path, amateur_path, tokenizer, steps) -> Path:
    """Everything that the tables name."""
    root = tmp_path_factory.mktemp("bad")
    for name, text in PROMPTS.items():
        (root / name).write_text(text)
    (root / "latin_1.jsonl").write_bytes(b'{"prompt": "2+2="}\n{"prompt": "Z\xe4hle."}\n')  # which `datasets` takes
    (root / "latin_1").mkdir()
    (root / "latin_1" / "a.txt").write_bytes(b"Name a prime.\nZ\xe4hle.\n")
    for name, changes in {**STEPS, "steps": {}}.items():
        (root / f"{name}.jsonl").write_text(rows_of({**GOOD, **changes}))
    (root / "list.json").write_text("[]")
    (root / "published.jsonl").write_text(rows_of({"prefix": "2+2=", "tokens": ["4"], "weights": [1.0]}))
    Dataset.from_dict({"prompt": []}).to_parquet(root / "empty.parquet")
    steps.select([]).to_parquet(root / "no_rows.parquet")
    empty = [[] for _ in steps]
    unkept = {**steps.to_dict(), "step_positions": empty, "label_ids": empty, "label_probs": empty}
    Dataset.from_dict(unkept, features=steps.features).to_parquet(root / "no_steps.parquet")
    steps.to_parquet(root / "cut.parquet")
    cut(root / "cut.parquet")
    (root / "no_files").mkdir()
    (root / "half_adapter").mkdir()
    (root / "half_adapter" / "adapter_model.safetensors").touch()
    (root / "unfinished" / "shards").mkdir(parents=True)
    (root / "unfinished" / "run.json").write_text("{}")
    steps.to_parquet(root / "unfinished" / "shards" / "000000000.parquet")
    (root / "other_data" / "data").mkdir(parents=True)

    def copy(name: str, source: str | Path = expert_path) -> Path:
        return Path(shutil.copytree(source, root / name))

    def change(path: Path, **values: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    # Models
    (copy("bad_config") / "config.json").write_text("{oops")
    change(copy("text_size") / "config.json", hidden_size="32")
    (copy("no_type") / "config.json").write_text("{}")
    change(copy("new_type") / "config.json", model_type="new")
    change(copy("other_shape") / "config.json", hidden_size=64)
    (copy("no_weights") / "model.safetensors").unlink()
    cut(copy("cut") / "model.safetensors")
    (copy("garbage") / "model.safetensors").write_bytes(b"garbage" * 9)
    (copy("empty_weights") / "model.safetensors").write_bytes(b"")
    BertConfig(hidden_size=16).save_pretrained(root / "encoder")
    T5Config(d_model=16).save_pretrained(root / "encoder_decoder")
    broken = poison(Qwen2ForCausalLM.from_pretrained(expert_path))
    broken.save_pretrained(copy("nan"))

    # Tokenizers
    for file in copy("no_tokenizer").glob("tokenizer*"):
        file.unlink()
    (copy("bad_tokenizer") / "tokenizer.json").write_text("{oops")
    (copy("empty_tokenizer") / "tokenizer.json").write_text("{}")
    (copy("no_template") / "chat_template.jinja").unlink()
    (copy("broken_template") / "chat_template.jinja").write_text("{% for %}")
    (copy("strict_template") / "chat_template.jinja").write_text(STRICT_TEMPLATE)
    words = Tokenizer(models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="y").save_pretrained(
        copy("other_tokenizer", amateur_path)
    )

    # Adapters
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(Qwen2ForCausalLM.from_pretrained(expert_path), lora).save_pretrained(root / "adapter")
    for name, changes in {
        "no_base": {"base_model_name_or_path": str(root / "nowhere")},
        "null_base": {"base_model_name_or_path": None},
        "new_adapter": {"peft_type": "NEW"},
        "other_base": {"base_model_name_or_path": amateur_path},
        "other_modules": {"target_modules": ["qkv"]},
    }.items():
        change(copy(name, root / "adapter") / "adapter_config.json", **changes)
    (copy("bad_adapter", root / "adapter") / "adapter_config.json").write_text("{oops")
    (copy("no_adapter_weights", root / "adapter") / "adapter_model.safetensors").unlink()
    return root


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def poison(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(NAN)
    return model


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def unloadable(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("weights were loaded before the mistake was found")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("command", "row"),
    [
        pytest.param(name, row, id=f"{name}: {row.id}")
        for name, table in (("sample", SAMPLE), ("train", TRAIN))
        for row in table
    ],
)
def test_a_mistake_is_one_sentence(command, row, folder, expert_path, amateur_path, tmp_path, capsys, request):
    if not row.loads:
        request.getfixturevalue("unloadable")
    places = {
        "{folder}": str(folder),
        "{expert}": expert_path,
        "{amateur}": amateur_path,
        "{out}": str(tmp_path / "out"),
    }

    def place(text: str, quote=str) -> str:
        for name, value in places.items():
            text = text.replace(name, quote(value))
        return text

    flags = {name: value for name, value in {**FLAGS[command], **row.flags}.items() if value != "{omit}"}
    argv = [part for name, value in flags.items() for part in (f"--{name}", value) if part is not None]
    argv = [place(part) for part in argv]

    # On the command line
    assert cli.main([command, *argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith(PROGRESS)]
    assert len(lines) == 1
    prefix, sentence = f"lightreasoner {command}: error: ", lines[0]
    assert sentence.startswith(prefix)

    # In Python
    module = import_module(f"trl_lightreasoner.commands.{command}")
    parser = module.make_parser()
    with pytest.raises(row.error) as error:
        module.main(*parser.parse(argv))
    assert re.fullmatch(place(row.sentence, re.escape), " ".join(str(error.value).split()))
    # Where the same settings are flags
    assert " ".join(parser.explain(error.value).split()) == sentence.removeprefix(prefix)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], r"A command is missing\."),
        (["frobnicate"], r"There is no command 'frobnicate'\."),
        (["--frobnicate"], r"There is no command '--frobnicate'\."),
    ],
)
def test_a_wrong_command_is_one_sentence(argv, sentence, capsys):
    assert cli.main(argv) == 2
    commands = re.escape(", ".join(cli.COMMANDS))
    assert re.fullmatch(f"lightreasoner: error: {sentence} The commands are {commands}\\.\n", capsys.readouterr().err)


# What can only go wrong in Python


class Headless(Qwen2ForCausalLM):
    """A model that returns no logits."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        return BaseModelOutput(self.model(*args, **kwargs).last_hidden_state)


def make_args(tmp_path: Path, **kwargs: Any) -> ContrastiveSamplingConfig:
    return ContrastiveSamplingConfig(str(tmp_path / "steps"), **kwargs)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"alpha": "0.2"}, r"`alpha` must be a number, got '0\.2'\."),
        ({"alpha": None}, r"`alpha` must be a number, got None\."),
        ({"beta": True}, r"`beta` must be a number, got True\."),
        ({"beta": NAN}, r"`beta` must be a finite number of nats, 0 or more, got nan\. The paper uses 0\.4\."),
        ({"dtype": torch.float32}, r"`dtype` must be one of \['auto', .*\], got torch\.float32\."),
        ({"max_new_tokens": 1.5}, r"`max_new_tokens` must be a whole number, 1 or more, got 1\.5\."),
        ({"max_prompt_length": 0}, r"`max_prompt_length` must be a whole number, 1 or more, got 0\."),
        ({"include_first_step": "no"}, r"`include_first_step` must be true or false, got 'no'\."),
        ({"model_init_kwargs": [1]}, r"`model_init_kwargs` must be a dict or a JSON object, such as .*, got \[1\]\."),
    ],
)
def test_wrong_settings_of_sampling(settings, sentence, tmp_path):
    with pytest.raises(ValueError, match=rf"^{sentence}$"):
        make_args(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning_rate": "fast"}, r"`learning_rate` must be a finite number, 0 or more, got 'fast'\."),
        ({"per_device_train_batch_size": 2.5}, r"`per_device_train_batch_size` must be a whole number, .* got 2\.5\."),
        ({"num_train_epochs": NAN}, r"`num_train_epochs` must be a finite number above 0, got nan\."),
        ({"use_cuda_graphs": "no"}, r"`use_cuda_graphs` must be true or false, got 'no'\."),
        ({"max_length": "long"}, r"`max_length` must be a whole number, 1 or more, got 'long'\."),
        (
            {"neftune_noise_alpha": NAN},
            r"`neftune_noise_alpha` must be a finite number, 0 or more, got nan\.",
        ),
        ({"warmup_steps": NAN}, r"`warmup_steps` must be a finite number, 0 or more, got nan\."),
        ({"adam_epsilon": NAN}, r"`adam_epsilon` must be a finite number, 0 or more, got nan\."),
        ({"adam_beta2": 1.0}, r"`adam_beta2` must be a number in \[0, 1\), got 1\.0\."),
        ({"max_steps": 1.5}, r"`max_steps` must be a whole number, 1 or more, or -1, got 1\.5\."),
        ({"max_steps": 0}, r"`max_steps` must be a whole number, 1 or more, or -1, got 0\."),
        ({"max_steps": -5}, r"`max_steps` must be a whole number, 1 or more, or -1, got -5\."),
        ({"logging_steps": NAN}, r"`logging_steps` must be a finite number above 0, got nan\."),
        ({"save_steps": -1}, r"`save_steps` must be a finite number, 0 or more, got -1\."),
        ({"eval_steps": -1, "eval_strategy": "steps"}, r"`eval_steps` must be a finite number above 0, got -1\."),
        ({"lr_scheduler_kwargs": {"x": 1}}, r"`lr_scheduler_kwargs` cannot be {'x': 1} with `lr_scheduler_type` 'l.*"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            r"`lr_scheduler_kwargs` cannot be None with .*: One of min_lr .*",
        ),
        (
            {"accelerator_config": {"x": 1}},
            r"`accelerator_config` cannot be used: .* unexpected keyword argument 'x'\.",
        ),
        ({"optim_args": "x"}, r"`optim_args` cannot be 'x' with .*: it must be pairs, such as 'momentum=0\.9'\."),
        ({"optim_args": "x=1"}, r"`optim_args` cannot be 'x=1' with `optim` 'adamw_.*': it does not know 'x'\."),
        ({"optim": "sgd", "optim_args": "momentum=x"}, r"`optim_args` cannot be 'momentum=x' with .*: could not .*"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,x=1"}, r"`optim_args` cannot be .*: it does not know 'x'\."),
        (
            {"activation_checkpointing_kwargs": {"x": 1}},
            r"`activation_checkpointing_kwargs` does not support 'x', only .*",
        ),
    ],
)
def test_wrong_settings_of_training(settings, sentence, tmp_path):
    with pytest.raises(ValueError, match=rf"^{sentence}$"):
        LightReasonerConfig(str(tmp_path), **settings)


@pytest.mark.parametrize("optim_args", ["momentum=0.9,nesterov=true", "momentum=0.0, nesterov=false"])
def test_good_settings_of_an_optimizer(optim_args, tmp_path):
    LightReasonerConfig(str(tmp_path), use_cpu=True, optim="sgd", optim_args=optim_args)


@pytest.mark.parametrize(
    ("dataset", "error", "sentence"),
    [
        ("2+2=", TypeError, r"`dataset` must be a `datasets\.Dataset` or a list, got `str`\. Put .* into a list\."),
        (("2+2=",), TypeError, r"`dataset` must be a `datasets\.Dataset`, got `tuple`\."),
        ([2, "2+2="], ValueError, r"A list of prompts must hold texts, .* it holds int and str\. Give rows as .*"),
        (
            DatasetDict({"train": Dataset.from_dict({"prompt": ["2+2="]})}),
            TypeError,
            r"`dataset` must be a `datasets\.Dataset`, got `DatasetDict`\. Choose a split, such as "
            r"`dataset\['train'\]`\.",
        ),
        (Dataset.from_dict({"prompt": []}), ValueError, r"The dataset is empty: there is no prompt to sample\."),
        (
            Dataset.from_dict({"question": ["2+2="]}),
            ValueError,
            r"The dataset has no `prompt` column; it has 'question'\. Map your rows to .*",
        ),
    ],
)
def test_what_is_no_dataset_of_prompts(dataset, error, sentence, expert_path, amateur_path, tmp_path, unloadable):
    sampler = ContrastiveStepSampler(expert_path, amateur_path, make_args(tmp_path))
    with pytest.raises(error, match=rf"^{sentence}$"):
        sampler.sample(dataset)


@pytest.mark.parametrize("model", [7, None, torch.nn.Linear(2, 2)], ids=["int", "None", "Linear"])
def test_what_is_no_model(model, amateur_path, tmp_path, steps):
    sentence = r"must be a model id, a path, a `PreTrainedModel` or a `PeftModel`, got `\w+`\."
    with pytest.raises(TypeError, match=rf"^The expert {sentence}$"):
        ContrastiveStepSampler(model, amateur_path, make_args(tmp_path))
    with pytest.raises(TypeError, match=rf"^The model {sentence}$"):
        LightReasonerTrainer(model, LightReasonerConfig(str(tmp_path), use_cpu=True), train_dataset=steps)


def test_settings_of_something_else(expert_path, amateur_path, tmp_path):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True)
    for call, kind in [
        (lambda: ContrastiveStepSampler(expert_path, amateur_path, args), "ContrastiveSamplingConfig"),
        (lambda: evaluate(expert_path, args), "EvaluationConfig"),
        (lambda: run_pipeline(args), "RunConfig"),
        (lambda: tune(args), "TuneConfig"),
    ]:
        with pytest.raises(TypeError, match=rf"^`args` must be a `{kind}`, got `LightReasonerConfig`\.$"):
            call()


def test_a_model_that_returns_no_logits(expert_path, amateur_path, tmp_path, steps):
    model = Headless.from_pretrained(expert_path)
    sentence = (
        r"^`Headless` returned no logits\. LightReasoner needs a causal language model whose forward gives an .*$"
    )
    scored = Dataset.from_dict({"prompt": ["2+2="], "completion": ["4"]})
    with pytest.raises(ValueError, match=sentence):
        ContrastiveStepSampler(model, amateur_path, make_args(tmp_path)).sample(scored)
    args = LightReasonerConfig(str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ValueError, match=sentence):
        LightReasonerTrainer(model, args, train_dataset=steps).train()


def test_a_model_with_nan_in_its_weights(expert, amateur_path, tmp_path, prompts):
    with pytest.raises(ValueError, match=r"^The expert's logits at the first tokens of an answer to row \d are not"):
        ContrastiveStepSampler(poison(expert), amateur_path, make_args(tmp_path)).sample(prompts)


def test_a_folder_that_may_not_be_written(
    expert_path, amateur_path, steps, prompts, tmp_path, monkeypatch, unloadable
):
    monkeypatch.setattr(step_writer.os, "access", lambda path, mode: False)  # as root, permissions do not bite
    sentence = rf"^Cannot write to '{tmp_path}/\w+' \(Permission denied\)\. Choose another `output_dir`, or fix .*$"
    with pytest.raises(OSError, match=sentence):
        ContrastiveStepSampler(expert_path, amateur_path, make_args(tmp_path)).sample(prompts)
    args = LightReasonerConfig(str(tmp_path / "adapter"), use_cpu=True)
    with pytest.raises(OSError, match=sentence):
        LightReasonerTrainer(expert_path, args, train_dataset=steps)


def test_metadata_that_is_not_json():
    dataset = Dataset.from_list([{**GOOD, "sampling_metadata": "{oops"}])
    sentence = r"^The `sampling_metadata` of the dataset is not JSON \(.*\)\. Remove the column, or sample again\.$"
    with pytest.raises(ValueError, match=sentence):
        sampling_metadata(dataset)
    with pytest.raises(ValueError, match=sentence):
        raise_beta(dataset, 0.8)
