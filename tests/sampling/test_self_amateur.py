"""Amateurs made of the expert: each kind against two models, or a loop, that are it by construction."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2ForCausalLM,
)

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, RunConfig, sampling_metadata
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.generation import completions
from trl_lightreasoner.hub.cards import dataset_card
from trl_lightreasoner.models.guises import skip_layers
from trl_lightreasoner.pipeline.folder import RunFolder
from trl_lightreasoner.pipeline.stages import open_pair
from trl_lightreasoner.report.model_reading import add_probabilities
from trl_lightreasoner.report.shown_steps import load_trajectories
from trl_lightreasoner.report.statistics import made_with
from trl_lightreasoner.sampling import model_pair
from trl_lightreasoner.sampling.scoring import Trajectory, score_trajectories
from trl_lightreasoner.steps.prompt_format import PromptFormat

from ..conftest import QUESTIONS, make_model


MESSAGES = Dataset.from_dict(
    {
        "prompt": [
            [{"role": "system", "content": "Think."}, {"role": "user", "content": text}] for text in QUESTIONS[:2]
        ]
    }
)


@pytest.fixture
def make_sampler(tmp_path):
    number = iter(range(100))

    def make(expert, amateur=None, tokenizers=(), folder=None, quantization=None, **settings):
        settings = {"max_new_tokens": 6, "beta": 0.0, "include_first_step": True, "dtype": "float32", **settings}
        args = ContrastiveSamplingConfig(str(tmp_path / (folder or f"steps{next(number)}")), **settings)
        return ContrastiveStepSampler(expert, amateur, args, *tokenizers, quantization_config=quantization)

    return make


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory, expert_path):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    model = get_peft_model(
        Qwen2ForCausalLM.from_pretrained(expert_path),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return str(folder)


def assert_same_rows(one, other):
    assert len(one) == len(other) > 0
    for row, expected in zip(one, other, strict=True):
        for name in ("prompt_ids", "completion_ids", "step_positions"):
            assert row[name] == expected[name]
        assert row["kl_divergence"] == pytest.approx(expected["kl_divergence"], rel=1e-4, abs=1e-6)
        for *labels, ids, probs in zip(
            *(each[name] for each in (row, expected) for name in ("label_ids", "label_probs")), strict=True
        ):
            assert dict(zip(*labels, strict=True)) == pytest.approx(dict(zip(ids, probs, strict=True)), rel=1e-4)
    assert max(value for row in one for value in row["kl_divergence"]) > 0.01


# Layers


def without_layers(model, layers):
    """A copy in which the layers are not there."""
    copied = copy.deepcopy(model)
    stack = copied.get_decoder()
    name = "h" if hasattr(stack, "h") else "layers"
    kept = [i for i in range(len(getattr(stack, name))) if i not in layers]
    setattr(stack, name, torch.nn.ModuleList(getattr(stack, name)[i] for i in kept))
    copied.config.num_hidden_layers = len(kept)
    if getattr(copied.config, "layer_types", None):
        copied.config.layer_types = [copied.config.layer_types[i] for i in kept]
    return copied


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "layer_types": [FULL, SLIDING, FULL, SLIDING]}


@pytest.mark.parametrize("layers", [[1], [0, 2]])
@pytest.mark.parametrize("kwargs", [{}, WINDOWS], ids=["full attention", "windows in between"])
def test_the_expert_without_layers_is_a_copy_without_them(layers, kwargs, make_sampler, tokenizer, prompts):
    torch.manual_seed(0)
    expert = make_model(tokenizer)
    config = copy.deepcopy(expert.config)
    config.update({"num_hidden_layers": 4, "layer_types": [FULL] * 4, **kwargs})
    expert = Qwen2ForCausalLM(config).eval()
    tokenizers = (tokenizer, tokenizer)
    made = make_sampler(expert, None, (tokenizer,), amateur_skipped_layers=layers).sample(prompts)
    assert_same_rows(made, make_sampler(expert, without_layers(expert, layers), tokenizers).sample(prompts))


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, initializer_range=0.3)),
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=3, ffn_dim=32, num_attention_heads=2, init_std=0.3
            )
        ),
    ],
    ids=["GPT-2", "OPT"],
)
@torch.no_grad()
def test_layers_of_other_architectures_are_left_out(model):
    torch.manual_seed(0)
    model = model().eval()
    ids = torch.randint(50, (2, 7))
    before = model(ids, use_cache=False).logits
    with skip_layers(model, [0, 2]):
        skipped = model(ids, use_cache=False).logits
    torch.testing.assert_close(skipped, without_layers(model, [0, 2])(ids, use_cache=False).logits)
    assert not torch.allclose(skipped, before)
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_layer_that_returns_more_than_its_states_keeps_the_rest():
    class Layer(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1, "weights"

    model = make_model_of(torch.nn.ModuleList([Layer(), Layer()]))
    with skip_layers(model, [1]):
        states, rest = model.layers[1](hidden_states=torch.zeros(1))
    assert states.item() == 0 and rest == "weights"


def make_model_of(layers):
    class Model(torch.nn.Module):
        def get_decoder(self):
            return self

    model = Model()
    model.layers = layers
    model.config = GPT2Config(n_layer=len(layers))
    return model


def test_a_model_whose_layers_cannot_be_told_is_refused():
    model = make_model_of(torch.nn.ModuleList([torch.nn.Identity()]))
    model.others = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(ValueError, match="The layers of `Model` cannot be identified among its modules"):
        with skip_layers(model, [0]):
            pass


def test_a_second_model_can_lack_layers_too(make_sampler, expert, amateur, tokenizer, prompts):
    tokenizers = (tokenizer, tokenizer)
    made = make_sampler(expert, amateur, tokenizers, amateur_skipped_layers=[0]).sample(prompts)
    assert_same_rows(made, make_sampler(expert, without_layers(amateur, [0]), tokenizers).sample(prompts))


def test_an_expert_in_4_bits_lacks_layers_too(make_sampler, expert_path, prompts):
    pytest.importorskip("bitsandbytes")
    bits = BitsAndBytesConfig(load_in_4bit=True)
    sampler = make_sampler(expert_path, None, amateur_skipped_layers=[1], quantization=bits)
    made = sampler.sample(prompts)
    assert sampler.amateur is sampler.expert and sampler.expert.is_loaded_in_4bit
    tokenizers = (sampler.processing_class,) * 2
    expected = make_sampler(sampler.expert, without_layers(sampler.expert, [1]), tokenizers)
    assert_same_rows(made, expected.sample(prompts))


# An adapter off or on


@pytest.mark.parametrize("which", ["expert", "amateur"])
def test_a_base_model_and_its_adapter_are_one_model(
    which, make_sampler, expert_path, adapter_path, prompts, monkeypatch
):
    names = {"expert": adapter_path, "amateur": expert_path}
    if which == "amateur":
        names = {"expert": expert_path, "amateur": adapter_path}
    apart = [model_pair.load_model(name, dtype="float32").eval() for name in names.values()]
    tokenizer = AutoTokenizer.from_pretrained(expert_path)
    expected = make_sampler(*apart, (tokenizer, tokenizer)).sample(prompts)
    loaded = []
    load = model_pair.load_model
    monkeypatch.setattr(
        model_pair, "load_model", lambda model, **kwargs: (loaded.append(model), load(model, **kwargs))[1]
    )
    sampler = make_sampler(**names)
    made = sampler.sample(prompts)
    assert loaded == [names["expert"]]
    assert_same_rows(made, expected)
    metadata = sampling_metadata(made)
    assert metadata[which]["adapter"] == adapter_path
    assert metadata["amateur" if which == "expert" else "expert"]["adapter"] is None
    # Behind it the expert is the expert again, whoever uses it
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(sampler.expert(ids).logits, apart[0](ids).logits)
    assert sampler.amateur == names["amateur"]
    if which == "amateur":
        assert not [name for name, _ in sampler.expert.named_modules() if "lora" in name]
        assert all(parameter.requires_grad for parameter in sampler.expert.parameters())
    assert sampler.check(prompts, 2).is_of_expert


def test_a_base_with_an_adapter_on_its_layers_is_neither_expert_nor_amateur(
    make_sampler, expert, expert_path, amateur_path, tokenizer
):
    adapted = get_peft_model(expert, LoraConfig(target_modules=["q_proj"]))
    tokenizers = (tokenizer, tokenizer)
    roles = (("expert", (expert, amateur_path)), ("expert", (expert, None)), ("amateur", (expert_path, expert)))
    for role, pair in roles:
        with pytest.raises(ValueError, match=f"^The {role} has an adapter on its layers, .* Pass the `PeftModel`"):
            make_sampler(*pair, tokenizers[: 1 if pair[1] is None else 2])
    adapted.unload()
    make_sampler(expert, amateur_path, tokenizers)


@pytest.mark.parametrize(
    "changes", [{"modules_to_save": ["mlp"]}, {"layer_replication": [(0, 1), (0, 1)]}, {"bias": "all"}], ids=str
)
def test_an_amateur_that_would_stay_in_the_expert_is_another_model(
    changes, make_sampler, expert, expert_path, prompts, tmp_path
):
    before = {name: weight.clone() for name, weight in expert.state_dict().items()}
    changed = get_peft_model(expert, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **changes))
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    changed.save_pretrained(tmp_path / "adapter")
    sampler = make_sampler(expert_path, str(tmp_path / "adapter"))
    sampler.check(prompts, 2)
    after = sampler.expert.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_is_switched_off_on_a_model_that_is_given(make_sampler, adapter_path, expert, tokenizer, prompts):
    adapted = model_pair.load_model(adapter_path, dtype="float32", is_trainable=True)
    flags = [parameter.requires_grad for parameter in adapted.parameters()]
    assert any(flags) and not all(flags)
    tokenizers = (tokenizer, tokenizer)
    made = make_sampler(adapted, adapted.get_base_model(), tokenizers).sample(prompts)
    assert [parameter.requires_grad for parameter in adapted.parameters()] == flags
    assert_same_rows(made, make_sampler(adapted, expert, tokenizers).sample(prompts))
    turned = make_sampler(adapted.get_base_model(), adapted, tokenizers).sample(prompts)
    assert_same_rows(turned, make_sampler(expert, adapted, tokenizers).sample(prompts))
    assert adapted.get_model_status().enabled is True


@pytest.mark.parametrize(
    "settings",
    [{"amateur_model_init_kwargs": {"dtype": "bfloat16"}}, {"amateur_model_init_kwargs": {"revision": "x"}}],
)
def test_models_that_are_loaded_otherwise_are_two(settings, make_sampler, expert_path, adapter_path):
    assert make_sampler(adapter_path, expert_path)._pair._adapter == "expert"
    assert make_sampler(adapter_path, expert_path, **settings)._pair._adapter is None


# Another prompt


@torch.no_grad()
def naive_divergences(expert, amateur, row, amateur_prompt_ids):
    divergences = []
    for t in range(len(row["completion_ids"])):
        logps = [
            model(torch.tensor([prompt_ids + row["completion_ids"][:t]])).logits[0, -1, :300].double().log_softmax(-1)
            for model, prompt_ids in ((expert, row["prompt_ids"]), (amateur, amateur_prompt_ids))
        ]
        divergences.append((logps[0].exp() * (logps[0] - logps[1])).sum().item())
    return divergences


def in_template(tokenizer, *messages):
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]


@pytest.mark.parametrize("of_expert", [True, False], ids=["the expert", "a second model"])
@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"amateur_system_prompt": "Just guess."}, [("system", "Just guess."), ("user", "{question}")]),
        ({"amateur_system_prompt": ""}, [("user", "{question}")]),
        ({"amateur_prompt_template": "{question} Guess!"}, [("system", "Think."), ("user", "{question} Guess!")]),
    ],
)
def test_another_prompt_is_read_before_the_same_completion(
    settings, messages, of_expert, make_sampler, expert, amateur, tokenizer
):
    second, tokenizers = (None, (tokenizer,)) if of_expert else (amateur, (tokenizer, tokenizer))
    made = make_sampler(expert, second, tokenizers, **settings).sample(MESSAGES)
    for row, question in zip(made, QUESTIONS, strict=False):
        prompt_ids = in_template(tokenizer, *((role, text.replace("{question}", question)) for role, text in messages))
        assert prompt_ids != row["prompt_ids"]
        expected = naive_divergences(expert, second or expert, row, prompt_ids)
        assert row["kl_divergence"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert row["step_positions"] == list(range(len(row["completion_ids"])))


def test_given_completions_are_read_behind_it_too(make_sampler, expert, tokenizer):
    given = MESSAGES.add_column("completion", [[{"role": "assistant", "content": "7 apples"}]] * 2)
    made = make_sampler(expert, None, (tokenizer,), amateur_system_prompt="").sample(given)
    for row, question in zip(made, QUESTIONS, strict=False):
        expected = naive_divergences(expert, expert, row, in_template(tokenizer, ("user", question)))
        assert row["kl_divergence"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_question_is_found_in_a_raw_prompt(make_sampler, expert, tokenizer):
    prompt_format = PromptFormat("raw")
    texts = Dataset.from_dict({"prompt": [prompt_format.make_prompt(text) for text in QUESTIONS[:2]]})
    sampler = make_sampler(expert, None, (tokenizer,), amateur_prompt_template="Quick: {question} =")
    for row, question in zip(sampler.sample(texts, prompt_format), QUESTIONS, strict=False):
        prompt_ids = tokenizer(f"Quick: {question} =")["input_ids"]
        assert row["kl_divergence"] == pytest.approx(
            naive_divergences(expert, expert, row, prompt_ids), rel=1e-3, abs=1e-5
        )
    with pytest.raises(ValueError, match="Row 0: The question cannot be found in"):
        make_sampler(expert, None, (tokenizer,), amateur_prompt_template="Quick: {question} =").sample(
            Dataset.from_dict({"prompt": ["2+2="]}), prompt_format
        )


def test_rows_do_not_depend_on_the_batch(make_sampler, expert, tokenizer):
    settings = {"amateur_system_prompt": "Be quick. " * 9, "amateur_skipped_layers": [1]}
    one, other = (
        make_sampler(expert, None, (tokenizer,), **settings, per_device_batch_size=size).sample(MESSAGES)
        for size in (1, 2)
    )
    assert_same_rows(one, other)


def test_a_completion_ends_where_the_amateur_has_no_room(make_sampler, expert, tokenizer, caplog):
    question = tokenizer.decode([5] * 10)
    length = len(in_template(tokenizer, ("user", question)))
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": question}]]})
    fill = "$" * (256 - length - len(in_template(tokenizer, ("system", ""))) - 2)
    sampler = make_sampler(expert, None, (tokenizer,), amateur_system_prompt=fill, max_new_tokens=20)
    (row,) = sampler.sample(prompts)
    own = in_template(tokenizer, ("system", fill), ("user", question))
    assert 0 < len(row["completion_ids"]) <= 256 - len(own) < 20


# Settings, metadata, check


def test_what_the_amateur_is_goes_with_the_run(make_sampler, expert_path):
    made = make_sampler(expert_path, folder="one", amateur_system_prompt="").sample(MESSAGES)
    settings = sampling_metadata(made)["settings"]
    assert settings["amateur_system_prompt"] == "" and settings["amateur_skipped_layers"] is None
    with pytest.raises(ValueError, match="was started with amateur_skipped_layers = None, but it is now "):
        make_sampler(expert_path, folder="one", amateur_system_prompt="", amateur_skipped_layers=[1]).sample(MESSAGES)
    made = make_sampler(expert_path, amateur_skipped_layers=[1]).sample(MESSAGES)
    assert "| amateur_skipped_layers | [1] |" in str(dataset_card({"train": made}, "own/steps"))


@pytest.mark.parametrize("settings", [{"amateur_system_prompt": ""}, {"amateur_skipped_layers": [1]}])
def test_a_report_does_not_show_the_expert_for_such_an_amateur(settings, make_sampler, expert_path):
    sampler = make_sampler(expert_path, **settings)
    steps = sampler.sample(MESSAGES)
    reason = add_probabilities(load_trajectories(steps, [0]), made_with(steps), sampler.expert, sampler.amateur)
    assert reason == "the amateur was read with skipped layers, or with a different prompt"


def test_the_check_asks_the_amateur_as_it_reads(make_sampler, expert, tokenizer):
    sampler = make_sampler(expert, None, (tokenizer,), amateur_system_prompt="Be quick.", amateur_skipped_layers=[0])
    check = sampler.check(MESSAGES)
    assert check.is_of_expert and check.verdict != "promising"
    ids = torch.tensor([in_template(tokenizer, ("system", "Be quick."), ("user", QUESTIONS[0]))])
    copied, answer = without_layers(expert, [0]), torch.zeros(1, 0, dtype=torch.long)
    while answer.shape[1] < 6 and tokenizer.eos_token_id not in answer:
        with torch.no_grad():
            logits = copied(torch.cat([ids, answer], 1), use_cache=False).logits
        answer = torch.cat([answer, logits[:, -1:, :300].argmax(-1)], 1)
    assert check.amateur_answers[0] == tokenizer.decode(answer[0], skip_special_tokens=True)


def test_the_check_asks_the_amateur_what_the_expert_was_asked(make_sampler, expert, tokenizer):
    too_long = Dataset.from_dict({"prompt": ["What is 2+2? " * 60, *QUESTIONS[:4]]})
    sampler = make_sampler(expert, None, (tokenizer,), amateur_prompt_template="{question} =")
    asked = Dataset.from_dict({"prompt": QUESTIONS[:4]})
    checks = [sampler.check(prompts, prompt_format=PromptFormat("raw", "{question}")) for prompts in (too_long, asked)]
    for name in ("expert_answers", "amateur_answers"):
        assert getattr(checks[0], name) == getattr(checks[1], name)


def test_an_expert_that_is_its_own_amateur_without_a_difference_is_refused(make_sampler, expert_path):
    with pytest.raises(ValueError, match="so they never diverge. Choose a weaker model as `amateur`"):
        make_sampler(expert_path, amateur_system_prompt="Think.").sample(MESSAGES)  # which is the expert's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amateur_skipped_layers": [2]}, "must be indices .*, from 0 to 1, got 2"),
        ({"amateur_skipped_layers": [0, 1]}, "names all of the amateur's 2 layers"),
        ({"amateur_skipped_layers": []}, r"must be a list of numbers of layers, from 0, such as \[8, 9\], got \[\]"),
        ({"amateur_skipped_layers": [-1]}, "must be a list of numbers of layers"),
        ({"amateur_skipped_layers": 3}, "must be a list of numbers of layers"),
        ({"amateur_system_prompt": 3}, "`amateur_system_prompt` must be text, got 3"),
        ({"amateur_prompt_template": "no"}, r"`amateur_prompt_template` must be text with \{question\} in it"),
        ({"amateur_system_prompt": "", "amateur_model_init_kwargs": {}}, "which is loaded once, as the expert"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, make_sampler, expert_path):
    with pytest.raises(ValueError, match=message):
        make_sampler(expert_path, **settings)


def test_a_plain_prompt_has_no_system_message(make_sampler, expert_path, prompts):
    with pytest.raises(ValueError, match="Row 0: A plain prompt has no system message: put the text"):
        make_sampler(expert_path, amateur_system_prompt="Be quick.").sample(prompts)


# Commands


def test_the_commands_take_the_expert_alone(expert_path, prompts, tmp_path, capsys):
    prompts.to_json(tmp_path / "prompts.jsonl")
    pair = ["--expert", expert_path, "--dataset_name", str(tmp_path / "prompts.jsonl"), "--prompt_style", "raw"]
    pair += ["--max_new_tokens", "8", "--beta", "0"]
    own = ["--amateur_prompt_template", "{question}", "--amateur_skipped_layers", "0", "1"]
    assert main(["sample", *pair, *own[:-1], "--output_dir", str(tmp_path / "steps")]) in (0, None)
    assert "trajectories with" in capsys.readouterr().out
    assert main(["check", *pair, *own[:2]]) == 1
    assert "6 prompts, 48 steps" in capsys.readouterr().out
    assert main(["check", *pair, *own]) == 2
    assert "names all of the amateur's 2 layers" in capsys.readouterr().err


def test_a_run_hands_the_settings_on(expert_path, tmp_path):
    settings = {"amateur_skipped_layers": [1], "amateur_system_prompt": "", "amateur_prompt_template": "{question}!"}
    args = RunConfig(str(tmp_path / "run"), expert_path, "prompts", **settings)
    sampler = open_pair(args, RunFolder(args).steps, "run")
    assert sampler._pair.is_one_model
    assert {name: getattr(sampler.args, name) for name in settings} == settings


# Labels of the expert without its adapter


def naive_scores(rows, expert, amateur, vocabulary):
    trajectories = [Trajectory(row["prompt_ids"], row["completion_ids"]) for row in rows]
    return score_trajectories(expert, amateur, trajectories, vocabulary, alpha=0.2, beta=0.0)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("by_graph", [False, True])
def test_labels_of_the_base_are_made_on_answers_of_the_adapter(
    in_memory, by_graph, make_sampler, expert_path, amateur_path, adapter_path, prompts, monkeypatch
):
    if by_graph:  # as on a GPU, where the hidden states of the answering model are known
        monkeypatch.setattr(completions, "why_no_graph", lambda model: None)
    adapted = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(expert_path), adapter_path).eval()
    tokenizers = (AutoTokenizer.from_pretrained(expert_path),) if in_memory else ()
    sampler = make_sampler(adapted if in_memory else adapter_path, amateur_path, tokenizers, label_expert="base")
    made = sampler.sample(prompts)
    live = make_sampler(adapter_path, amateur_path).sample(prompts)
    assert made["completion_ids"] == live["completion_ids"]
    assert made["kl_divergence"] != live["kl_divergence"]
    base, weaker = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (expert_path, amateur_path))
    for row, score in zip(made, naive_scores(made, base, weaker, sampler.shared_vocabulary), strict=True):
        assert row["kl_divergence"] == pytest.approx(score.kl_divergence, rel=1e-4, abs=1e-6)
        assert row["label_ids"] == score.label_ids
    assert sampling_metadata(made)["settings"]["label_expert"] == "base"
    if in_memory:  # and it is as it was
        layers = [layer for layer in adapted.modules() if isinstance(layer, BaseTunerLayer)]
        assert layers and not any(layer.disable_adapters for layer in layers)


def test_an_amateur_of_the_expert_itself_is_read_without_the_adapter_too(
    make_sampler, adapter_path, expert_path, prompts
):
    layers = {"amateur_skipped_layers": [1]}
    sampler = make_sampler(adapter_path, label_expert="base", **layers)
    made = sampler.sample(prompts)
    base = Qwen2ForCausalLM.from_pretrained(expert_path).eval()
    scores = naive_scores(made, base, without_layers(base, [1]), sampler.shared_vocabulary)
    for row, score in zip(made, scores, strict=True):
        assert row["kl_divergence"] == pytest.approx(score.kl_divergence, rel=1e-4, abs=1e-6)


def test_labels_of_the_base_need_an_adapter_and_another_amateur(make_sampler, adapter_path, expert_path, amateur_path):
    with pytest.raises(ValueError, match="the expert has none. Remove it, or name the adapter"):
        make_sampler(expert_path, amateur_path, label_expert="base")
    with pytest.raises(ValueError, match="they would never diverge. Choose another amateur"):
        make_sampler(adapter_path, expert_path, label_expert="base")


CHANGED_BASES = {
    "biases": {"bias": "all"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "replicated layers": {"layer_replication": [(0, 1), (0, 1)]},
}


@pytest.mark.parametrize("settings", CHANGED_BASES.values(), ids=CHANGED_BASES)
def test_an_adapter_that_changes_its_base_is_not_switched_off(
    settings, make_sampler, expert, expert_path, amateur_path, tokenizer, tmp_path
):
    adapted = get_peft_model(expert, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings))
    adapted.save_pretrained(tmp_path / "adapter")
    sentence = "needs an adapter that leaves the weights of its base model as they are, but this one changes them"
    for named, tokenizers in ((str(tmp_path / "adapter"), ()), (adapted, (tokenizer,))):
        with pytest.raises(ValueError, match=f"^`label_expert='base'` {sentence}"):
            make_sampler(named, amateur_path, tokenizers, label_expert="base")
    for pair in ((adapted, expert), (expert, adapted)):
        with pytest.raises(ValueError, match=f"^A model that is the expert with its adapter on or off {sentence}"):
            make_sampler(*pair, (tokenizer, tokenizer))
    make_sampler(str(tmp_path / "adapter"), expert_path)  # two models


def test_the_same_amateur_is_refused_where_it_is_another_model_in_memory(make_sampler, expert, expert_path, tmp_path):
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(expert, saved).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="they would never diverge. Choose another amateur"):
        make_sampler(str(tmp_path / "adapter"), expert_path, label_expert="base")
