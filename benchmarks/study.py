"""
Does the mechanism hold, and where does it fail? The method, ablations, rivals and settings, on small pairs.

Every pair is an expert and an amateur as examples/make_demo_pair.py makes them; without `--pairs` it is the bundled
one alone. Each condition starts from the same expert and the same unlabelled problems and is graded on the same test
problems. Prints Markdown tables, and writes them with all numbers (study.json) and, where matplotlib is installed,
figures (study.png) to the output folder. The same arguments and seed give the same accuracies on the same machine.

```bash
python benchmarks/study.py --quick --output_dir study
python examples/make_demo_pair.py --seed 1 --output_dir pair1  # a GPU makes it in minutes; --size small needs none
python benchmarks/study.py --pairs trl_lightreasoner/demo/pair pair1 pair2 --output_dir study
```
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "examples"))

import datasets
import make_demo_pair
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, DynamicCache, PrinterCallback
from trl import get_peft_config

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
    count_steps,
    kl_quantiles,
    raise_beta,
)
from trl_lightreasoner.commands.train import LightReasonerModelConfig
from trl_lightreasoner.contrast import contrastive_label, plausibility_mask, step_divergence
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import careful_solution, expert_solution, extract_answer, make_problems
from trl_lightreasoner.generation.greedy import cut_after_eos, find_eos_ids, generate_greedy
from trl_lightreasoner.models.loading import load_model, load_tokenizer
from trl_lightreasoner.steps.prompts import encode_rows
from trl_lightreasoner.training.adapters import choose_target_modules
from trl_lightreasoner.vocabulary import model_vocabulary


# The paper's, apart from the learning rate and the number of updates: a pair a thousand times smaller learns at a
# larger rate. These two are the demo's; the sweep shows how much hangs on them.
ALPHA, BETA, LEARNING_RATE, UPDATES, ROWS = 0.2, 0.4, 5e-4, 50, 16
SFT_UPDATES = 200
SAMPLES = 4
MAX_NEW_TOKENS = 64  # no careful answer is longer

Step = tuple[int, list[int], list[float]]  # position, label_ids, label_probs


# Datasets with other labels or other steps


def replace_steps(dataset: Dataset, replace: Callable[[dict, int], list[Step]]) -> Dataset:
    """The dataset with the kept steps and labels of every row replaced by those that `replace(row, index)` gives."""

    def rewrite(row: dict, index: int) -> dict:
        steps = replace(row, index)
        columns = zip(*steps, strict=True) if steps else ([], [], [])
        names = ("step_positions", "label_ids", "label_probs")
        return {name: list(values) for name, values in zip(names, columns, strict=True)}

    # With a fingerprint of ours `map` need not hash what `replace` holds, a model for example
    return dataset.with_format(None).map(
        rewrite, with_indices=True, keep_in_memory=True, new_fingerprint=uuid.uuid4().hex
    )


def steps_of(row: dict) -> list[Step]:
    return list(zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True))


def one_hot(dataset: Dataset) -> Dataset:
    """The same steps, each with the token that the expert took as its label."""
    return replace_steps(
        dataset, lambda row, _: [(t, [row["completion_ids"][t]], [1.0]) for t in row["step_positions"]]
    )


def whole_answers(dataset: Dataset) -> Dataset:
    """Every token of every completion as its own label: supervised fine-tuning."""
    return replace_steps(dataset, lambda row, _: [(t, [i], [1.0]) for t, i in enumerate(row["completion_ids"])])


def random_steps(all_steps: Dataset, selected: Dataset, seed: int) -> Dataset:
    """As many steps of each row as `selected` has, drawn at random, with their own contrastive labels."""
    counts = [len(positions) for positions in selected["step_positions"]]

    def draw(row: dict, index: int) -> list[Step]:
        steps = random.Random(f"{seed} {index}").sample(steps_of(row), counts[index])
        return sorted(steps, key=lambda step: step[0])

    return replace_steps(all_steps, draw)


@torch.no_grad()
def no_contrast(dataset: Dataset, expert: torch.nn.Module) -> Dataset:
    """The same steps and tokens, weighted by the expert alone: the softmax of its logits over the plausible tokens."""

    def relabel(row: dict, _: int) -> list[Step]:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]], device=expert.device)
        logits = expert(ids).logits[0].float()
        steps = []
        for t, label_ids, _probs in steps_of(row):
            probs = logits[len(row["prompt_ids"]) + t - 1, label_ids].softmax(-1)
            probs, order = probs.sort(descending=True)  # the format puts the most probable first
            steps.append((t, [label_ids[i] for i in order.tolist()], probs.tolist()))
        return steps

    return replace_steps(dataset, relabel)


# Decoding


@torch.no_grad()
def decode(
    models: list[torch.nn.Module],
    prompt_ids: list[list[int]],
    choose: Callable[..., torch.Tensor],
    eos_id: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[int]]:
    """Continuations whose every token `choose` picks from the logits of one model or several."""
    device = models[0].device
    length = max(map(len, prompt_ids))
    input_ids = torch.tensor([[eos_id] * (length - len(ids)) + ids for ids in prompt_ids], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    caches = [DynamicCache(config=model.config) for model in models]
    chosen, ended = [], torch.zeros(len(prompt_ids), dtype=torch.bool, device=device)
    while len(chosen) < max_new_tokens and not ended.all():
        logits = [
            model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            for model, cache in zip(models, caches, strict=True)
        ]
        tokens = choose(*logits).masked_fill(ended, eos_id)
        chosen.append(tokens)
        ended |= tokens == eos_id
        input_ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
    return [cut_after_eos(ids, {eos_id}) for ids in torch.stack(chosen, dim=-1).tolist()]


def contrastive_choice(expert_logits: torch.Tensor, amateur_logits: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
    """The favourite of v_C where the divergence is at least beta, elsewhere the expert's."""
    expert_logps, amateur_logps = expert_logits.float().log_softmax(-1), amateur_logits.float().log_softmax(-1)
    label = contrastive_label(expert_logps, amateur_logps, plausibility_mask(expert_logits.float(), ALPHA))
    informative = step_divergence(expert_logps, amateur_logps) >= beta
    return torch.where(informative, label.argmax(-1), expert_logps.argmax(-1))


def random_choice(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


# One pair and what is done with it


@dataclass
class Outcome:
    """
    How a condition did on one pair: for each test problem whether the answer is right, and whether it works out every
    step; steps in the dataset; labelled tokens read while training, repetitions included; problems whose given answer
    was looked at; seconds of training and of making the dataset; what was seen of the amateur, if that is in question.
    """

    right: list[bool]
    careful: list[bool]
    steps: int = 0
    tuned_tokens: int = 0
    labels: int = 0
    seconds: float = 0.0
    amateur: dict[str, float | None] | None = None


class Lab:
    """A pair with the problems that it learns from and those that it is graded on."""

    def __init__(self, pair: str, args: argparse.Namespace):
        self.pair, self.seed = Path(pair), args.seed
        # Models this small are faster on one thread, and the cores are better used by other conditions
        torch.set_num_threads(1)
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        self.device = args.device
        self.kind_shares = {kind: share for kind, share in KIND_SHARES.items() if kind in args.kinds}
        self.kind_shares |= {kind: 1 for kind in args.kinds if kind not in KIND_SHARES}
        self.unlabelled, self.test = (
            make_problems(count, seed=args.seed, split=split, kind_shares=self.kind_shares)
            for count, split in ((args.num_unlabelled, "train"), (args.num_test, "test"))
        )
        self.tokenizer = load_tokenizer(str(self.pair / "expert"))
        self.expert = self.load("expert")
        self.eos_ids = find_eos_ids(self.expert, self.tokenizer)
        self.folder = tempfile.TemporaryDirectory()
        self._amateurs: dict[str, torch.nn.Module] = {}
        self._sampled: dict[tuple, Dataset] = {}
        # On one thread, CPU time is the time on a core of one's own, whatever else the machine does
        self.clock = time.process_time if args.device == "cpu" else time.perf_counter

    def load(self, role: str) -> torch.nn.Module:
        return load_model(str(self.pair / role), dtype=torch.float32).to(self.device).eval()

    def amateur(self, name: str = "own") -> torch.nn.Module:
        if name not in self._amateurs:
            self._amateurs[name] = AMATEURS[name](self)
        return self._amateurs[name]

    def encode(self, problems: list[dict]) -> list[list[int]]:
        rows = [{"prompt": as_prompt(problem)} for problem in problems]
        return encode_rows(rows, self.tokenizer, set(self.eos_ids))["prompt_ids"]

    def every_step(self, amateur: str = "own", alpha: float = ALPHA) -> Dataset:
        """The Dataset of beta = 0, from which `raise_beta` makes those of higher thresholds."""
        if (amateur, alpha) not in self._sampled:
            folder = Path(self.folder.name) / f"{len(self._sampled)}"
            sampler = ContrastiveStepSampler(
                self.expert,
                self.amateur(amateur),
                ContrastiveSamplingConfig(
                    str(folder), alpha=alpha, beta=0.0, max_new_tokens=MAX_NEW_TOKENS, include_first_step=True
                ),
                processing_class=self.tokenizer,
                amateur_processing_class=self.tokenizer,
            )
            prompts = Dataset.from_list([{"prompt": as_prompt(problem)} for problem in self.unlabelled])
            self._sampled[amateur, alpha] = sampler.sample(prompts)
        return self._sampled[amateur, alpha]

    def steps(self, amateur: str = "own", alpha: float = ALPHA, beta: float = BETA) -> Dataset:
        return raise_beta(self.every_step(amateur, alpha), beta)

    def train(
        self,
        make_dataset: Callable[[], Dataset],
        learning_rate: float = LEARNING_RATE,
        updates: int = UPDATES,
        one_step_per_row: bool = True,
        labels: int = 0,
    ) -> Outcome:
        """Train an adapter with updates of 16 rows, and grade it."""
        start = self.clock()
        dataset = make_dataset()
        if not count_steps(dataset):  # nothing to learn from: the expert stays as it is
            return self.grade(self.expert)
        trainer = LightReasonerTrainer(
            self.load("expert"),
            LightReasonerConfig(
                str(Path(self.folder.name) / "run"),
                max_steps=updates,
                learning_rate=learning_rate,
                beta=0,  # the dataset's own
                per_device_train_batch_size=ROWS,
                gradient_accumulation_steps=1,
                one_step_per_row=one_step_per_row,
                logging_steps=updates,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=self.seed,
                use_cpu=self.device == "cpu",
                bf16=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=dataset,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = self.clock() - start
        outcome = self.grade(trainer.model.eval())
        outcome.steps, outcome.labels, outcome.seconds = count_steps(dataset), labels, seconds
        outcome.tuned_tokens = int(next(log for log in trainer.state.log_history if "loss" in log)["num_kept_steps"])
        return outcome

    def train_by_default(self) -> Outcome:
        """Train an adapter as `lightreasoner train` does with nothing but names, and grade it."""
        start = self.clock()
        args = LightReasonerConfig(
            str(Path(self.folder.name) / "run"),
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
            use_cpu=self.device == "cpu",
        )
        # Without the first step
        steps = replace_steps(self.steps(), lambda row, _: [step for step in steps_of(row) if step[0] > 0])
        layers = choose_target_modules(steps, self.expert.config.model_type)
        lora = get_peft_config(LightReasonerModelConfig(lora_task_type="CAUSAL_LM", lora_target_modules=layers))
        trainer = LightReasonerTrainer(
            self.load("expert"), args, train_dataset=steps, processing_class=self.tokenizer, peft_config=lora
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = self.clock() - start
        outcome = self.grade(trainer.model.eval())
        outcome.steps, outcome.seconds = count_steps(trainer.train_dataset), seconds
        outcome.tuned_tokens = int([log for log in trainer.state.log_history if "loss" in log][-1]["num_kept_steps"])
        return outcome

    def grade(self, model: torch.nn.Module) -> Outcome:
        vocabulary = model_vocabulary(self.tokenizer, self.expert.config.vocab_size)
        return self.grade_ids(generate_greedy(model, self.encode(self.test), vocabulary, self.eos_ids, MAX_NEW_TOKENS))

    def grade_ids(self, completion_ids: list[list[int]]) -> Outcome:
        answers = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return Outcome(
            right=[extract_answer(a) == p["answer"] for a, p in zip(answers, self.test, strict=True)],
            careful=[a.count("=") >= p["num_steps"] for a, p in zip(answers, self.test, strict=True)],
        )

    def decode_contrastively(self, beta: float = 0.0) -> Outcome:
        models = [self.expert, self.amateur()]
        choose = functools.partial(contrastive_choice, beta=beta)
        return self.grade_ids(decode(models, self.encode(self.test), choose, self.tokenizer.eos_token_id))

    def describe(self, amateur: str) -> dict[str, float | None]:
        """What a look at the sampled steps says of an amateur before anything is trained."""
        outcome, every_step, steps = self.grade(self.amateur(amateur)), self.every_step(amateur), self.steps(amateur)
        low, median, high = kl_quantiles(every_step, [0.1, 0.5, 0.9])
        others = [label[0] != row["completion_ids"][t] for row in steps for t, label, _ in steps_of(row)]
        return {
            "accuracy": statistics.mean(outcome.right),
            "careful": statistics.mean(outcome.careful),
            "kl_10": low,
            "kl_50": median,
            "kl_90": high,
            "kept": count_steps(steps) / count_steps(every_step),
            "prefers_another_token": statistics.mean(others) if others else None,
        }

    def right_answers(self, samples: int) -> Dataset:
        """Rejection sampling: the expert's own right answers, greedy (0 samples) or some a problem at T = 1."""
        dataset = self.every_step()
        if samples:
            choose = functools.partial(random_choice, generator=torch.Generator().manual_seed(self.seed))
            prompt_ids = [ids for ids in dataset["prompt_ids"] for _ in range(samples)]
            completions = decode([self.expert], prompt_ids, choose, self.tokenizer.eos_token_id)
            rows = [row for row in dataset for _ in range(samples)]
            rows = [row | {"completion_ids": ids} for row, ids in zip(rows, completions, strict=True)]
            dataset = Dataset.from_list(rows, features=dataset.features)
        answers = self.tokenizer.batch_decode(list(dataset["completion_ids"]), skip_special_tokens=True)
        golds = [problem["answer"] for problem in self.unlabelled for _ in range(samples or 1)]
        right = [i for i, (a, gold) in enumerate(zip(answers, golds, strict=True)) if extract_answer(a) == gold]
        return whole_answers(dataset.select(right))

    def tune_on_right_answers(self, samples: int, updates: int) -> Outcome:
        return self.train(
            lambda: self.right_answers(samples),
            updates=updates,
            one_step_per_row=False,
            labels=len(self.unlabelled),
        )


# Amateurs that the method should not be used with


def retrained(lab: Lab, solve: Callable[[dict, random.Random], str], model: torch.nn.Module | None = None):
    """The amateur (or `model`) trained further on other solutions, as long as the study can afford."""
    updates, batch_size = 300, 32
    model = lab.load("amateur") if model is None else model
    problems = make_problems(updates * batch_size, lab.seed, split="pretrain", kind_shares=lab.kind_shares)
    documents = make_demo_pair.tokenize(problems, solve, lab.tokenizer, lab.seed)
    make_demo_pair.train(model, documents, updates, batch_size, lab.seed, lab.device)
    return model.eval()


def careful(problem: dict, rng: random.Random) -> str:
    return careful_solution(problem)


def untrained(lab: Lab) -> torch.nn.Module:
    torch.manual_seed(lab.seed)
    return AutoModelForCausalLM.from_config(lab.load("amateur").config).float().to(lab.device).eval()


def noisy_expert(lab: Lab, share: float = 0.05) -> torch.nn.Module:
    """The expert with noise on its weights: as good as it, and hardly different."""
    generator, model = torch.Generator().manual_seed(lab.seed), lab.load("expert")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(lab.device)
            parameter += share * parameter.std() * noise
    return model


def shuffled(lab: Lab) -> torch.nn.Module:
    """The amateur with its vocabulary in another order: sure of itself, and incoherent."""
    generator, model = torch.Generator().manual_seed(lab.seed), lab.load("amateur")
    weight = model.get_output_embeddings().weight  # tied, so that it also reads the wrong tokens
    with torch.no_grad():
        weight.copy_(weight[torch.randperm(len(weight), generator=generator).to(lab.device)])
    return model


AMATEURS: dict[str, Callable[[Lab], torch.nn.Module]] = {
    "own": lambda lab: lab.load("amateur"),
    "skill gap": lambda lab: retrained(lab, expert_solution, untrained(lab)),
    "as careful": lambda lab: retrained(lab, expert_solution),
    "more careful": lambda lab: retrained(lab, careful),
    "too close": noisy_expert,
    "random weights": untrained,
    "shuffled": shuffled,
}


def as_many_steps(lab: Lab, amateur: str) -> Dataset:
    """With beta such that as many steps are kept as with the pair's own amateur."""
    every_step = lab.every_step(amateur)
    share = count_steps(lab.steps()) / count_steps(lab.every_step())
    return raise_beta(every_step, kl_quantiles(every_step, [1 - share])[0])


# What is tried


@dataclass(frozen=True)
class Condition:
    """A row of the tables. `quick`: whether the quick form has it. `paper`: what the paper says of it, if anything."""

    group: str
    name: str
    run: Callable[[Lab], Outcome]
    quick: bool = True
    paper: str = ""


METHOD, BASE = "LightReasoner", "base"


def with_amateur(lab: Lab, outcome: Outcome, amateur: str) -> Outcome:
    return dataclasses.replace(outcome, amateur=lab.describe(amateur))


def ablations() -> list[Condition]:
    def add(name: str, run: Callable[[Lab], Outcome], paper: str = "", quick: bool = True) -> Condition:
        return Condition("Method, ablations, rivals", name, run, quick, paper)

    return [
        add(BASE, lambda lab: lab.grade(lab.expert), "42.4 (average of 7 benchmarks, Qwen2.5-Math-1.5B)"),
        add(METHOD, lambda lab: with_amateur(lab, lab.train(lab.steps), "own"), "54.2"),
        add("the defaults of `lightreasoner train`", lambda lab: lab.train_by_default()),
        add("same, rows are whole trajectories", lambda lab: lab.train(lab.steps, one_step_per_row=False)),
        add(
            "no contrast (fit pi_E itself)",
            lambda lab: lab.train(lambda: no_contrast(lab.steps(), lab.expert)),
            "worse than the method",
        ),
        add("one-hot expert token", lambda lab: lab.train(lambda: one_hot(lab.steps()))),
        add("all steps, contrast kept", lambda lab: lab.train(lab.every_step), "worse than the method"),
        add(
            "random steps, contrast kept",
            lambda lab: lab.train(lambda: random_steps(lab.every_step(), lab.steps(), lab.seed)),
        ),
        add("contrastive decoding at every step, no training", lambda lab: lab.decode_contrastively()),
        add(
            f"contrastive decoding where KL >= {BETA}, no training",
            lambda lab: lab.decode_contrastively(BETA),
        ),
        *(
            add(
                f"rejection-sampled SFT, {'T = 1, 4 samples' if samples else 'greedy'}, {updates} updates",
                lambda lab, samples=samples, updates=updates: lab.tune_on_right_answers(samples, updates),
                "50.1 (SFT)" if samples else "",
                quick=updates == SFT_UPDATES or samples > 0,
            )
            for samples in (0, SAMPLES)
            for updates in (UPDATES, SFT_UPDATES)
        ),
    ]


def sweeps() -> list[Condition]:
    def add(setting: str, value: float, run: Callable[[Lab], Outcome], quick: tuple, paper: float) -> Condition:
        note = "the paper's value" if value == paper else ""
        return Condition(f"Sweep of {setting}", f"{setting} = {value:g}", run, value in quick, note)

    return [
        *(
            add("alpha", a, lambda lab, a=a: lab.train(lambda: lab.steps(alpha=a)), (0.05, 0.5), ALPHA)
            for a in (0.02, 0.05, 0.1, 0.3, 0.5, 0.8)
        ),
        *(
            add("beta", b, lambda lab, b=b: lab.train(lambda: lab.steps(beta=b)), (0.1, 0.8, 1.6), BETA)
            for b in (0.05, 0.1, 0.2, 0.8, 1.6)
        ),
        *(
            add(
                "learning rate",
                r,
                lambda lab, r=r: lab.train(lab.steps, learning_rate=r),
                (5e-5, 2e-4, 1e-3, 2e-3),
                5e-5,
            )
            for r in (5e-5, 1e-4, 2e-4, 1e-3, 2e-3, 5e-3)
        ),
        *(
            add("updates", u, lambda lab, u=u: lab.train(lab.steps, updates=u), (25, 100, 200), 1000)
            for u in (12, 25, 75, 100, 200, 400)
        ),
    ]


def failures() -> list[Condition]:
    def add(name: str, amateur: str, paper: str = "", equal_steps: bool = False, quick: bool = True) -> Condition:
        def run(lab: Lab) -> Outcome:
            if equal_steps:
                return lab.train(lambda: as_many_steps(lab, amateur))
            return with_amateur(lab, lab.train(lambda: lab.steps(amateur)), amateur)

        return Condition("Other amateurs", name, run, quick, paper)

    return [
        add("pure skill gap: the expert's corpus, small, hardly trained", "skill gap", "not told apart from others"),
        add("as careful as the expert: trained on the expert's corpus", "as careful"),
        add("more careful: trained on careful solutions alone", "more careful"),
        add("too close: the expert with 5 % noise on its weights", "too close", "worse than the method"),
        add("too close, beta lowered to keep as many steps", "too close", "worse than the method", equal_steps=True),
        add("incoherent: random weights", "random weights", "the amateur must be coherent"),
        add("incoherent: random weights, beta raised to keep as many steps", "random weights", equal_steps=True),
        add("incoherent: vocabulary shuffled", "shuffled", "the amateur must be coherent"),
    ]


CONDITIONS = {condition.name: condition for condition in [*ablations(), *sweeps(), *failures()]}


@dataclass(frozen=True)
class Claim:
    """That one condition is better than another."""

    text: str
    better: str
    worse: str


def claims() -> list[Claim]:
    too_close = [name for name in CONDITIONS if name.startswith("too close")]
    incoherent = [name for name in CONDITIONS if name.startswith("incoherent")]
    sft = [name for name in CONDITIONS if "SFT, T = 1" in name]
    skill_gap = next(name for name in CONDITIONS if name.startswith("pure skill gap"))
    return [
        Claim("The method improves the expert", METHOD, BASE),
        Claim("Dropping the contrast hurts", METHOD, "no contrast (fit pi_E itself)"),
        Claim("Dropping the selection of steps hurts", METHOD, "all steps, contrast kept"),
        *(Claim("The method beats SFT on right answers", METHOD, name) for name in sft),
        *(Claim("An amateur too close to the expert hurts", METHOD, name) for name in too_close),
        *(Claim("The amateur must be coherent", METHOD, name) for name in incoherent),
        # The paper asks for these two and names no third condition, but does not say that they suffice
        Claim("Coherent and clearly weaker is enough for an amateur (a reading of the paper)", skill_gap, BASE),
    ]


# Intervals, 95 %

# Student's t for 2, 3, ... values
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def binomial_interval(num_right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share, which holds near 0 and 1 too."""
    z, share = 1.96, num_right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Student's interval of the mean of a few pairs' values."""
    t = T_QUANTILES[len(values) - 2] if len(values) - 2 < len(T_QUANTILES) else 2.1
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def difference_interval(better: list[list[bool]], worse: list[list[bool]]) -> tuple[float, float, float]:
    """
    Mean difference in accuracy over pairs, and its interval: over pairs if there are three or more. One or two say
    nothing of others; the interval is then over test problems, which both conditions answered.
    """
    paired = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(better, worse, strict=True)]
    means = [statistics.mean(row) for row in paired]
    if len(means) >= 3:
        return statistics.mean(means), *mean_interval(means)
    variance = sum(statistics.pvariance(row) / len(row) for row in paired) / len(paired) ** 2
    half = 1.96 * math.sqrt(variance)
    return statistics.mean(means), statistics.mean(means) - half, statistics.mean(means) + half


# Tables


def percent(low: float, high: float | None = None) -> str:
    return f"{100 * low:.1f}" if high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def table_of(group: str, results: dict[str, list[Outcome]], pairs: list[str]) -> list[str]:
    several = len(pairs) > 2  # two say next to nothing of others
    header = ["condition", *pairs, *(["mean (95 % over pairs)"] if several else [])]
    header += ["careful", "steps", "tuned tokens", "labels", "s", "the paper"]
    lines = [f"### {group}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    names = [name for name in results if CONDITIONS[name].group == group]
    if group.startswith("Sweep"):  # the method's own value stands among the others
        setting = group.removeprefix("Sweep of ")
        own = {"alpha": ALPHA, "beta": BETA, "learning rate": LEARNING_RATE, "updates": UPDATES}[setting]
        values = {name: float(name.rpartition("= ")[2]) for name in names} | {METHOD: own}
        names = sorted(values, key=values.get)
    for name in names:
        outcomes, condition = results[name], CONDITIONS[name]
        cells = [f"{setting} = {own:g} (the method)" if group.startswith("Sweep") and name == METHOD else name]
        accuracies = [statistics.mean(outcome.right) for outcome in outcomes]
        for accuracy, outcome in zip(accuracies, outcomes, strict=True):
            cells.append(
                f"{percent(accuracy)} ({percent(*binomial_interval(sum(outcome.right), len(outcome.right)))})"
            )
        if several:
            low, high = mean_interval(accuracies)
            cells.append(f"{percent(statistics.mean(accuracies))} ({percent(max(low, 0), min(high, 1))})")
        cells.append(percent(statistics.mean(statistics.mean(outcome.careful) for outcome in outcomes)))
        for attribute in ("steps", "tuned_tokens", "labels"):
            cells.append(f"{statistics.mean(getattr(outcome, attribute) for outcome in outcomes):,.0f}")
        cells.append(f"{statistics.mean(outcome.seconds for outcome in outcomes):.0f}")
        cells.append("" if group.startswith("Sweep") and name == METHOD else condition.paper)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def table_of_amateurs(results: dict[str, list[Outcome]]) -> list[str]:
    """What could have been seen before training, beside what came of it; means over pairs."""
    header = ["amateur", "its accuracy", "careful", "KL 10 %", "KL 50 %", "KL 90 %", "kept at beta"]
    header += ["v_C prefers another token than the expert", "gain in points"]
    lines = ["### Amateurs, before training", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    base = statistics.mean(statistics.mean(outcome.right) for outcome in results[BASE])
    for name, outcomes in results.items():
        seen = [outcome.amateur for outcome in outcomes if outcome.amateur is not None]
        if not seen:
            continue
        values = {key: [amateur[key] for amateur in seen if amateur[key] is not None] for key in seen[0]}
        mean = {key: statistics.mean(known) if known else None for key, known in values.items()}
        cells = ["the pair's own" if name == METHOD else name, percent(mean["accuracy"]), percent(mean["careful"])]
        cells += [f"{mean[key]:.3f}" for key in ("kl_10", "kl_50", "kl_90")] + [percent(mean["kept"])]
        preference = mean["prefers_another_token"]
        cells.append("no step kept" if preference is None else percent(preference))
        gain = statistics.mean(statistics.mean(outcome.right) for outcome in outcomes) - base
        lines.append(f"| {' | '.join([*cells, f'{100 * gain:+.1f}'])} |")
    return [*lines, ""]


def judge(results: dict[str, list[Outcome]]) -> list[dict]:
    judged = []
    for claim in claims():
        if claim.better not in results or claim.worse not in results:
            continue
        rights = [[outcome.right for outcome in results[name]] for name in (claim.better, claim.worse)]
        difference, low, high = difference_interval(*rights)
        verdict = "agrees" if low > 0 else "does not agree" if high < 0 else "not settled"
        judged.append(vars(claim) | {"difference": difference, "low": low, "high": high, "verdict": verdict})
    return judged


def table_of_claims(judged: list[dict]) -> list[str]:
    lines = ["### The paper's claims", "", "| claim | difference of | points (95 %) | here |", "|---|---|---|---|"]
    for row in judged:
        points = f"{100 * row['difference']:+.1f} ({percent(row['low'], row['high'])})"
        lines.append(f"| {row['text']} | {row['better']} - {row['worse']} | {points} | {row['verdict']} |")
    return [*lines, ""]


def draw(results: dict[str, list[Outcome]], path: Path) -> None:
    """A bar for each condition and a line for each sweep; bars of error are binomial, over all pairs' problems."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No figures: matplotlib is not installed (`pip install trl-lightreasoner[report]`).")
        return

    def point(name: str) -> tuple[float, float, float]:
        right = [is_right for outcome in results[name] for is_right in outcome.right]
        low, high = binomial_interval(sum(right), len(right))
        return statistics.mean(right), statistics.mean(right) - low, high - statistics.mean(right)

    own = {"alpha": ALPHA, "beta": BETA, "learning rate": LEARNING_RATE, "updates": UPDATES}
    figure = Figure(figsize=(14, 9), layout="constrained")
    bars, lines = figure.subfigures(1, 2)
    names = [name for name in results if not CONDITIONS[name].group.startswith("Sweep")][::-1]
    means, lows, highs = zip(*map(point, names), strict=True)
    axes = bars.subplots()
    axes.barh(names, means, xerr=[lows, highs], color=["tab:orange" if n == METHOD else "tab:blue" for n in names])
    axes.set(xlabel="accuracy", xlim=(0, 1))
    for axes, (setting, value) in zip(lines.subplots(2, 2, sharey=True).flat, own.items(), strict=True):
        swept = {float(name.rpartition("= ")[2]): name for name in results if name.startswith(f"{setting} = ")}
        swept = dict(sorted((swept | {value: METHOD}).items()))
        means, lows, highs = zip(*map(point, swept.values()), strict=True)
        axes.errorbar(list(swept), means, yerr=[lows, highs], marker="o", capsize=2)
        axes.set(xlabel=setting, xscale="log", ylim=(0, 1))
        axes.set_xticks(list(swept), [f"{each:g}" for each in swept])
        axes.minorticks_off()
    figure.savefig(path, dpi=120)


# Everything


@functools.lru_cache(maxsize=1)
def _lab(pair: str, settings: str) -> Lab:
    return Lab(pair, argparse.Namespace(**json.loads(settings)))


def run(name: str, pair: str, settings: str) -> tuple[Outcome, float]:
    """What came of a condition, and the CPU time that it took."""
    start = time.process_time()
    outcome = CONDITIONS[name].run(_lab(pair, settings))
    return outcome, time.process_time() - start


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for study.json, .md and .png.")
    parser.add_argument("--pairs", nargs="+", default=[str(PAIR)], help="Folders that hold `expert` and `amateur`.")
    parser.add_argument("--quick", action="store_true", help="Fewer settings and 300 test problems: ten minutes.")
    parser.add_argument("--only", nargs="+", choices=list(CONDITIONS), metavar="CONDITION", help="These conditions.")
    parser.add_argument("--num_test", type=int, help="Test problems; 1,000, or 300 with --quick.")
    parser.add_argument("--num_unlabelled", type=int, default=200, help="Problems to learn from.")
    parser.add_argument(
        "--kinds", nargs="+", default=list(KIND_SHARES), help="Kinds of problems: chain, shop, comparison."
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes, which share the conditions.")
    parser.add_argument("--device", default="cpu", help="Where the models are, for instance `cuda`.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the problems and of the training.")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = make_parser().parse_args(argv)
    args.num_test = args.num_test or (300 if args.quick else 1000)
    names = args.only or [name for name, condition in CONDITIONS.items() if condition.quick or not args.quick]
    if METHOD not in names or BASE not in names:
        names = list(dict.fromkeys([BASE, METHOD, *names]))
    start, cpu_seconds = time.perf_counter(), 0.0
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings = json.dumps({n: getattr(args, n) for n in ("num_test", "num_unlabelled", "kinds", "device", "seed")})
    results: dict[str, list[Outcome]] = {name: [None] * len(args.pairs) for name in names}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        # The longest first, so that no worker is alone in the end
        jobs = {
            pool.submit(run, name, pair, settings): (name, index)
            for index, pair in enumerate(args.pairs)
            for name in sorted(names, key=lambda name: CONDITIONS[name].group != "Other amateurs")
        }
        for done in as_completed(jobs):
            name, index = jobs[done]
            results[name][index], spent = done.result()
            cpu_seconds += spent
            accuracy = statistics.mean(results[name][index].right)
            print(
                f"{time.perf_counter() - start:6.0f} s  {Path(args.pairs[index]).name}: {name}: {accuracy:.1%}",
                flush=True,
            )

    seconds = time.perf_counter() - start
    judged = judge(results)
    pairs = [Path(pair).name for pair in args.pairs]
    lines = [
        f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} ({', '.join(pairs)}), {args.num_unlabelled} "
        f"unlabelled and {args.num_test:,} test problems ({', '.join(args.kinds)}), seed {args.seed}; accuracy in % "
        f"(95 % interval over test problems); {seconds:.0f} s in all, {cpu_seconds:.0f} s of CPU time, {args.workers} "
        f"processes, {args.device}; s in the tables is {'CPU' if args.device == 'cpu' else 'wall'} time.",
        "",
    ]
    for group in dict.fromkeys(CONDITIONS[name].group for name in names):
        lines += table_of(group, results, pairs)
    lines += table_of_amateurs(results) + table_of_claims(judged)
    print("\n" + "\n".join(lines))
    (args.output_dir / "study.md").write_text("\n".join(lines))
    report = {
        "command": f"python benchmarks/study.py {' '.join(sys.argv[1:] if argv is None else argv)}",
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "pairs": args.pairs,
        **json.loads(settings),
        "results": [
            {
                "condition": name,
                "group": CONDITIONS[name].group,
                "pair": pair,
                **{key: value for key, value in vars(outcome).items() if key not in ("right", "careful")},
                "accuracy": statistics.mean(outcome.right),
                "interval": binomial_interval(sum(outcome.right), len(outcome.right)),
                "careful": statistics.mean(outcome.careful),
                "paper": CONDITIONS[name].paper,
            }
            for name, outcomes in results.items()
            for pair, outcome in zip(args.pairs, outcomes, strict=True)
        ],
        "claims": judged,
    }
    (args.output_dir / "study.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(results, args.output_dir / "study.png")
    return report


if __name__ == "__main__":
    main()
