"""
Time of greedy decoding on a CUDA GPU: attention under a mask or by each row's length, in pieces or in slots that the
next prompts fill. Weights are random, in the shape of Qwen2.5-1.5B, and prompts and lengths are drawn from a seed. No
EOS is expected, so each row ends when it has its number of tokens, in a piece as by an EOS. With `--lengths` a
Markdown table of the tokens a second of batches whose answers all have one length, beside `generate`.

```bash
python benchmarks/decoding.py
python benchmarks/decoding.py --lengths 512 1024 4096 --batch_sizes 64 256 1024
python benchmarks/decoding.py --small  # two layers and few prompts, also on a CPU, to try this script
```
"""

import argparse
import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.cache_utils import Cache

from trl_lightreasoner.evaluation.answering import TOKENS_A_PIECE
from trl_lightreasoner.generation import cuda_graphs
from trl_lightreasoner.generation.batches import find_batch_size
from trl_lightreasoner.generation.cuda_graphs import complete_in_slots, why_by_mask
from trl_lightreasoner.generation.row_attention import row_bounds, why_no_row_attention
from trl_lightreasoner.generation.row_cache import MAX_ROWS, RowLayer, rows_that_fit
from trl_lightreasoner.models.forward import attention_backends
from trl_lightreasoner.vocabulary import Vocabulary


MEAN_TOKENS, MOST_TOKENS = 320, 1024
# Standard deviation of the logarithm of the number of tokens
SPREAD = 0.6
# No part begins after this number of seconds
MOST_SECONDS = 130
# As Qwen2.5's tokenizer has them
NUM_TOKENS = 151_665


def make_model(is_small: bool) -> PreTrainedModel:
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    if is_small:
        shape = {"hidden_size": 768, "intermediate_size": 512, "num_hidden_layers": 2}
    config = Qwen2Config(
        vocab_size=1024 if is_small else 151_936,
        num_attention_heads=12 if not is_small else 6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **shape,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def draw(count: int, num_tokens: int, shrink: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 60 to 250 tokens, and numbers of new tokens."""
    rng = random.Random(0)
    prompts = [rng.choices(range(num_tokens), k=rng.randint(60, 250) // shrink) for _ in range(count)]
    mu = torch.tensor(MEAN_TOKENS).log().item() - SPREAD**2 / 2
    rooms = [max(2, min(MOST_TOKENS, round(rng.lognormvariate(mu, SPREAD))) // shrink) for _ in range(count)]
    return prompts, rooms


@contextmanager
def attention_under_a_mask():
    before = cuda_graphs.why_no_row_attention
    cuda_graphs.why_no_row_attention = lambda keys, values: "not asked for"
    try:
        yield
    finally:
        cuda_graphs.why_no_row_attention = before


class Bench:
    def __init__(self, is_small: bool, num_prompts: int):
        self.model = make_model(is_small)
        self.is_cuda = self.model.device.type == "cuda"
        num_tokens = min(NUM_TOKENS, self.model.config.vocab_size)
        self.vocabulary = Vocabulary(list(range(num_tokens)))
        self.prompts, self.rooms = draw(num_prompts, num_tokens, shrink=16 if is_small else 1)
        self.made: dict[str, list[list[int]]] = {}

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def clear(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def complete(self, prompts: list[list[int]], rooms: list[int], num_slots: int) -> list[list[int]]:
        completions: list[list[int]] = [[] for _ in prompts]
        complete_in_slots(self.model, prompts, rooms, self.vocabulary, [], num_slots, completions)
        return completions

    def in_slots(self) -> list[list[int]]:
        longest = max(len(ids) + room for ids, room in zip(self.prompts, self.rooms, strict=True))
        num_slots = find_batch_size(self.model, longest, len(self.prompts), 1)
        print(f"  {num_slots} slots")
        return self.complete(self.prompts, self.rooms, num_slots)

    def in_pieces(self) -> list[list[int]]:
        completions: list[list[int]] = [[] for _ in self.prompts]
        rows = list(range(len(self.prompts)))
        while rows := [i for i in rows if len(completions[i]) < self.rooms[i]]:
            contexts = {i: self.prompts[i] + completions[i] for i in rows}
            going = sorted(rows, key=lambda i: -len(contexts[i]))
            while going:
                longest = len(contexts[going[0]]) + TOKENS_A_PIECE
                batch = going[: find_batch_size(self.model, longest, len(going), 1)]
                going = going[len(batch) :]
                rooms = [min(TOKENS_A_PIECE, self.rooms[i] - len(completions[i])) for i in batch]
                made = self.complete([contexts[i] for i in batch], rooms, len(batch))
                for i, ids in zip(batch, made, strict=True):
                    completions[i] += ids
        return completions

    def measure(self, name: str, run: Callable[[], list[list[int]]]) -> None:
        self.clear()
        completions: list[list[int]] = []
        seconds = self.time(lambda: completions.extend(run()))
        count = sum(map(len, completions))
        assert [len(ids) for ids in completions] == self.rooms
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.is_cuda else 0
        print(f"{name}: {seconds:.2f} s, {count / seconds:,.0f} tokens/s, peak {peak:.1f} GiB", flush=True)
        self.made[name] = completions

    def floor(self) -> None:
        """Least time by the memory's bandwidth and by the products of matrices, both as measured here."""
        num_slots = min(MAX_ROWS, len(self.prompts))
        moving, multiplying, read, moved = self.least_seconds(self.prompts, self.rooms, num_slots)
        prompt_tokens = sum(map(len, self.prompts))
        print(
            f"floor: {moving:.2f} s to move {moved / 1e12:.2f} TB at {self.bandwidth / 1e12:.2f} TB/s (keys and "
            f"values {read / 1e12:.2f} TB), {multiplying:.2f} s for products at {self.rate / 1e12:.0f} "
            f"TFLOP/s; {len(self.prompts):,} prompts of {prompt_tokens:,} tokens, {sum(self.rooms):,} new tokens"
        )

    def least_seconds(
        self, prompts: list[list[int]], rooms: list[int], num_slots: int
    ) -> tuple[float, float, float, float]:
        """Seconds to move weights, keys and values, and for the products; bytes of keys and values, and of all."""
        config = self.model.config
        head_dim = config.hidden_size // config.num_attention_heads
        size = self.model.dtype.itemsize
        of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        tokens_read = sum((len(ids) + (room + 1) / 2) * room for ids, room in zip(prompts, rooms, strict=True))
        read = tokens_read * of_token
        moved = read + num_parameters * size * sum(rooms) / num_slots
        products = 2 * num_parameters * (sum(rooms) + sum(map(len, prompts)))
        return moved / self.bandwidth, products / self.rate, read, moved

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second, of a copy."""
        source = torch.empty(2**28 if self.is_cuda else 2**22, device=self.model.device)
        target = torch.empty_like(source)
        return 2 * source.numel() * 4 / self.seconds_of(lambda: target.copy_(source))

    @cached_property
    def rate(self) -> float:
        """Operations a second, of a product of matrices."""
        width = 8192 if self.is_cuda else 512
        matrix = torch.randn(width, width, device=self.model.device, dtype=self.model.dtype)
        return 2 * width**3 / self.seconds_of(lambda: matrix @ matrix)

    @torch.no_grad()
    def rates(self, lengths: list[int], batch_sizes: list[int], most_generated: int) -> None:
        """Tokens a second of batches that decode as many tokens a row, `generate` up to `most_generated` tokens."""
        print("| rows | new tokens | tokens a second | `generate` | by bandwidth and products | peak GiB |")
        print("|---" * 6 + "|")
        for length in lengths:
            for num_rows in batch_sizes:
                self.clear()
                prompts = (self.prompts * (num_rows // len(self.prompts) + 1))[:num_rows]
                prompts = sorted(prompts, key=len, reverse=True)
                if self.is_cuda and rows_that_fit(self.model, len(prompts[0]) + length) < num_rows:
                    print(f"| {num_rows:,} | {length:,} | does not fit | | | |", flush=True)
                    continue
                count, rooms = num_rows * length, [length] * num_rows
                self.complete(prompts, [2] * num_rows, num_rows)
                seconds = self.time(partial(self.complete, prompts, rooms, num_rows))
                peak = torch.cuda.max_memory_allocated() / 2**30 if self.is_cuda else 0
                least = max(self.least_seconds(prompts, rooms, num_rows)[:2])
                generated = ""
                if length <= most_generated:
                    self.clear()
                    generated = f"{count / self.time(partial(self.generate, prompts, length)):,.0f}"
                rates = f"{count / seconds:,.0f} | {generated} | {count / least:,.0f}"
                print(f"| {num_rows:,} | {length:,} | {rates} | {peak:.1f} |", flush=True)

    def generate(self, prompts: list[list[int]], length: int) -> None:
        """Left-padded rows by transformers."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=self.model.device)
        is_token = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        made = self.model.generate(
            ids,
            attention_mask=is_token.to(self.model.device),
            do_sample=False,
            max_new_tokens=length,
            min_new_tokens=length,
            pad_token_id=0,
        )
        assert made.shape[1] == longest + length

    def time(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def seconds_of(self, run: Callable[[], object], count: int = 10) -> float:
        for _ in range(3):
            run()
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        self.wait()
        return (time.perf_counter() - start) / count

    def decoder(self, num_rows: int, num_columns: int) -> cuda_graphs._Decoder:
        """A decoder that has read the beginnings of prompts."""
        prompts = sorted((ids[: 4 + i % 60] for i, ids in enumerate(self.prompts[:num_rows])), key=len, reverse=True)
        room = num_columns - len(prompts[0])
        arguments = (self.model, prompts, [room] * len(prompts), self.vocabulary, [], len(prompts))
        decoder = cuda_graphs._Decoder(*arguments)
        decoder.fill(list(range(len(prompts))), list(range(len(prompts))))
        return decoder

    @torch.no_grad()
    def steps(self) -> None:
        """Time of a step by rows and by their length, in buffers of 1,408 columns."""
        for num_rows in (64, 256, 1024):
            times = []
            for masked in (True, False):
                self.clear()
                with attention_backends(self.model.device):
                    decoder = self.decoder(num_rows, 1408)
                    for length in (128, 512, 1300):
                        decoder.positions.fill_(length)
                        if masked:
                            with attention_under_a_mask():
                                step = decoder._capture()
                        else:
                            step = decoder._capture()
                        times.append(1000 * self.seconds_of(step))
                        del step
                del decoder
            under, by = (", ".join(f"{each:.1f}" for each in times[i : i + 3]) for i in (0, 3))
            print(f"a step of {num_rows} rows of 128, 512, 1,300 tokens: {under} ms by mask; {by} ms by length")

    @torch.no_grad()
    def difference(self) -> None:
        """Logits of one step, by length and under a mask, on the same state."""
        self.clear()
        with attention_backends(self.model.device):
            decoder = self.decoder(256, 256)
            layers = [RowLayer(*buffers, decoder.positions) for buffers in decoder.buffers]
            decoder.cache = Cache(layers=layers)
            decoder.bounds = row_bounds(len(decoder.rows), decoder.num_columns, decoder.device)
            expected = decoder._logits().float()
            again = decoder._logits().float()
            decoder.by_length = True
            logits = decoder._logits().float()
        for name, each in (("by length", logits), ("under a mask again", again)):
            error = (each - expected).abs()
            print(
                f"logits of a step {name}: largest difference {error.max():.4f}, root mean square "
                f"{error.square().mean().sqrt():.5f} of a standard deviation of {expected.std():.3f}; "
                f"{(each.argmax(-1) == expected.argmax(-1)).float().mean():.1%} of the choices equal"
            )

    def compare(self) -> None:
        """Where completions begin to differ. With random weights near ties are frequent, so see the last line."""
        names = list(self.made)
        for name in names[1:]:
            self.print_agreement(f"{name} and {names[0]}", self.made[name], self.made[names[0]])
        few = slice(0, len(self.prompts) // 8)
        with attention_under_a_mask():
            made = self.complete(self.prompts[few], self.rooms[few], len(self.prompts) // 16)
        self.print_agreement("under a mask with other rows beside", made, self.made[names[0]][few])

    def print_agreement(self, name: str, made: list[list[int]], others: list[list[int]]) -> None:
        pairs = list(zip(made, others, strict=True))
        firsts = [
            next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
            for one, other in pairs
        ]
        equal = sum(one == other for one, other in pairs) / len(pairs)
        kept = sum(firsts) / sum(map(len, made))
        print(
            f"agreement, {name}: {equal:.1%} of the rows equal, {kept:.1%} of the tokens before a first difference "
            f"(median at {statistics.median(firsts):.0f})"
        )

    def attends(self) -> None:
        reason = why_by_mask(self.model)
        keys = torch.empty(1, 16, 2, 128, dtype=self.model.dtype, device=self.model.device)
        print(f"attends by length: {[reason is None, reason and (why_no_row_attention(keys, keys) or reason)]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two layers, and few and short prompts")
    parser.add_argument("--num_prompts", type=int, default=None, help="2,400 by default, or 40")
    parser.add_argument("--lengths", type=int, nargs="+", help="new tokens of each row; prints a table of rates")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 256, 1024], help="rows of that table")
    parser.add_argument("--most_generated", type=int, default=512, help="longest length at which `generate` is timed")
    args = parser.parse_args()
    PartialState()
    began = time.perf_counter()
    bench = Bench(args.small, args.num_prompts or (40 if args.small else 2400))
    print(f"model in {time.perf_counter() - began:.1f} s", flush=True)
    if args.lengths:
        bench.rates(args.lengths, args.batch_sizes, args.most_generated)
        return

    def by_mask_in_pieces() -> list[list[int]]:
        with attention_under_a_mask():
            return bench.in_pieces()

    def by_mask_in_slots() -> list[list[int]]:
        with attention_under_a_mask():
            return bench.in_slots()

    parts: list[tuple[str, Callable[[], object]]] = [
        ("warm-up", lambda: bench.complete(bench.prompts[:64], [8] * len(bench.prompts[:64]), 32)),
        ("attends", bench.attends),
        ("floor", bench.floor),
        *([("difference", bench.difference)] if bench.is_cuda else []),
        ("by length in slots", lambda: bench.measure("by length in slots", bench.in_slots)),
        ("by length in pieces", lambda: bench.measure("by length in pieces", bench.in_pieces)),
        ("by mask in pieces", lambda: bench.measure("by mask in pieces", by_mask_in_pieces)),
        ("by mask in slots", lambda: bench.measure("by mask in slots", by_mask_in_slots)),
        ("steps", bench.steps),
        ("compare", bench.compare),
    ]
    for name, run in parts:
        if time.perf_counter() - began > MOST_SECONDS:
            print(f"  {name}: left out")
            continue
        try:
            run()
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}")
        print(f"  {name}: {time.perf_counter() - began:.0f} s since the start", flush=True)


if __name__ == "__main__":
    main()
