"""
A model of random weights in the shapes of another one, and a Dataset of random steps: time and memory do not depend on
what the weights say.

```bash
python benchmarks/random_expert.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --output_dir random
python benchmarks/several_gpus.py --model_name_or_path random --dataset_name random/steps.parquet --output_dir gpus
```
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset, Features
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_lightreasoner.step_dataset import STEP_FEATURES


def random_steps(num_rows: int, num_tokens: int) -> Dataset:
    """Prompts of 60 to 180 tokens, completions of 128, 3 to 20 kept steps a row."""
    rng = random.Random(0)
    rows = []
    for _ in range(num_rows):
        prompt_length = rng.randint(60, 180)
        positions = sorted(rng.sample(range(128), rng.randint(3, 20)))
        label_ids = [rng.sample(range(num_tokens), rng.choice([1, 1, 2, 3])) for _ in positions]
        weights = [[rng.random() + 0.1 for _ in ids] for ids in label_ids]
        rows.append(
            {
                "prompt_ids": [rng.randrange(num_tokens) for _ in range(prompt_length)],
                "completion_ids": [rng.randrange(num_tokens) for _ in range(128)],
                "kl_divergence": [1.0] * 128,
                "step_positions": positions,
                "label_ids": label_ids,
                "label_probs": [[weight / sum(each) for weight in each] for each in weights],
            }
        )
    features = {name: feature for name, feature in STEP_FEATURES.items() if name != "sampling_metadata"}
    return Dataset.from_list(rows, features=Features(features))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Where config and tokenizer are taken from.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for the model and steps.parquet.")
    parser.add_argument("--num_rows", type=int, default=160, help="Rows of the Dataset.")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    tokenizer.save_pretrained(args.output_dir)
    # Ids below the added tokens
    random_steps(args.num_rows, tokenizer.vocab_size).to_parquet(args.output_dir / "steps.parquet")
    print(f"{model.num_parameters() / 1e9:.2f} billion parameters are in {args.output_dir}.")


if __name__ == "__main__":
    main()
