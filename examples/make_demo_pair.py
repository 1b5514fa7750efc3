# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lightreasoner"]
# ///
"""Train the expert and the amateur that `lightreasoner demo` uses, from scratch.

Both are Qwen2 models over one 512-token vocabulary, trained on the word problems of `trl_lightreasoner.demo.task`. The
expert's corpus is careful now and then, the amateur's hardly ever; that difference is all that the method needs.

Cost: the expert of the bundled pair took 83 s on one H100, next to another, and its amateur 608 s on one CPU thread.
With `--size small`, for which no GPU is needed, a pair took 668 s on one CPU thread; it is less sure in its sums.
Run it as

```bash
python examples/make_demo_pair.py --output_dir demo_pair
```
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    get_cosine_schedule_with_warmup,
)

from trl_lightreasoner.demo.task import KIND_SHARES, amateur_solution, expert_solution, make_problems


VOCAB_SIZE = 512
MAX_LENGTH = 512
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Recipe:
    config: dict[str, int]
    num_steps: int
    batch_size: int


def sizes(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    }


RECIPES = {
    "demo": {"expert": Recipe(sizes(128, 6, 4, 384), 1500, 256), "amateur": Recipe(sizes(80, 3, 2, 240), 2000, 64)},
    "small": {"expert": Recipe(sizes(96, 4, 3, 288), 1600, 64), "amateur": Recipe(sizes(64, 2, 2, 192), 1200, 64)},
}
NUM_PROBLEMS = {"demo": 200_000, "small": 120_000}
# The small pair never meets comparisons, whose text is the longest
PROBLEM_KINDS: dict[str, Mapping[str, float]] = {"demo": KIND_SHARES, "small": {"chain": 2, "shop": 1}}
SOLVERS = {"expert": expert_solution, "amateur": amateur_solution}

# A quarter of the documents carry the system message that the paper prompts with, so that the pair knows both forms.
SYSTEM_MESSAGE = {"role": "system", "content": "Please reason step by step."}
SYSTEM_SHARE = 0.25

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
tags:
- toy
- lightreasoner
---

# Demo {role}

A toy: the {role} of the pair with which `lightreasoner demo` shows LightReasoner ([arXiv
2510.07962](https://huggingface.co/papers/2510.07962)) on a CPU in a minute. It knows arithmetic word problems of two
to five steps and nothing else. Do not use it for anything but demonstrations and tests.

| | |
|---|---|
| architecture | Qwen2, {num_parameters:,} parameters, {num_hidden_layers} layers, width {hidden_size} |
| tokenizer | byte-level BPE, 512 tokens, every digit a token of its own; the same for expert and amateur |
| data | {num_problems:,} generated problems (`trl_lightreasoner.demo.task`), no text from anywhere else |
| solutions | {solutions} |
| training | from scratch, {num_steps:,} steps of {batch_size} documents, AdamW {learning_rate}, seed {seed} |
| license | Apache-2.0 |

Made with `python examples/make_demo_pair.py --output_dir OUTPUT --size {size} --seed {seed}`.
"""
SOLUTIONS = {
    "expert": "careful in 36 to 65 % of the problems, the fewer the more steps they take, sloppy in the others",
    "amateur": "careful in 4 % of the problems, sloppy in the others",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for `expert` and `amateur`.")
    parser.add_argument("--size", choices=list(RECIPES), default="demo", help="Of the models and their training.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the problems, the solutions and the weights.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Device to train on.")
    args = parser.parse_args()

    torch.set_float32_matmul_precision("high")
    problems = make_problems(
        NUM_PROBLEMS[args.size], seed=args.seed, split="pretrain", kind_shares=PROBLEM_KINDS[args.size]
    )
    tokenizer = train_tokenizer(problems, args.seed)
    for role, recipe in RECIPES[args.size].items():
        start = time.perf_counter()
        torch.manual_seed(args.seed)
        documents = tokenize(problems, SOLVERS[role], tokenizer, seed=args.seed)
        model = make_model(recipe.config, tokenizer)
        train(model, documents, recipe.num_steps, recipe.batch_size, args.seed, args.device, role)
        save(model, tokenizer, role, args.size, args.seed, args.output_dir / role)
        print(f"{role}: {time.perf_counter() - start:.0f} s", flush=True)


def train_tokenizer(problems: list[dict], seed: int) -> Qwen2Tokenizer:
    """Train a small vocabulary for Qwen2's tokenizer, to which every digit is a token of its own."""
    rng = random.Random(seed)
    texts = ["system", "user", "assistant", SYSTEM_MESSAGE["content"]]
    for problem in problems[:10_000]:
        texts += [problem["question"], expert_solution(problem, rng)]
    tokenizer = Qwen2Tokenizer(
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer.train_new_from_iterator(texts, vocab_size=VOCAB_SIZE, show_progress=False)


def tokenize(
    problems: list[dict], solve: Callable[[dict, random.Random], str], tokenizer: Qwen2Tokenizer, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Give the prompt of each problem as inference sees it, and a solution that ends in EOS, as token ids."""
    rng = random.Random(seed)
    user_message = {"role": "user", "content": "{question}"}
    plain, with_system = (
        # Rendered once with a placeholder: the template is slow.
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in ([user_message], [SYSTEM_MESSAGE, user_message])
    )
    documents: list[tuple[list[int], list[int]]] = []
    for start in range(0, len(problems), 10_000):
        batch = problems[start : start + 10_000]
        prompts = [
            (with_system if rng.random() < SYSTEM_SHARE else plain).replace("{question}", problem["question"])
            for problem in batch
        ]
        completions = [solve(problem, rng) + tokenizer.eos_token for problem in batch]
        documents += zip(tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"], strict=True)
    return documents


def make_model(config: dict[str, int], tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            num_key_value_heads=config["num_attention_heads"],
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    )


def train(
    model: Qwen2ForCausalLM,
    documents: list[tuple[list[int], list[int]]],
    num_steps: int,
    batch_size: int,
    seed: int,
    device: str,
    name: str | None = None,
):
    """Minimise the cross-entropy of the solutions; says how it goes if there is a `name`."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=100, num_training_steps=num_steps)
    # All documents as one padded tensor on the device: making batches out of lists takes longer than the models
    rows = [torch.tensor(prompt + completion, dtype=torch.int16) for prompt, completion in documents]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id).to(device)
    starts = torch.tensor([len(prompt) for prompt, _ in documents], device=device)
    ends = torch.tensor([len(row) for row in rows], device=device)
    for step, indices in enumerate(iterate_batches(len(documents), batch_size, num_steps, seed), start=1):
        indices = indices.to(device)
        start, end = starts[indices, None], ends[indices, None]
        batch = input_ids[indices, : end.max()].long()
        # No attention mask: a causal model never looks at padding on the right
        hidden_states = model.model(batch).last_hidden_state[:, :-1]
        positions = torch.arange(1, batch.shape[1], device=device)
        in_solution = (positions >= start) & (positions < end)
        loss = F.cross_entropy(model.lm_head(hidden_states[in_solution]), batch[:, 1:][in_solution])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if name is not None and step % 100 == 0:
            print(f"{name}, step {step}/{num_steps}: loss {loss.item():.4f}", flush=True)


def iterate_batches(num_documents: int, batch_size: int, num_batches: int, seed: int) -> Iterator[torch.Tensor]:
    """
    Go through the documents in a new random order each time. Batches of like length would save padding, but would be
    all careful or all sloppy, which the models do not learn from.
    """
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(num_batches):
        if len(order) < batch_size:
            order = rng.sample(range(num_documents), num_documents)
        yield torch.tensor(order[:batch_size])
        order = order[batch_size:]


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, role: str, size: str, seed: int, output_dir: Path):
    recipe = RECIPES[size][role]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.half().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    card = MODEL_CARD.format(
        role=role,
        num_parameters=model.num_parameters(),
        num_hidden_layers=model.config.num_hidden_layers,
        hidden_size=model.config.hidden_size,
        num_problems=NUM_PROBLEMS[size],
        solutions=SOLUTIONS[role],
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        learning_rate=LEARNING_RATE,
        seed=seed,
        size=size,
    )
    (output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
