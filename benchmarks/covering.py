"""How exact is the covering, by which an amateur with another tokenizer is read?

The bundled expert answers problems. Two amateurs read them: the bundled one, whose tokens are the expert's, so that
the exact values are known; and a small model with a tokenizer of its own, trained here for a minute or two, for which
the covering is compared with itself at a pruning a hundred times finer.

    python benchmarks/covering.py --num_prompts 20

With --expert and --amateur: how fast is it, on a GPU if there is one, beside the same scoring of an amateur with the
expert's tokenizer, for which the expert itself stands in?

    python benchmarks/covering.py --expert EXPERT --amateur AMATEUR --num_prompts 64

With --agreement, and an amateur that has the expert's tokenizer: does it keep the same steps as the plain computation,
with the same labels? --questions is a file of JSON lines with a "question" each, and --bare_text leaves chat templates
out.

    python benchmarks/covering.py --expert EXPERT --amateur AMATEUR --agreement --questions train.jsonl
"""

import argparse
import functools
import json
import math
import random
import time
from collections import Counter

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import amateur_solution, make_problems
from trl_lightreasoner.generation.greedy import find_eos_ids, generate_greedy
from trl_lightreasoner.models.token_bytes import TokenBytes
from trl_lightreasoner.sampling import covered_step
from trl_lightreasoner.sampling.covered_step import USUAL, CoveredStep, log_width, open_contexts
from trl_lightreasoner.sampling.covering import Covering
from trl_lightreasoner.sampling.cross_scoring import MAX_WIDTH, CrossScoring
from trl_lightreasoner.sampling.other_amateur import OtherAmateur
from trl_lightreasoner.sampling.scoring import Trajectory, score_trajectories
from trl_lightreasoner.steps.prompts import encode_rows
from trl_lightreasoner.vocabulary import model_vocabulary


ALPHA, BETA = 0.2, 0.4
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def other_amateur(updates: int):
    """A three-layer Llama with numbers of 1 to 3 digits in a token, trained on what the bundled amateur learned."""
    draw = random.Random(0)
    torch.manual_seed(0)
    problems = make_problems(8000, seed=5, split="pretrain")
    template = AutoTokenizer.from_pretrained(PAIR / "amateur").chat_template
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        show_progress=False,
    )
    answers = [amateur_solution(problem, draw) for problem in problems]
    backend.train_from_iterator([p["question"] + a for p, a in zip(problems, answers, strict=True)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    rows = [
        (tokenizer.apply_chat_template(as_prompt(p), add_generation_prompt=True, return_dict=True)["input_ids"], a)
        for p, a in zip(problems, answers, strict=True)
    ]
    rows = [(p, tokenizer(a, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]) for p, a in rows]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    for _ in range(updates):
        batch = draw.sample(rows, 16)
        width = max(len(p) + len(a) for p, a in batch)
        ids, labels = torch.zeros(16, width, dtype=torch.long), torch.full((16, width), -100)
        for row, (prompt, answer) in enumerate(batch):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_prompts", type=int, default=20)
    parser.add_argument("--updates", type=int, default=400, help="of the amateur with a tokenizer of its own")
    parser.add_argument("--expert", help="measure the speed of a pair with different tokenizers")
    parser.add_argument("--amateur")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of that pair's expert")
    parser.add_argument("--questions", help="JSON lines, for that pair")
    parser.add_argument("--bare_text", action="store_true", help="no chat templates")
    parser.add_argument("--agreement", action="store_true", help="compare that pair with the plain computation")
    args = parser.parse_args()
    if args.agreement:
        return measure_agreement(args)
    if args.expert:
        return measure_speed(args)
    torch.set_num_threads(1)
    expert = AutoModelForCausalLM.from_pretrained(PAIR / "expert").eval()
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "expert")
    vocabulary, eos_ids = model_vocabulary(tokenizer, expert.config.vocab_size), find_eos_ids(expert, tokenizer)
    problems = make_problems(args.num_prompts, seed=9, split="train", kind_shares=KIND_SHARES)
    rows = [{"prompt": as_prompt(problem)} for problem in problems]
    prompts = encode_rows(rows, tokenizer, set(eos_ids))["prompt_ids"]
    completions = generate_greedy(expert, prompts, vocabulary, eos_ids, max_new_tokens=64)
    masks = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = expert(torch.tensor([prompt + completion[:-1]])).logits[0, len(prompt) - 1 :, : len(tokenizer)]
        log_probs = logits.double().log_softmax(-1)
        edges = log_probs.amax(-1, keepdim=True) + math.log(ALPHA)
        masks.append([(row >= edge).nonzero()[:, 0].tolist() for row, edge in zip(log_probs, edges, strict=True)])
    same = (
        AutoModelForCausalLM.from_pretrained(PAIR / "amateur").eval(),
        AutoTokenizer.from_pretrained(PAIR / "amateur"),
    )
    measure("the same tokens", *same, expert, tokenizer, rows, completions, masks, eos_ids, exact=True)
    with torch.enable_grad():
        other = other_amateur(args.updates)
    measure("other tokens", *other, expert, tokenizer, rows, completions, masks, eos_ids, exact=False)


def measure(name, amateur, own, expert, tokenizer, rows, completions, masks, eos_ids, exact: bool) -> None:
    ends = find_eos_ids(amateur, own)
    tokens, own_tokens = TokenBytes(tokenizer, expert.config.vocab_size), TokenBytes(own, amateur.config.vocab_size)
    read = Covering(tokens, own_tokens, ends)
    prompts = encode_rows(rows, own, set(ends))["prompt_ids"]
    errors, widths, variations, favourites = [], [], [], []
    unread = dropped = extra = steps = 0
    start = time.perf_counter()
    for prompt, completion, mask in zip(prompts, completions, masks, strict=True):
        made: dict[tuple[int, ...], torch.Tensor] = {}

        def probs(context, made=made, prompt=prompt):
            if context not in made:
                logits = amateur(torch.tensor([[*prompt, *context]])).logits[0, -1].double()
                logits[len(own) :] = -math.inf
                made[context] = logits.softmax(-1)
            return made[context]

        trunk = read.own_tokens(completion[:-1])
        for t, needed in enumerate(mask):
            answers = [None if token in eos_ids else token for token in needed]
            steps += 1
            values = []
            for pruning in (USUAL, USUAL._replace(of_candidate=1e-5, most_contexts=400)):
                finer = pruning != USUAL
                if finer and exact:
                    break
                place = read.starts(completion[: t + 1], t + 1)[t]
                if place is None:
                    break
                step = CoveredStep(read, place, answers, answers, pruning)
                while contexts := step.wanted():
                    extra += sum(not finer and list(context) != trunk[: len(context)] for context in contexts)
                    openings = [(step, context, row) for row, context in enumerate(contexts)]
                    open_contexts(read, openings, torch.stack([probs(context) for context in contexts]))
                values.append(step.bounds(answers))
            if not values:
                unread += 1
                continue
            one = values[0]
            true = [probs(tuple(completion[:t]))[i].item() for i in needed] if exact else values[1].estimate
            widths.append(max(map(log_width, one.low, one.high)))
            if widths[-1] > MAX_WIDTH:
                dropped += 1
                continue
            errors += [abs(math.log(a / b)) for a, b in zip(one.estimate, true, strict=True)]
            if len(needed) > 1:
                labels = [np.array([1 / value for value in each]) for each in (one.estimate, true)]
                labels = [each / each.sum() for each in labels]
                variations.append(np.abs(labels[0] - labels[1]).sum() / 2)
                favourites.append(labels[0].argmax() == labels[1].argmax())
    print(
        f"{name}: {steps} steps, {unread} not readable, {dropped} dropped; error of log pi_A, median "
        f"{np.median(errors):.2g}, 90 % {np.quantile(errors, 0.9):.2g}, largest {max(errors):.2g} nats; width, 90 % "
        f"{np.quantile(widths, 0.9):.2g}; of {len(variations)} steps with two candidates or more, total variation "
        f"{max(variations):.2g} at most, same favourite {np.mean(favourites):.0%}; {extra / steps:.2f} further "
        f"contexts a step; {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def load_pair(args: argparse.Namespace):
    """The models of a pair, its trajectories, the amateur's prompts, and the covering."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = (args.expert, args.amateur)
    expert, amateur = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval().to(device) for path in paths)
    tokenizer, own = map(AutoTokenizer.from_pretrained, paths)
    vocabulary, eos_ids = model_vocabulary(tokenizer, expert.config.vocab_size), find_eos_ids(expert, tokenizer)
    if args.questions:
        with open(args.questions, encoding="utf-8") as file:
            questions = [json.loads(line)["question"] for _, line in zip(range(args.num_prompts), file, strict=False)]
    else:
        problems = make_problems(args.num_prompts, seed=9, split="train", kind_shares=KIND_SHARES)
        questions = [problem["question"] for problem in problems]
    if tokenizer.chat_template and own.chat_template and not args.bare_text:
        rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
        prompts, own_prompts = (
            encode_rows(rows, each, set(find_eos_ids(model, each)))["prompt_ids"]
            for model, each in ((expert, tokenizer), (amateur, own))
        )
    else:
        texts = [f"{question}\n" for question in questions]
        prompts, own_prompts = (each(texts).input_ids for each in (tokenizer, own))
    completions = generate_greedy(expert, prompts, vocabulary, eos_ids, max_new_tokens=args.max_new_tokens)
    trajectories = [Trajectory(*pair) for pair in zip(prompts, completions, strict=True)]
    widths = (expert.config.vocab_size, amateur.config.vocab_size)
    other = OtherAmateur(tokenizer, own, vocabulary, widths, find_eos_ids(amateur, own), None, (None, None))
    other.prepare(expert, amateur, eos_ids)
    return expert, amateur, trajectories, own_prompts, vocabulary, other


def measure_agreement(args: argparse.Namespace) -> None:
    expert, amateur, trajectories, own_prompts, vocabulary, other = load_pair(args)
    exact = score_trajectories(expert, amateur, trajectories, vocabulary, ALPHA, BETA)
    covered = other.score(expert, amateur, trajectories, own_prompts, ALPHA, BETA)
    kept, found = (
        {
            (i, t): dict(zip(ids, probs, strict=True))
            for i, row in enumerate(rows)
            for t, ids, probs in zip(row.step_positions, row.label_ids, row.label_probs, strict=True)
        }
        for rows in (exact, covered)
    )
    both = kept.keys() & found.keys()
    errors = [
        abs(math.log(prob / found[step][token]))
        for step in both
        if kept[step].keys() == found[step].keys()
        for token, prob in kept[step].items()
    ]
    supports = sum(kept[step].keys() == found[step].keys() for step in both)
    # Where the divergence over the most probable tokens is below beta, though the full one is not
    coarse = sum((covered[i].kl_divergence[t] or math.inf) < BETA for i, t in kept.keys() - found.keys())
    print(
        f"{sum(len(each.completion_ids) for each in trajectories)} steps, {len(kept)} kept by the plain computation, "
        f"{len(found)} by the covering, {len(both)} by both: recall {len(both) / len(kept):.3f}, precision "
        f"{len(both) / len(found):.3f}; of the others {coarse} are below beta by the coarser divergence; "
        f"{dict(other._scoring.dropped)}; labels of {supports} steps have the same tokens, whose log-probabilities "
        f"differ by {np.median(errors):.2g} nats, median, 90 % {np.quantile(errors, 0.9):.2g}, largest "
        f"{max(errors):.2g}"
    )


def measure_speed(args: argparse.Namespace) -> None:
    expert, amateur, trajectories, own_prompts, vocabulary, other = load_pair(args)
    device = next(amateur.parameters()).device.type
    other.covering.first(device)  # made once a pair
    spent, calls = Counter(), Counter()

    def timed(name, owner, method):
        """Count and time what a method does, and what it copies from the device."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def run(*inputs, **kwargs):
            wait()
            start, calls["open"] = time.perf_counter(), calls["open"] + (name == "lookups")
            result = call(*inputs, **kwargs)
            wait()
            spent[name] += time.perf_counter() - start
            calls[name] += 1
            calls["open"] -= name == "lookups"
            return result

        setattr(owner, method, run)

    def counted(copy):
        def run(tensor):
            calls["transfers"] += calls["open"]
            return copy(tensor)

        return run

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def seconds(call):
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    steps = sum(len(each.completion_ids) for each in trajectories)
    other.score(
        expert, amateur, trajectories[:1], own_prompts[:1], ALPHA, BETA
    )  # which compares how branches are read
    for name in ("unknown", "known"):
        if name == "unknown":
            other.covering.forget()
        same = seconds(lambda: score_trajectories(expert, expert, trajectories, vocabulary, ALPHA, BETA))
        covered = seconds(lambda: other.score(expert, amateur, trajectories, own_prompts, ALPHA, BETA))
        print(
            f"texts {name} to the cache: {steps} steps, same tokenizer {steps / same:,.0f} a second, another "
            f"{steps / covered:,.0f}",
            flush=True,
        )
    for model in (expert, amateur):
        timed("heads", model.get_output_embeddings(), "forward")
        timed("passes", model.get_decoder(), "forward")
    timed("tokenizers", TokenBytes, "_encode")
    timed("lookups", covered_step, "look_up")
    timed("lookups", CrossScoring, "_probabilities")
    torch.Tensor.tolist, torch.Tensor.numpy = counted(torch.Tensor.tolist), counted(torch.Tensor.numpy)
    parts = ("passes", "heads", "lookups", "tokenizers")
    for name in ("unknown", "known"):
        if name == "unknown":
            other.covering.forget()
        spent.clear()
        calls.clear()
        start = time.process_time()
        covered = seconds(lambda: other.score(expert, amateur, trajectories, own_prompts, ALPHA, BETA))
        print(
            f"of {covered:.2f} s ({time.process_time() - start:.2f} s of processor time) with texts {name}, each part "
            "waited for: " + ", ".join(f"{name} {spent[name]:.2f}" for name in parts) + ", everything else "
            f"{1e3 * (covered - sum(spent.values())) / steps:.2f} ms a step; {calls['passes']} passes of both models, "
            f"{calls['transfers']} transfers of lookups"
        )


if __name__ == "__main__":
    main()
