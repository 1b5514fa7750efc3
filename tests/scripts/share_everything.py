"""Push a Dataset, an adapter and accuracies to the Hub that HF_ENDPOINT names, by the commands and from Python."""

import json
import re
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import DatasetCard, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer, push_dataset_to_hub, push_evaluation_to_hub
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.evaluation.evaluation import Evaluation


def run(*argv: str) -> int:
    return main(list(map(str, argv)))


def by_commands(expert: str, amateur: str, prompts: str, folder: Path) -> dict:
    token = ("--push_to_hub", "--hub_token", "hf_SECRET")
    sample = ("sample", "--expert", expert, "--amateur", amateur, "--dataset_name", prompts, "--beta", "1.95")
    sample = (*sample, "--max_new_tokens", 12, "--output_dir", folder / "steps")
    train = (
        "train",
        "--model_name_or_path",
        expert,
        "--output_dir",
        folder / "adapter",
        "--use_cpu",
        "--max_steps",
        4,
    )
    train = (*train, "--logging_steps", 1, "--save_steps", 2, "--hub_strategy", "all_checkpoints")
    train = (*train, "--eval_strategy", "steps", "--eval_steps", 2, "--dataset_test_split", "train")
    codes = {
        "without a token": run(*sample, "--push_to_hub", "--hub_dataset_id", "me/steps"),
        "another's": run(*sample, *token, "--hub_dataset_id", "you/steps"),
        "another's model": run(*train, *token, "--dataset_name", prompts, "--hub_model_id", "you/adapter"),
    }
    codes["nothing sampled"] = not (folder / "steps").exists()
    codes["sample"] = run(*sample, *token, "--hub_dataset_id", "me/steps", "--hub_private_repo")
    # What is private takes the token, from where huggingface_hub looks for it
    loaded = load_dataset("me/steps", split="train", token="hf_SECRET")
    push_dataset_to_hub(loaded, "me/public-steps", token="hf_SECRET")
    codes["train"] = run(*train, *token, "--dataset_name", "me/public-steps", "--hub_model_id", "me/adapter")
    (folder / "gsm8k.jsonl").write_text(json.dumps({"question": "What is 2+2?", "answer": "#### 4"}) + "\n")
    evaluate = ("eval", "--model", "me/adapter", "--benchmarks", "gsm8k", "--data_dir", folder, "--num_workers", 1)
    codes["eval"] = run(*evaluate, "--max_new_tokens", 4, "--output_dir", folder / "evaluation", *token)
    return codes


def load_back(expert: str, folder: Path) -> dict:
    def logits(adapter) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(expert), adapter)
        with torch.no_grad():
            return model(torch.arange(5, 25)[None]).logits

    mine, back = Dataset.from_parquet(str(folder / "steps/data/*.parquet")), load_dataset("me/public-steps")["train"]
    code = re.search(r"```python\n(.*?)```", ModelCard.load("me/adapter").text, re.DOTALL)[1]
    exec(code, {})  # the quick start of the card
    return {
        "rows": [row | {"sampling_metadata": None} for row in mine]
        == [row | {"sampling_metadata": None} for row in back],
        "features": mine.features == back.features,
        "metadata": json.loads(back[0]["sampling_metadata"]),
        "logits": torch.equal(logits("me/adapter"), logits(str(folder / "adapter"))),
        "is trained": not torch.equal(
            logits("me/adapter"), AutoModelForCausalLM.from_pretrained(expert)(torch.arange(5, 25)[None]).logits
        ),
        "tokenizer": AutoTokenizer.from_pretrained("me/adapter").get_vocab()
        == AutoTokenizer.from_pretrained(expert).get_vocab(),
    }


def from_python(expert: str, folder: Path, evaluation: Evaluation) -> None:
    rows = load_dataset("me/public-steps", split="train")
    push_dataset_to_hub(rows, "again", token="hf_SECRET")
    card = DatasetCard.load("me/again")
    card.text += "\nBen made this.\n"
    card.data["language"] = "en"
    card.validate = lambda **kwargs: None  # huggingface_hub 1 asks huggingface.co
    card.push_to_hub("me/again", token="hf_SECRET")
    other = rows.remove_columns("id").add_column("difficulty", [0.5] * len(rows)).select(range(4))
    push_dataset_to_hub(other, "me/again", token="hf_SECRET")
    assert load_dataset("me/again", split="train").to_list() == other.to_list()
    push_dataset_to_hub(other.select([0, 1]).with_format("torch"), "me/splits", token="hf_SECRET")
    validation = Dataset.from_list(other.to_list()[2:3], features=other.features, split="validation")
    push_dataset_to_hub(validation, "me/splits", token="hf_SECRET")
    push_dataset_to_hub(DatasetDict({"train": rows, "test": rows.select([1])}), "me/dict", token="hf_SECRET")

    push_evaluation_to_hub(evaluation, "me/adapter", token="hf_SECRET")
    args = LightReasonerConfig(
        str(folder / "full"), use_cpu=True, max_steps=1, hub_token="hf_SECRET", save_strategy="no", report_to="none"
    )
    trainer = LightReasonerTrainer(expert, args, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub(dataset_name="me/public-steps", tags="mine", evaluation=evaluation)


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    folder = Path(settings["folder"])
    result = {"codes": by_commands(settings["expert"], settings["amateur"], settings["prompts"], folder)}
    result |= load_back(settings["expert"], folder)
    from_python(settings["expert"], folder, Evaluation(settings["evaluation"]))
    (folder / "result.json").write_text(json.dumps(result))
