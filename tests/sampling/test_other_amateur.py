import gc
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, sampling_metadata, write_report
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR, as_prompt
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.hub.cards import dataset_card
from trl_lightreasoner.sampling import cross_scoring, other_amateur
from trl_lightreasoner.sampling.covered_step import FINE, USUAL, CoveredStep
from trl_lightreasoner.sampling.other_amateur import PLAIN_TEMPLATE

from ..conftest import QUESTIONS, make_model
from .other_tokens import byte_level_tokenizer, make_texts


PROMPTS = Dataset.from_dict(
    {"prompt": [as_prompt(each) for each in make_problems(5, seed=9, split="train", kind_shares=KIND_SHARES)]}
)


def args(folder, **kwargs):
    return ContrastiveSamplingConfig(str(folder), **{"max_new_tokens": 40, "include_first_step": True, **kwargs})


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory):
    """The bundled amateur with the ids of all its ordinary tokens changed, so that its distributions are known."""
    folder = tmp_path_factory.mktemp("renumbered")
    shutil.copytree(PAIR / "amateur", folder, dirs_exist_ok=True)
    state = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in state["added_tokens"]}
    ordinary = sorted(set(state["model"]["vocab"].values()) - special)
    moved = dict(zip(ordinary, reversed(ordinary), strict=True))
    state["model"]["vocab"] = {token: moved.get(i, i) for token, i in state["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    model = AutoModelForCausalLM.from_pretrained(PAIR / "amateur", dtype=torch.float32)
    places = torch.arange(model.config.vocab_size)
    places[list(moved.values())] = torch.tensor(list(moved))
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight.copy_(layer.weight[places].clone())
            if model.config.tie_word_embeddings:
                break
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, renumbered):
    """What the plain way and the covering say of one pair, at one beta."""
    made = []
    for amateur in (str(PAIR / "amateur"), renumbered):
        folder = tmp_path_factory.mktemp("steps")
        made.append(
            ContrastiveStepSampler(str(PAIR / "expert"), amateur, args(folder, dtype="float32")).sample(PROMPTS)
        )
    return made


def labels_of(rows):
    return {
        (i, t): dict(zip(ids, probs, strict=True))
        for i, row in enumerate(rows)
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
    }


def assert_same_labels(plain, covered):
    for step, label in covered.items():
        assert label == pytest.approx(plain[step], abs=1e-3)


def test_the_same_tokens_under_other_ids_give_the_same_labels(sampled):
    assert sampled[0]["completion_ids"] == sampled[1]["completion_ids"]
    plain, covered = map(labels_of, sampled)
    assert_same_labels(plain, covered)
    assert len(plain) > 10
    assert len(covered) >= 0.9 * len(plain)


def test_a_step_that_would_be_kept_but_is_too_uncertain_is_read_again(tmp_path, sampled, renumbered, monkeypatch):
    few = USUAL._replace(most_contexts=0)  # only the amateur's own tokens before the step
    made = Counter()
    make = CoveredStep.__init__

    def count(self, covering, start, needed, asked, pruning):
        made[pruning] += 1
        make(self, covering, start, needed, asked, pruning)

    monkeypatch.setattr(CoveredStep, "__init__", count)
    monkeypatch.setattr(cross_scoring, "USUAL", few)
    kept, dropped = [], []
    for fine in (few._replace(rest=0.0), FINE):
        monkeypatch.setattr(cross_scoring, "FINE", fine)
        sampler = ContrastiveStepSampler(
            str(PAIR / "expert"), renumbered, args(tmp_path / str(len(kept)), dtype="float32")
        )
        kept.append(labels_of(sampler.sample(PROMPTS)))
        dropped.append(sampler.amateur_side._scoring.dropped["not exact enough"])
    assert kept[0].keys() < kept[1].keys()
    assert made[FINE] == dropped[0] > dropped[1]  # no other step was read again
    assert_same_labels(labels_of(sampled[0]), kept[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"contrast_strength": 0.5, "expert_anchor": 1.0},
        {
            "amateur_skipped_layers": [0],
            "amateur_system_prompt": "Be quick.",
            "amateur_prompt_template": "{question}!",
        },
    ],
)
def test_settings_of_the_label_and_of_the_amateur_count_alike(settings, tmp_path, sampled, renumbered):
    settings = {"dtype": "float32", "max_new_tokens": 12, **settings}
    prompts = PROMPTS.select(range(1))
    plain, covered = (
        ContrastiveStepSampler(str(PAIR / "expert"), amateur, args(tmp_path / name, **settings)).sample(prompts)
        for name, amateur in (("plain", str(PAIR / "amateur")), ("covered", renumbered))
    )
    assert covered["label_probs"][0] != sampled[1]["label_probs"][0][: len(covered["label_probs"][0])]
    assert_same_labels(labels_of(plain), labels_of(covered))


def test_the_divergence_is_a_lower_bound(sampled):
    gaps = [
        np.array(plain["kl_divergence"]) - np.array(covered["kl_divergence"], dtype=float)
        for plain, covered in zip(*sampled, strict=True)
    ]
    assert np.concatenate(gaps).min() > -1e-3
    assert np.median(np.concatenate(gaps)) < 1e-3


def test_the_metadata_and_only_it_say_how_the_amateur_was_read(sampled):
    plain, covered = (sampling_metadata(each) for each in sampled)
    assert "amateur_reading" not in plain
    said = covered["amateur_reading"]["description"]
    assert said.startswith("The amateur has a different tokenizer") and "lower bound" in said
    assert sampled[0].features == sampled[1].features


def test_a_report_says_why_it_shows_the_label_alone(tmp_path, sampled, renumbered):
    write_report({"steps": sampled[1]}, str(tmp_path), expert=str(PAIR / "expert"), amateur=renumbered)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Only the label is shown, without the probabilities of expert and amateur: the amateur" in page


def test_a_card_says_how_the_amateur_was_read(sampled):
    card = dataset_card({"train": sampled[1]}, "own/steps")
    assert "| how the amateur was read | The amateur has a different tokenizer" in str(card)


def test_completions_that_are_given_are_read_alike(tmp_path, sampled, renumbered):
    """Also when the run is broken off, and goes on with other batches."""
    prompts = PROMPTS.add_column(
        "completion", [[{"role": "assistant", "content": c}] for c in sampled[1]["completion"]]
    )
    settings = {"dtype": "float32", "per_device_batch_size": 2}
    sampler = ContrastiveStepSampler(str(PAIR / "expert"), renumbered, args(tmp_path, **settings))
    score, calls = ContrastiveStepSampler._run, []

    def stop(self, *arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(0)
        return score(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ContrastiveStepSampler, "_run", stop)
        sampler.sample(prompts)
    given = ContrastiveStepSampler(str(PAIR / "expert"), renumbered, args(tmp_path, **settings)).sample(prompts)
    for one, other in zip(sampled[1], given, strict=True):
        length = min(len(one["completion_ids"]), len(other["completion_ids"]))
        assert one["completion_ids"][:length] == other["completion_ids"][:length]
        assert one["kl_divergence"][:length] == pytest.approx(other["kl_divergence"][:length], abs=1e-4)


def test_rows_of_a_reading_that_tells_other_tokens_apart_are_not_mixed_in(tmp_path, renumbered, monkeypatch):
    def sample(number):
        monkeypatch.setattr(other_amateur, "TOP_TOKENS", number)
        settings = {"dtype": "float32", "max_new_tokens": 2}
        return ContrastiveStepSampler(str(PAIR / "expert"), renumbered, args(tmp_path, **settings)).sample(PROMPTS)

    assert len(sample(20)) == len(sample(20)) == len(PROMPTS)
    with pytest.raises(ValueError, match="was started with amateur reading = .* the expert's 20 most probable"):
        sample(40)


def other_pair(tokenizer, chat_template=None):
    other = byte_level_tokenizer(make_texts(200), 3, 300)
    other.chat_template = chat_template
    models = {"expert": make_model(tokenizer), "amateur": make_model(other, 1, 16)}
    return {**models, "processing_class": tokenizer, "amateur_processing_class": other}


def test_an_amateur_without_a_chat_template_is_refused_with_advice(tmp_path, tokenizer):
    sampler = ContrastiveStepSampler(**other_pair(tokenizer), args=args(tmp_path))
    with pytest.raises(
        ValueError, match=r"the amateur's tokenizer has no chat template\. Set `amateur_chat_template`"
    ):
        sampler.sample(PROMPTS)


@pytest.mark.parametrize("template", ["plain", PLAIN_TEMPLATE, "file"])
def test_a_chat_template_can_be_given_to_the_amateur(template, tmp_path, tokenizer):
    if template == "file":
        template = str(tmp_path / "template.jinja")
        (tmp_path / "template.jinja").write_text(PLAIN_TEMPLATE)
    sampler = ContrastiveStepSampler(
        **other_pair(tokenizer), args=args(tmp_path / "steps", amateur_chat_template=template)
    )
    ids = sampler._amateur_prompts().encode([PROMPTS[0]])[0]
    assert sampler.amateur_side.tokenizer.decode(ids) == PROMPTS[0]["prompt"][0]["content"] + "\n\n"


def test_a_chat_template_that_is_none_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`amateur_chat_template` must be 'plain', a Jinja template, or a file"):
        ContrastiveStepSampler(**other_pair(tokenizer), args=args(tmp_path, amateur_chat_template="nothing"))


def test_an_amateur_that_says_nan_is_refused_by_name(tmp_path, tokenizer):
    pair = other_pair(tokenizer)
    with torch.no_grad():
        pair["amateur"].get_output_embeddings().weight[7] = torch.nan
    sampler = ContrastiveStepSampler(**pair, args=args(tmp_path))
    with pytest.raises(ValueError, match=r"The amateur's logits at token 0 of row 0 are not finite"):
        sampler.sample(Dataset.from_dict({"prompt": QUESTIONS[:1], "completion": ["24+"]}))


def test_steps_that_cannot_be_read_are_counted(tmp_path, tokenizer, caplog):
    """Behind a token that stands for no text, and there; the other steps a random amateur leaves uncertain."""
    sampler = ContrastiveStepSampler(**other_pair(tokenizer), args=args(tmp_path, beta=0.1))
    (row,) = sampler.sample(Dataset.from_dict({"prompt": QUESTIONS[:1], "completion": ["2<|im_start|>4+"]}))
    assert [value is None for value in row["kl_divergence"]] == [False, True, True, True]
    assert row["step_positions"] == []
    said = "Of 4 steps, 3 could not be read by the amateur and 1 would be kept but are uncertain by more than 0.1 nats"
    assert said in caplog.text


def wordpiece_tokenizer():
    """As BERT's: words, and the rest of words after "##"."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")


def test_tokens_of_wordpiece_do_not_tell_whitespace():
    texts = ["ab c", "ab\nc", "ab \n  c"]
    assert wordpiece_tokenizer()(texts).input_ids == [[1, 2, 3]] * 3


def test_wordpiece_is_refused_before_weights_are_loaded(tmp_path, tokenizer, expert_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError) as refused:
        ContrastiveStepSampler(
            expert_path,
            make_model(tokenizer),
            args(tmp_path),
            amateur_processing_class=wordpiece_tokenizer(),
        )
    assert str(refused.value) == (
        "The bytes of the amateur's tokens cannot be determined, so it cannot be paired with a model that has "
        "different tokens. Choose two models of one family, or two with byte-level BPE or SentencePiece, whose tokens "
        "reproduce a text."
    )


def test_the_check_asks_an_amateur_in_its_own_tokens(tmp_path, renumbered):
    sampler = ContrastiveStepSampler(str(PAIR / "expert"), renumbered, args(tmp_path, dtype="float32"))
    plain = ContrastiveStepSampler(str(PAIR / "expert"), str(PAIR / "amateur"), args(tmp_path, dtype="float32"))
    checks = [each.check(PROMPTS, 2) for each in (sampler, plain)]
    assert checks[0].amateur_answers == checks[1].amateur_answers
    assert checks[0].num_steps == checks[1].num_steps


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_searched_for_after_a_round_as_before_it(was_enabled):
    try:
        if not was_enabled:
            gc.disable()
        with pytest.raises(KeyError), cross_scoring._uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
