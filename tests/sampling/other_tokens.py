"""Tokenizers that differ, and an amateur that is a table: what the tests of other amateurs need."""

import json
import random
from collections import Counter, defaultdict

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_lightreasoner.demo.task import amateur_solution, make_problems
from trl_lightreasoner.models.token_bytes import TokenBytes

from ..conftest import TEMPLATE


END = "<|end|>"
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_texts(count=2000, seed=0):
    draw = random.Random(seed)
    return [amateur_solution(each, draw) for each in make_problems(count, seed=5, split="pretrain")]


def byte_level_tokenizer(texts, digits, vocab_size):
    """Byte-level BPE with numbers of at most `digits` digits in a token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES.replace("DIGITS", str(digits))), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    made.chat_template = TEMPLATE.replace("<|im_end|>", END)
    return made


def sentencepiece_tokenizer(texts, vocab_size, begins_with_blank=True, max_token_length=6):
    """BPE over whole texts with byte fallback, as of Llama 2, or, without a blank before the text, of Gemma."""
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, max_token_length=max_token_length, show_progress=False, initial_alphabet=["\u2581"]
    )
    blanks = normalizers.Replace(" ", "\u2581")
    trained.normalizer = blanks
    trained.train_from_iterator(texts, trainer)
    state = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(state["vocab"], key=state["vocab"].get)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    before = [normalizers.Prepend("\u2581")] if begins_with_blank else []
    tokenizer.normalizer = normalizers.Sequence([*before, blanks])
    strip = [decoders.Strip(" ", 1, 0)] if begins_with_blank else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>")


class TableModel:
    """Next tokens by how often they followed the last three in some texts; anything else is unlikely, not excluded."""

    def __init__(self, tokenizer, texts, doubt=0.02):
        self.width, self.end_id, self._doubt = len(tokenizer), tokenizer.eos_token_id, doubt
        tokens = TokenBytes(tokenizer, self.width)
        self._next = [defaultdict(Counter) for _ in range(4)]
        self._made = {}
        for text in texts:
            ids = [-1, -1, -1, *tokens.encode(text.encode()), self.end_id]
            for place in range(3, len(ids)):
                for order in range(4):
                    self._next[order][tuple(ids[place - order : place])][ids[place]] += 1

    def __call__(self, context):
        context = (-1, -1, -1, *context)[-3:]
        if context not in self._made:
            probs = torch.full((self.width,), 1 / self.width, dtype=torch.float64)
            for order in range(4):
                if counts := self._next[order].get(context[3 - order :]):
                    seen = torch.zeros(self.width, dtype=torch.float64)
                    seen[list(counts)] = torch.tensor(list(counts.values()), dtype=torch.float64)
                    probs = (1 - self._doubt) * seen / seen.sum() + self._doubt * probs
            self._made[context] = probs
        return self._made[context]
