"""What the cards say of license, language, size, source and example: as much as is known, and nothing else."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import DatasetCard, ModelCard
from peft import LoHaConfig, LoraConfig

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.hub.card_parts import languages_of
from trl_lightreasoner.hub.cards import _size_category, dataset_card, license_of
from trl_lightreasoner.hub.merged_card import merged_card
from trl_lightreasoner.steps.prompt_format import PromptFormat


@pytest.fixture
def card_of(expert, tokenizer, steps, tmp_path):
    """The card of an adapter of the expert that was, or was to be, trained on rows."""

    def make(rows: Dataset = steps, beside: str | None = None, **settings) -> ModelCard:
        expert.config._name_or_path = str(tmp_path / "expert")
        (tmp_path / "expert").mkdir()
        if beside is not None:
            (tmp_path / "expert" / "README.md").write_text(beside)
        args = LightReasonerConfig(str(tmp_path / "adapter"), use_cpu=True, report_to="none", **settings)
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = LightReasonerTrainer(expert, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        trainer.create_model_card()
        return ModelCard.load(tmp_path / "adapter" / "README.md")

    return make


def example_of(card: ModelCard):
    return json.loads(re.search("^prompt = (.*)$", card.text, re.MULTILINE)[1])


def sampled_from(steps: Dataset, *sources: dict | None) -> Dataset:
    """The rows, of samplings from these sources in turn."""
    made = json.loads(steps[0]["sampling_metadata"])
    texts = [json.dumps(made | ({"prompt_source": source} if source else {})) for source in sources]
    column = [texts[i % len(texts)] for i in range(len(steps))]
    return steps.remove_columns("sampling_metadata").add_column("sampling_metadata", column)


GSM8K = {"dataset": "openai/gsm8k", "revision": "abc123", "language": ["en"]}


# Of a Dataset


@pytest.mark.parametrize(
    ("num_rows", "name"),
    [
        *((0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (9_999, "1K<n<10K"), (10_000, "10K<n<100K")),
        *((10**6, "1M<n<10M"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T"), (10**15, "n>1T")),
    ],
)
def test_sizes_have_the_names_of_the_hub(num_rows, name):
    assert _size_category(num_rows) == name


def test_the_size_of_a_dataset_is_that_of_all_its_splits(steps):
    before = dataset_card({"train": steps}, "me/steps")
    assert DatasetCard(str(before)).data.size_categories == ["n<1K"]
    splits = SplitDict({"train": SplitInfo("train", num_examples=994), "test": SplitInfo("test", num_examples=6)})
    DatasetInfosDict({"default": DatasetInfo(splits=splits)}).to_dataset_card_data(before.data)
    assert dataset_card({"test": steps}, "me/steps", before).data.size_categories == ["1K<n<10K"]


def test_source_and_language_of_the_prompts_are_told_where_they_are_known(steps):
    card = DatasetCard(str(dataset_card({"train": sampled_from(steps, GSM8K)}, "me/steps")))
    assert (card.data.language, card.data.source_datasets) == (["en"], ["openai/gsm8k"])
    source = "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k), revision abc123"
    assert f"| source of the prompts | {source} |" in card.text


def test_what_is_not_known_is_not_guessed(steps):
    card = DatasetCard(str(dataset_card({"train": steps}, "me/steps")))
    assert (card.data.language, card.data.source_datasets, card.data.license) == (None, None, None)
    assert "| source of the prompts | not known |" in card.text
    assert dataset_card({"train": sampled_from(steps, GSM8K, None)}, "me/steps").data.language is None


def test_metadata_of_people_stays(steps):
    existing = DatasetCard("---\nlanguage: de\nlicense: mit\nsource_datasets:\n- me/mine\n---\nMine.\n")
    data = dataset_card({"train": sampled_from(steps, GSM8K)}, "me/steps", existing).data
    assert (data.language, data.license, data.source_datasets) == ("de", "mit", ["me/mine"])


@pytest.mark.parametrize(
    ("languages", "told"),
    [(["en"], ["en"]), (["en", ["de", "en"]], ["en", "de"]), (["en", None], None), ([[False]], None), ([], None)],
)
def test_languages_of_several_samplings_stand_once(languages, told):
    assert languages_of({"prompt_source": {"dataset": "a/b", "language": each}} for each in languages) == told


def test_a_new_card_is_metadata_and_text(steps):
    assert re.match(
        "---\n.*?\n---\n\\s*<!-- lightreasoner: steps -->", str(dataset_card({"train": steps}, "a/b")), re.DOTALL
    )


def test_the_cards_tell_limits(card_of, steps):
    assert "\n## Limits\n" in dataset_card({"train": steps}, "me/steps").text and "\n## Limits\n" in card_of().text


# Of a model


def test_the_license_is_that_of_the_base_model_where_its_card_says_so(card_of):
    card = card_of(beside="---\nlicense: other\nlicense_name: toy\nlicense_link: LICENSE\nlanguage: en\n---\nA model.")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "toy", "LICENSE")
    assert card.data.language is None  # that of the prompts is not known


@pytest.mark.parametrize("beside", [None, "A model.", "---\ntags: [a]\n---\n", "---\n: [\n---\n"])
def test_without_a_card_that_tells_it_there_is_no_license(beside, tmp_path):
    if beside is not None:
        (tmp_path / "README.md").write_text(beside)
    assert license_of(str(tmp_path)) == {} == license_of("") == license_of("nobody/has-this")


def test_the_language_of_the_prompts_is_that_of_the_model(card_of, steps):
    assert card_of(sampled_from(steps, GSM8K)).data.language == ["en"]


def test_the_example_is_a_prompt_of_the_training_set(card_of, steps):
    assert example_of(card_of()) in steps["prompt"][:]


def test_the_example_is_short_and_needs_nothing_beside_it(card_of, steps):
    user = {"role": "user", "content": "2+2?", "name": None}
    prompts = [[{**user, "content": "long " * 200}], [user, {**user, "role": "assistant"}], [user], [user]]
    prompts += [[user]] * (len(steps) - len(prompts))
    tools = [[], [], [{"name": "sum"}]] + [[]] * (len(steps) - 3)
    rows = steps.remove_columns("prompt").add_column("prompt", prompts).add_column("tools", tools)
    rows = rows.select([0, 1, 2])
    assert example_of(card_of(rows)) == [{"role": "user", "content": "What is 17 * 3?"}]


@pytest.mark.parametrize("in_rows", [False, True])
def test_the_example_has_the_switches_of_the_training(in_rows, card_of, steps):
    prompt_format = PromptFormat("chat", chat_template_kwargs={"think": False})
    made = json.loads(steps[0]["sampling_metadata"]) | {"prompt_format": prompt_format.to_dict()}
    rows = steps.remove_columns(["prompt", "sampling_metadata"])
    rows = rows.add_column("sampling_metadata", [json.dumps(made)] * len(steps))
    rows = rows.add_column("prompt", [prompt_format.make_prompt("2+2?")] * len(steps))
    if in_rows:
        rows = rows.add_column("chat_template_kwargs", [{"think": False, "other": None}] * len(steps))
    card = card_of(rows)
    assert "return_tensors=\"pt\", **{'think': False})\n" in card.text
    assert example_of(card) == prompt_format.make_prompt("2+2?" if in_rows else "What is 17 * 3?")
    assert '| prompt format | the chat template with {"think": false} and no system prompt |' in card.text


def test_numbers_are_written_for_people(card_of):
    text = card_of(max_length=2048, learning_rate=1.25e-4, seed=12345).text
    assert "| max_length | 2,048 |" in text and "| learning_rate | 0.000125 |" in text and "| seed | 12345 |" in text
    assert "| epochs | 0 |" in text


@pytest.mark.parametrize(("launched", "written"), [("no", "none"), ("bf16", "bf16"), ("fp16", "none")])
def test_the_precision_is_that_of_the_launcher(launched, written, card_of, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert f"| mixed precision | {written} |" in card_of().text


def test_rows_of_one_step_are_parts_of_their_trajectories(card_of, steps):
    names = ("step_positions", "label_ids", "label_probs")
    single = Dataset.from_list(
        [{**row, **{name: [row[name][k]] for name in names}} for row in steps for k in range(len(row[names[0]]))]
    )
    num_steps = sum(map(len, steps["completion_ids"]))
    share = f"{len(single)} ({len(single) / num_steps:.1%})"
    text = dataset_card({"train": steps, "single": single}, "me/steps").text
    assert f"| train | {len(steps)} | {len(steps)} | {num_steps} | {share} |" in text
    assert f"| single | {len(single)} | {len(steps)} | {num_steps} | {share} |" in text
    assert f"| trajectories with a kept step | {len(steps)} |" in card_of(one_step_per_row=True).text


def test_the_update_of_the_best_model_is_told(expert, tokenizer, steps, tmp_path):
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = LightReasonerConfig(
        str(tmp_path),
        **schedule,
        max_steps=3,
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the best is not the last
        use_cpu=True,
        report_to="none",
    )
    trainer = LightReasonerTrainer(expert, args, train_dataset=steps, eval_dataset=steps, processing_class=tokenizer)
    trainer.train()
    trainer.create_model_card()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = max(losses, key=losses.get)
    text = (tmp_path / "README.md").read_text()
    assert best < 3 and "| updates | 3 |" in text
    assert f"| update of the best loss, whose weights these are | {best} |" in text


# Of a merged model


def test_a_merged_model_names_base_model_and_adapter_on_the_hub(expert, tokenizer):
    names = {"folder": Path("/data/me/merged"), "base": "Qwen/Qwen2.5-Math-1.5B", "adapter_name": "me/adapter"}
    measured = {"change": 0.1234, "difference": 1.25e-6, "num_tokens": 64}
    card = merged_card(
        expert, tokenizer, **names, adapter=LoHaConfig(), adapter_card=None, prompt_format=None, **measured
    )
    card = ModelCard(str(card))
    assert 'return_tensors="pt")\n' in card.text
    assert (card.data.base_model, card.data.base_model_relation) == ("Qwen/Qwen2.5-Math-1.5B", "finetune")
    assert card.data.library_name == "transformers" and card.data.tags is None
    assert "with the LOHA adapter [me/adapter](https://huggingface.co/me/adapter) merged" in card.text
    assert "| divergence from the base model | 0.12 nats per token |" in card.text and "/data" not in card.text
    assert example_of(card) == [{"role": "user", "content": "What is 17 * 3?"}] and "## License" in card.text


def test_the_example_of_a_merged_model_has_the_switches_of_the_training(expert, tokenizer):
    names = {"folder": Path("/data/me/merged"), "base": "Qwen/Qwen2.5-Math-1.5B", "adapter_name": "me/adapter"}
    measured = {"change": 0.1234, "difference": 1.25e-6, "num_tokens": 64}
    prompt_format = PromptFormat("chat", chat_template_kwargs={"think": False})
    card = merged_card(
        expert, tokenizer, **names, adapter=LoHaConfig(), adapter_card=None, prompt_format=prompt_format, **measured
    )
    assert "return_tensors=\"pt\", **{'think': False})\n" in card.text
