"""What is shared comes back from a Hub, its card says what it is, and nothing of the machine goes along."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetInfo, Features
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from filelock import FileLock
from huggingface_hub import DatasetCard, ModelCard
from peft import LoraConfig
from transformers import TrainerState

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer, push_dataset_to_hub
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.evaluation.evaluation import Evaluation
from trl_lightreasoner.hub.cards import add_evaluation, dataset_card
from trl_lightreasoner.hub.training_curve import draw_curve
from trl_lightreasoner.models.provenance import hub_id, public_name

from ..local_hub import TOKEN, LocalHub, local_hub


SCRIPT = Path(__file__).parents[1] / "scripts" / "share_everything.py"


def scores(accuracy: float) -> dict:
    return {"accuracy": accuracy, "standard_error": 0.01, "mean_tokens": 100.0, "num_cut": 0}


def make_evaluation(accuracy: float) -> dict:
    settings = {"prompt_style": "chat", "max_new_tokens": 2048, "data_dir": "/data/me/data"}
    described = {"model": "/data/me/adapter"}
    benchmarks = {"gsm8k": {"num_problems": 1319, "model": scores(accuracy)}}
    return {"benchmarks": benchmarks, "settings": settings, "model": described}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, expert_path, amateur_path, prompts) -> SimpleNamespace:
    """A Hub to which everything was pushed, and what the pushing said."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    with FileLock(f"{folder}.lock"):  # once for all workers
        if not folder.exists():
            share_everything(folder, expert_path, amateur_path, prompts)
    result = json.loads((folder / "shared.json").read_text())
    return SimpleNamespace(**result | {"folder": folder, "hub": LocalHub.from_json(result["hub"])})


def share_everything(folder: Path, expert_path: str, amateur_path: str, prompts: Dataset) -> None:
    folder.mkdir()
    prompts.to_json(folder / "prompts.jsonl")
    settings = {"folder": str(folder), "prompts": str(folder / "prompts.jsonl"), "evaluation": make_evaluation(0.64)}
    settings |= {"expert": expert_path, "amateur": amateur_path}
    names = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TMPDIR")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HOME": str(folder / "cache"), "HOME": str(folder)}
    with local_hub() as hub:
        process = subprocess.run(
            [sys.executable, str(SCRIPT), json.dumps(settings)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**environment, "HF_ENDPOINT": hub.url},
        )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    result |= {"hub": hub.to_json(), "said": process.stdout + process.stderr, "expert_path": expert_path}
    (folder / "shared.json").write_text(json.dumps(result))


def read_rows(parquet: bytes, folder: Path) -> Dataset:
    file = folder / f"{hashlib.sha256(parquet).hexdigest()}.parquet"
    file.write_bytes(parquet)
    return Dataset.from_parquet(str(file))


def table_rows(text: str, title: str) -> list[list[str]]:
    """Cells of the first table under a title, without its head."""
    part = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# There and back


def test_the_commands_push(shared):
    assert shared.codes["sample"] == shared.codes["train"] == shared.codes["eval"] == 0
    assert "The Dataset is at me/steps on the Hub." in shared.said
    assert "The model is at me/adapter on the Hub." in shared.said
    assert "The accuracies are in the model card of me/adapter on the Hub." in shared.said
    repositories = shared.hub.repositories
    assert [repositories["datasets", f"me/{name}"].private for name in ("steps", "public-steps")] == [True, False]


def test_a_dataset_is_loaded_back_as_it_was(shared):
    assert shared.rows and shared.features
    assert shared.metadata["settings"]["beta"] == 1.95
    assert (shared.metadata["expert"]["model"], shared.metadata["amateur"]["model"]) == ("expert", "amateur")


def test_an_adapter_is_loaded_back_as_it_was(shared):
    assert shared.logits and shared.tokenizer
    assert vars(shared)["is trained"]


def test_who_may_not_write_learns_it_before_the_work(shared):
    assert [shared.codes[name] for name in ("without a token", "another's", "another's model")] == [2, 2, 2]
    assert shared.codes["nothing sampled"]
    lines = [line for line in shared.said.splitlines() if ": error: " in line]
    assert len(lines) == 3 and all("`hf auth login`" in line for line in lines)
    assert "401" in lines[0] and "me/steps" in lines[0]
    assert "403" in lines[1] and "403" in lines[2] and lines[2].startswith("lightreasoner train: error: ")


def test_without_a_network_pushing_is_refused_in_a_sentence(expert_path, amateur_path, prompts, tmp_path, capsys):
    prompts.to_json(tmp_path / "prompts.jsonl")
    argv = ("--expert", expert_path, "--amateur", amateur_path, "--dataset_name", str(tmp_path / "prompts.jsonl"))
    argv = ("sample", *argv, "--output_dir", str(tmp_path / "steps"), "--push_to_hub", "--hub_dataset_id", "me/steps")
    assert main(list(argv)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert "The Hub could not be used: " in line and "offline mode is enabled" in line
    assert not (tmp_path / "steps").exists()


def test_rows_that_are_no_steps_are_refused():
    with pytest.raises(ValueError, match="The train split has no column 'prompt_ids'; it has 'prompt'"):
        push_dataset_to_hub(Dataset.from_dict({"prompt": ["a"]}), "me/steps")


def test_accuracies_need_the_name_of_a_repository(expert_path, tmp_path, capsys):
    assert main(["eval", "--model", expert_path, "--output_dir", str(tmp_path), "--push_to_hub"]) == 2
    assert "is a folder. Name the repository of its model card with `--hub_model_id`." in capsys.readouterr().err


# What goes along


def test_no_token_is_uploaded_or_said(shared):
    for repository in shared.hub.repositories.values():
        for files in repository.history:
            assert [path for path, content in files.items() if TOKEN.encode() in content] == []
    assert TOKEN not in shared.said and "SECRET" not in shared.said
    assert not [path for path in shared.folder.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]


def test_no_card_and_no_row_names_a_folder_of_the_machine(shared, tmp_path):
    expert_path = shared.expert_path
    num_cards = 0
    for repository in shared.hub.repositories.values():
        for files in repository.history:
            cards = [content.decode() for path, content in files.items() if path.endswith("README.md")]
            assert not [
                card for card in cards if str(shared.folder) in card or expert_path in card or "/data/" in card
            ]
            num_cards += len(cards)
            for path, content in files.items():
                if path.endswith(".parquet"):
                    assert not [row for row in read_rows(content, tmp_path) if expert_path in str(row)]
    assert num_cards > 10


def test_what_is_pushed_while_training_goes_on_has_a_card(shared):
    repository = shared.hub.repositories["models", "me/adapter"]
    number = repository.messages.index("Training in progress, step 2")
    card = ModelCard(repository.history[number]["README.md"].decode())
    # How many updates it tells depends on when the upload, which goes on beside the training, reads it
    assert "light-reasoner" in card.data.tags and "| updates |" in card.text


def test_checkpoints_are_pushed_with_a_card_of_ours(shared):
    files = shared.hub.repositories["models", "me/adapter"].files()
    card = ModelCard(files["checkpoint-2/README.md"].decode())
    assert "light-reasoner" in card.data.tags and card.data.base_model is None


def test_an_adapter_of_a_local_model_is_pushed_with_a_warning(shared):
    assert "as the base model, a folder of this machine" in shared.said


# The dataset card


def test_a_dataset_card_tells_columns_models_settings_and_counts(shared):
    card = DatasetCard(shared.hub.card("datasets", "me/steps"))
    assert {"trl", "light-reasoner"} <= set(card.data.tags) and card.data.task_categories == ["text-generation"]
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
    ]
    made = dict(table_rows(card.text, "How it was made"))
    assert (
        made["expert (pi_E)"] == "`expert`, float32, sdpa attention, on cpu"
        and made["amateur (pi_A)"] == "`amateur`, float32, sdpa attention, on cpu"
    )
    assert (made["alpha"], made["beta"], made["max_new_tokens"]) == ("0.2", "1.95 nats", "12")
    mine = Dataset.from_parquet(str(shared.folder / "steps/data/*.parquet"))
    num_steps, num_kept = sum(map(len, mine["completion_ids"])), sum(map(len, mine["step_positions"]))
    counts = ["train", "6", "6", f"{num_steps:,}", f"{num_kept:,} ({num_kept / num_steps:.1%})"]
    assert table_rows(card.text, "Size") == [counts]
    assert "inherit their licenses" in card.text and "@inproceedings{wang-etal-2026-lightreasoner" in card.text
    assert "https://huggingface.co/papers/2510.07962" in card.text


def columns_told(text: str) -> list[str]:
    return [row[0].strip("`") for row in table_rows(text, "Columns")]


@pytest.mark.parametrize("name", ["steps", "public-steps", "again", "splits", "dict"])
def test_the_columns_of_a_card_are_those_of_its_files(name, shared, tmp_path):
    files = shared.hub.repositories["datasets", f"me/{name}"].files()
    for path in (path for path in files if path.endswith(".parquet")):
        assert read_rows(files[path], tmp_path).column_names == columns_told(files["README.md"].decode())


def test_pushing_again_with_other_columns_leaves_a_card_that_matches(shared):
    history = [files["README.md"].decode() for files in shared.hub.repositories["datasets", "me/again"].history[1:]]
    before, after = history[1], history[4]
    assert "id" in columns_told(before) and "difficulty" not in columns_told(before)
    assert "difficulty" in columns_told(after) and "id" not in columns_told(after)
    assert table_rows(after, "Size")[0][:2] == ["train", "4"]
    features = {each["name"] for each in DatasetCard(after).data.dataset_info["features"]}
    assert features == set(columns_told(after))


def test_pushing_again_keeps_what_people_wrote(shared):
    card = DatasetCard(shared.hub.card("datasets", "me/again"))
    assert "\nBen made this.\n" in card.text and card.data.language == "en"
    assert card.text.count("## Columns") == 1


def test_splits_stand_side_by_side(shared):
    dict_card, splits_card = (shared.hub.card("datasets", f"me/{name}") for name in ("dict", "splits"))
    assert [row[:2] for row in table_rows(dict_card, "Size")] == [["train", "6"], ["test", "1"]]
    assert [row[:2] for row in table_rows(splits_card, "Size")] == [["validation", "1"], ["train", "2"]]


def test_a_split_that_is_pushed_later_leaves_what_the_card_tells_of_the_first(steps):
    def card_of(split, name, before=None):
        return dataset_card({name: split}, "me/steps", before)

    def pushed(card, **sizes):  # as `datasets` does
        splits = SplitDict({name: SplitInfo(name, num_examples=size) for name, size in sizes.items()})
        DatasetInfosDict({"default": DatasetInfo(splits=splits)}).to_dataset_card_data(card.data)
        return card

    made = json.loads(steps[0]["sampling_metadata"])
    later = json.dumps({**made, "settings": {**made["settings"], "beta": 7.5}})
    held_out = steps.select([0]).remove_columns("sampling_metadata").add_column("sampling_metadata", [later])
    train = card_of(steps, "train")
    told = table_rows(train.text, "Size")[0]
    both = card_of(held_out, "validation", pushed(train, train=len(steps), validation=1)).text
    assert 'split="train"' in both
    size = {row[0]: row[1:] for row in table_rows(both, "Size")}
    assert ["train", *size["train"]] == told and size["validation"][0] == "1"
    makings = both.partition("## How it was made")[2].partition("## Size")[0].split("### ")[1:]
    assert {part.split()[0]: "7.5 nats" in part for part in makings} == {"train": False, "validation": True}
    again = card_of(steps, "validation", pushed(DatasetCard("---\n---\n" + both), train=9, validation=6)).text
    assert "7.5 nats" not in again and "### train, validation" in again
    assert ["train", "9", "", "", ""] in table_rows(again, "Size")  # somebody has changed it


def test_a_card_tells_every_making_of_the_rows(steps):
    text = steps[0]["sampling_metadata"]
    hub_text = json.dumps(json.loads(text) | {"expert": {"model": "Qwen/Qwen2.5-Math-1.5B", "revision": "abc123"}})
    texts = [hub_text, "somebody else's", "1"] + [text] * (len(steps) - 3)
    mixed = steps.remove_columns("sampling_metadata").add_column("sampling_metadata", texts)
    card = dataset_card({"train": mixed}, "me/steps").text
    link = "[Qwen/Qwen2.5-Math-1.5B](https://huggingface.co/Qwen/Qwen2.5-Math-1.5B), revision abc123"
    assert link in card and "| `expert`, float32, sdpa attention, on cpu |" in card
    assert 'model="Qwen/Qwen2.5-Math-1.5B"' in card


def test_a_card_tells_the_types_of_columns(steps):
    features = {**steps.features, "a|b": Features({"x": steps.features["prompt"]})}
    rows = [row | {"a|b": {"x": "1"}} for row in steps]
    card = dataset_card({"train": Dataset.from_list(rows, features=Features(features))}, "me/steps").text
    assert "| `label_ids` | list of list of int32 | support of v_C" in card
    assert "| `a\\|b` | {x: text} | as in the dataset of the prompts |" in card


# The model card


def test_a_model_card_tells_data_settings_and_curve(shared):
    card = ModelCard(shared.hub.card("models", "me/adapter"))
    assert card.data.tags == ["generated_from_trainer", "trl", "light-reasoner", "peft"]
    assert (card.data.library_name, card.data.datasets) == ("peft", "me/public-steps")
    data, settings = (dict(table_rows(card.text, title)) for title in ("Training data", "Training settings"))
    assert data["dataset"] == "[me/public-steps](https://huggingface.co/datasets/me/public-steps)"
    assert data["beta"] == "1.95 nats" and int(data["kept steps"]) > 0
    assert settings["beta"] == "1.95 nats"  # no default is below what was sampled
    assert (settings["learning_rate"], settings["updates"], settings["rows per update"]) == ("0.0001", "4", "8")
    layers = "q_proj, v_proj"
    assert (settings["LoRA r"], settings["LoRA target modules"]) == ("8", layers)
    curve = table_rows(card.text, "Training curve")
    assert [row[0] for row in curve] == ["1", "2", "3", "4"]
    assert "| eval_kl_to_expert |" in card.text and float(curve[3][-1]) > 0 and curve[0][-1] == ""
    assert (
        "https://huggingface.co/papers/2510.07962" in card.text
        and "@inproceedings{wang-etal-2026-lightreasoner" in card.text
    )


def test_the_curve_is_a_picture_where_matplotlib_is_installed(shared):
    files, drawn = shared.hub.repositories["models", "me/adapter"].files(), importlib.util.find_spec("matplotlib")
    assert ("![Loss" in files["README.md"].decode()) == ("training_curve.png" in files) == (drawn is not None)


def test_the_accuracies_of_the_command_are_put_into_the_card(shared):
    repository = shared.hub.repositories["models", "me/adapter"]
    number = repository.messages.index("Add accuracies")
    card = ModelCard(repository.history[number]["README.md"].decode())
    results = json.loads((shared.folder / "evaluation" / "results.json").read_text())
    accuracy = results["benchmarks"]["gsm8k"]["model"]["accuracy"]
    assert [each.metric_value for each in card.data.eval_results] == [100 * accuracy]
    assert "| GSM8K     | 1        |" in card.text


def test_accuracies_are_put_into_a_card_that_is_there(shared):
    for name in ("adapter", "full"):
        card = ModelCard(shared.hub.card("models", f"me/{name}"))
        assert card.text.count("| GSM8K") == 1 and "## Training settings" in card.text
        (result,) = card.data.eval_results
        assert (result.dataset_type, result.metric_value, card.data.model_name) == ("openai/gsm8k", 64.0, name)


def test_a_fully_trained_model_is_no_adapter(shared):
    card = ModelCard(shared.hub.card("models", "me/full"))
    assert card.data.library_name == "transformers" and {"mine", "trl"} <= set(card.data.tags)
    assert "peft" not in card.data.tags and "PeftModel" not in card.text and "LoRA" not in card.text


def test_accuracies_replace_those_before():
    card = ModelCard("---\nlicense: mit\n---\nMine.\n")
    for accuracy in (0.5, 0.75):
        add_evaluation(card, Evaluation(make_evaluation(accuracy)))
    assert card.text.count("## Evaluation") == 1 and "75.0 +- 1.0" in card.text and "50.0" not in card.text
    assert "Mine." in card.text and card.data.license == "mit"


def test_accuracies_on_a_file_of_questions_are_in_the_table_alone():
    card = ModelCard("---\nlicense: mit\n---\nMine.\n")
    made = make_evaluation(0.5)
    made["benchmarks"] = {"own": made["benchmarks"]["gsm8k"]}
    add_evaluation(card, Evaluation(made))
    assert "| Own " in card.text and "model-index" not in str(card)


def test_a_saved_folder_has_the_card_without_a_path(expert_path, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path / "adapter"), use_cpu=True, report_to="none", max_steps=1)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM")
    LightReasonerTrainer(expert_path, args, train_dataset=steps, peft_config=lora).save_model()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert expert_path not in card and "A LoRA adapter for `expert`" in card


def test_streamed_rows_have_a_card(expert_path, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path / "adapter"), use_cpu=True, report_to="none", max_steps=1)
    LightReasonerTrainer(expert_path, args, train_dataset=steps.to_iterable_dataset()).save_model()
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "| dataset | streamed |" in text and "epochs" not in text


def test_a_long_curve_is_told_in_a_few_rows(expert_path, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = LightReasonerTrainer(expert_path, args, train_dataset=steps)
    trainer.state.log_history = [{"loss": 1 / step, "step": step} for step in range(1, 1001)]
    trainer.create_model_card()
    curve = table_rows((tmp_path / "README.md").read_text(), "Training curve")
    assert len(curve) == 20 and (curve[0][0], curve[-1][0]) == ("1", "1,000")


def test_the_accuracies_of_a_training_are_told_with_their_errors(expert_path, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = LightReasonerTrainer(expert_path, args, train_dataset=steps)
    trainer.state.log_history = [
        {"eval_accuracy": 0.5, "eval_accuracy_standard_error": 0.05, "eval_accuracy_num_cut": 1, "step": 0},
        *({"loss": 1 / step, "step": step} for step in range(1, 1001)),
        {"eval_accuracy": 0.625, "eval_accuracy_standard_error": 0.0484, "step": 333},
    ]
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    accuracies = {row[0]: row[-1] for row in table_rows(text, "Training curve") if row[-1]}
    assert accuracies == {"0": "0.5 +- 0.05", "333": "0.625 +- 0.048"}
    assert "are for held-out data. `eval_accuracy` is the share of questions" in text
    if importlib.util.find_spec("matplotlib") is not None:
        assert "![Loss, entropy, accuracy over the updates](training_curve.png)" in text
        assert (tmp_path / "training_curve.png").is_file()


def test_nothing_is_drawn_where_nothing_was_logged(tmp_path):
    assert not draw_curve(TrainerState(), str(tmp_path / "curve.png")) and not list(tmp_path.iterdir())


# Names


@pytest.mark.parametrize(
    ("name", "id", "public"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1", "Qwen/Qwen2.5-0.5B", None),
        ("/data/me/expert", None, "expert"),
        ("/data/me/expert/", None, "expert"),
        ("C:\\models\\expert", None, "expert"),
        ("../expert", None, "expert"),
        ("./expert", None, "expert"),
        ("here/expert", None, "expert"),
        ("expert", None, "expert"),
        ("", None, None),
        (None, None, None),
    ],
)
def test_a_name_tells_nothing_of_the_machine(name, id, public, tmp_path, monkeypatch):
    (tmp_path / "here" / "expert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) == id
    assert public_name(name) == (public or id)
