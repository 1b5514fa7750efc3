"""
The published way (the scripts of LightReasoner, arXiv 2510.07962), to be measured against. Code of this project's own.

Sampling takes one prompt after the other: the expert's `generate` keeps the scores of every step; the amateur then
reads every prefix of the answer anew, 64 right-padded ones a batch, after each was decoded to text and tokenized
again; divergence and label are worked out step by step. Training takes rows of one step, right-padded, 8 a batch and
2 batches an update, with the logits of every position and a dense label over the vocabulary.

Where the published way is wrong at no gain in time, this is right, so that results can be compared: the logits are
read at each row's own last token instead of at the batch's padding, decoding is greedy whatever a generation_config
says, a tokenizer without padding token works, and the vocabulary is cut at the tokenizer's last token instead of
before its added ones, and the loss does not grow with the accumulation. What is kept: the first step is left out, the
prefix goes through text, the scores are as `generate` has processed them, 1e-12 is added to probabilities.

Both functions are timed on a slice, whose rate `speed.py` scales to the whole.
"""

import tempfile
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback


PREFIXES_PER_BATCH = 64
ROWS_PER_BATCH, BATCHES_PER_UPDATE = 8, 2
LEARNING_RATE = 5e-5
MAX_LENGTH = 512


class Measured(NamedTuple):
    """
    What a slice took.

    Attributes:
        result (`Any`): Rows of one kept step, or the losses of the updates.
        seconds (`float`): Time.
        rate (`float`): Prompts, or kept steps, a second.
        peak_gib (`float`, *optional*): Largest memory in tensors, the models included; `None` without a GPU.
    """

    result: Any
    seconds: float
    rate: float
    peak_gib: float | None


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def clock() -> float:
    """Seconds, when all that was launched is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def as_text(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def sample(
    expert: PreTrainedModel,
    amateur: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str | list[dict[str, str]]],
    max_new_tokens: int = 128,
    alpha: float = 0.2,
    beta: float = 0.4,
) -> Measured:
    """Kept steps of each prompt, as rows with `prompt`, `prefix`, `step`, `token_ids`, `weights`, `kl_divergence`."""
    reset_peak()
    start = clock()
    rows = []
    for prompt in prompts:
        rows += _sample_one(expert, amateur, tokenizer, prompt, max_new_tokens, alpha, beta)
    seconds = clock() - start
    return Measured(rows, seconds, len(prompts) / seconds, peak_gib())


@torch.no_grad()
def _sample_one(expert, amateur, tokenizer, prompt, max_new_tokens, alpha, beta) -> list[dict[str, Any]]:
    text = as_text(prompt, tokenizer)
    inputs = tokenizer([text], return_tensors="pt", add_special_tokens=isinstance(prompt, str)).to(expert.device)
    inputs.pop("token_type_ids", None)
    output = expert.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    answer = output.sequences[0, inputs.input_ids.shape[1] :].tolist()
    expert_probs = [scores[0].softmax(-1) for scores in output.scores]

    contexts = []
    for step in range(1, len(answer)):
        context = text + tokenizer.decode(answer[:step])
        ids = tokenizer(context, return_tensors="pt", add_special_tokens=isinstance(prompt, str)).input_ids[0]
        contexts.append(ids)
    amateur_probs = []
    for start in range(0, len(contexts), PREFIXES_PER_BATCH):
        batch = contexts[start : start + PREFIXES_PER_BATCH]
        input_ids = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
        lengths = torch.tensor([len(ids) for ids in batch])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        logits = amateur(input_ids.to(amateur.device), attention_mask=mask.long().to(amateur.device)).logits
        amateur_probs += [logits[i, length - 1].softmax(-1) for i, length in enumerate(lengths)]

    rows = []
    for step in range(1, len(answer)):
        p_expert, p_amateur = expert_probs[step], amateur_probs[step - 1].to(expert.device)
        width = min(len(p_expert), len(p_amateur))
        p_expert, p_amateur = p_expert[:width], p_amateur[:width]
        plausible = p_expert >= alpha * p_expert.max()
        log_expert, log_amateur = (p_expert + 1e-12).log(), (p_amateur + 1e-12).log()
        divergence = F.kl_div(log_amateur, p_expert + 1e-12, reduction="sum").item()
        if divergence < beta:
            continue
        token_ids = plausible.nonzero()[:, 0].tolist()
        rows.append(
            {
                "prompt": prompt,
                "prefix": tokenizer.decode(answer[:step]),
                "step": step,
                "tokens": [tokenizer.decode([token_id]) for token_id in token_ids],
                "token_ids": token_ids,
                "weights": (log_expert - log_amateur)[plausible].softmax(-1).tolist(),
                "kl_divergence": divergence,
            }
        )
    return rows


def one_step_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows as [`sample`] makes them, of a Dataset that `ContrastiveStepSampler` made."""
    return [
        {"prompt": row["prompt"], "prefix": tokenizer.decode(row["completion_ids"][:t]), "token_ids": i, "weights": p}
        for row in dataset
        for t, i, p in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
    ]


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase):
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        text = as_text(row["prompt"], self.tokenizer) + row["prefix"]
        encoded = self.tokenizer(
            text,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
            add_special_tokens=isinstance(row["prompt"], str),
        )
        label = torch.zeros(len(self.tokenizer))
        label[row["token_ids"]] = torch.tensor(row["weights"])
        return {"input_ids": encoded.input_ids[0], "attention_mask": encoded.attention_mask[0], "labels": label}


class _Trainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels, mask = inputs["labels"], inputs["attention_mask"]
        logits = model(input_ids=inputs["input_ids"], attention_mask=mask).logits
        last = mask.sum(-1) - 1
        logits = logits[torch.arange(len(last), device=last.device), last, : labels.shape[-1]]
        return F.kl_div(logits.log_softmax(-1), labels, reduction="batchmean")


class _Clock(TrainerCallback):
    """Starts when the first update, which sets everything up, is done."""

    def __init__(self):
        self.start, self.losses = None, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.start is None:
            self.start = clock()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    updates: int,
    seed: int = 42,
) -> Measured:
    """Train an adapter for some updates, after one that is not timed. Gives the loss as logged at each update."""

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0}
        padded = {
            name: pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }
        return {**padded, "labels": torch.stack([row["labels"] for row in batch])}

    reset_peak()
    timer = _Clock()
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(
            model,
            TrainingArguments(
                folder,
                per_device_train_batch_size=ROWS_PER_BATCH,
                gradient_accumulation_steps=BATCHES_PER_UPDATE,
                learning_rate=LEARNING_RATE,
                max_steps=1 + updates,
                logging_steps=1,
                save_strategy="no",
                bf16=cuda,
                use_cpu=not cuda,
                dataloader_pin_memory=cuda,
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                seed=seed,
            ),
            train_dataset=_Rows(rows, tokenizer),
            data_collator=collate,
            callbacks=[timer],
        )
        # Else the loss would grow with the accumulation
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = clock() - timer.start
    num_steps = updates * ROWS_PER_BATCH * BATCHES_PER_UPDATE
    return Measured(timer.losses, seconds, num_steps / seconds, peak_gib())
