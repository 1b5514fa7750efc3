"""Tiny models, made on the spot: everything here runs offline on a CPU in seconds."""

# ruff: noqa: E402

import gc
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from datetime import datetime


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Imported below, it says that a kernel from the Hub is missing; that would come last, behind the summary of the tests
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers import logging as transformers_logging
from transformers.utils import chat_template_utils

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler


# Two processes of pytest-xdist share two cores
torch.set_num_threads(1)
disable_progress_bars()
gc.freeze()  # what is imported stays, and every collection would look through it

QUESTIONS = [
    "Ann has 3 apples and buys 4 more. How many has she?",
    "What is 2+2?",
    "Ben had 17 coins, lost 5, and found 9. How many coins has Ben now?",
    "A train runs 60 miles an hour for 3 hours. How far is that?",
    "Name a prime.",
    "If $x^{2} = 49$ and x > 0, what is \\frac{x}{7}?",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def die_at_call(name: str, number: int) -> None:
    """Let this process kill itself at the `number`-th call of a function of `os`."""
    calls, original = 0, getattr(os, name)

    def counted(*args):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, counted)


def join_group(rank: int, world_size: int, port: int) -> None:
    """Let this process be one of a group, as a launcher would."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(QUESTIONS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, hidden_size: int = 32, padding: int = 12, **kwargs
) -> Qwen2ForCausalLM:
    """A random Qwen2 whose logits have `padding` columns that no token owns."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + padding,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # sharp enough that two random models disagree
        **kwargs,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def _pair_folders(tmp_path_factory, tokenizer) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    for name, seed, hidden_size, padding in (("expert", 0, 32, 12), ("amateur", 1, 16, 4)):
        make_model(tokenizer, seed, hidden_size, padding).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "expert"), str(folder / "amateur")


@pytest.fixture(scope="session")
def expert_path(_pair_folders) -> str:
    return _pair_folders[0]


@pytest.fixture(scope="session")
def amateur_path(_pair_folders) -> str:
    return _pair_folders[1]


@pytest.fixture
def expert(expert_path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(expert_path)


@pytest.fixture
def amateur(amateur_path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(amateur_path)


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": QUESTIONS, "id": list(range(len(QUESTIONS)))})


@pytest.fixture(scope="session")
def steps(tmp_path_factory, expert_path, amateur_path, prompts) -> Dataset:
    """A Dataset of kept steps of the tiny pair, with rows of unequal lengths and numbers of kept steps."""
    args = ContrastiveSamplingConfig(str(tmp_path_factory.mktemp("steps")), max_new_tokens=12, beta=1.95)
    return ContrastiveStepSampler(expert_path, amateur_path, args).sample(prompts)


@pytest.fixture(scope="session")
def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes from a server that has imported everything and done nothing: only their work takes time."""
    context = multiprocessing.get_context("forkserver")
    wings = ("sampling.contrastive_step_sampler", "training.lightreasoner_trainer", "evaluation.evaluation")
    context.set_forkserver_preload(["peft", "math_verify", *(f"trl_lightreasoner.{wing}" for wing in wings)])
    return context


@pytest.fixture(scope="session")
def in_group(forkserver) -> Callable[..., None]:
    """Calls a function of a module in each of some processes of a group, the rank first, and waits for them."""

    def start(world_size: int, work: Callable, *args) -> None:
        port = find_port()
        processes = [
            forkserver.Process(target=_work_in_group, args=(rank, world_size, port, work, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world_size

    return start


def _work_in_group(rank: int, world_size: int, port: int, work: Callable, args: tuple) -> None:
    join_group(rank, world_size, port)
    work(rank, *args)


@pytest.fixture
def today(monkeypatch) -> Callable[[int], None]:
    """Lets it be a day of November 2026."""

    def set_day(day: int) -> None:
        class Today(datetime):
            @classmethod
            def now(cls):
                return datetime(2026, 11, day)

        for module in ("steps.run_file", "steps.messages"):
            monkeypatch.setattr(f"trl_lightreasoner.{module}.datetime", Today, raising=False)
        monkeypatch.setattr(chat_template_utils, "datetime", Today)

    return set_day


@pytest.fixture
def propagated_logs():
    """What transformers' loggers say reaches `caplog`."""
    transformers_logging.enable_propagation()
    yield
    transformers_logging.disable_propagation()
