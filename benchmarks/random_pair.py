"""
An expert and an amateur of random weights in the shapes of two real ones, and a Dataset of random steps, where the
real weights cannot be had: time and memory do not depend on what the weights say, as long as as many steps are kept.

```bash
python benchmarks/random_pair.py --expert Qwen/Qwen2.5-Math-1.5B --amateur Qwen/Qwen2.5-0.5B --output_dir random
python benchmarks/speed.py --expert random/expert --amateur random/amateur --dataset_name FILE --output_dir bench
python benchmarks/several_gpus.py --model_name_or_path random/expert --dataset_name random/steps.parquet \
    --output_dir gpus
```

A config can be changed, so that the folder of Qwen2.5-1.5B alone will do:

```bash
python benchmarks/random_pair.py --expert FOLDER --output_dir random --amateur_config '{"hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "max_window_layers": 24, "num_attention_heads": 14}'
```

For a 7B expert, `--expert_config '{"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": false}'`.

Plain random weights would give flat distributions that have nothing to do with each other: every step kept, thousands
of tokens in every label. `plant` makes the two models agree nearly everywhere.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset, Features
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from trl_lightreasoner.steps.dataset import STEP_FEATURES


# Standard deviation of the logits. The best of 150,000 such draws are about SPREAD / 5 apart, so that of the plausible
# tokens (alpha = 0.2) there are about two
SPREAD = 16.0
# How far the amateur's embeddings are off: enough to matter (beta = 0.4) at about one step in seven
AMATEUR_NOISE = 0.037
# So large that what layers of random weights add to an embedding, about 1 each, is lost
SCALE = 1000.0


def make_config(source: str, changes: dict) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(source)
    values = {**config.to_dict(), **changes}
    if len(values.get("layer_types") or []) != values["num_hidden_layers"]:
        values.pop("layer_types", None)  # one a layer, which the config then fills in
    return type(config)(**values)


def num_values(config: PretrainedConfig) -> int:
    """Values of one attention, over all of its heads."""
    return config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


@torch.no_grad()
def plant(model: PreTrainedModel, embeddings: torch.Tensor, values: int) -> None:
    """
    Make a model of random weights, built like Llama and Qwen2, sure of a next token that its context decides.

    Its embeddings are what the head reads as well. The first attention adds the mean of the context to them, the last
    MLP multiplies each entry with the next one: that leads to a vector without relation to the last token, and so to
    a chain of tokens, another one for every prompt, instead of one token over and over.

    Args:
        model ([`~transformers.PreTrainedModel`]): Of random weights.
        embeddings (`torch.Tensor` of shape `(tokens, entries)`): Entries near 1 and -1. Two models that share them
            have nearly the same distributions. The model's other entries are not read by its head.
        values (`int`): Entries to which the mean of the context is added, at most as many as attention has values.
    """
    config, first, last = model.config, model.model.layers[0].self_attn, model.model.layers[-1].mlp
    width, entries = config.hidden_size, embeddings.shape[1]
    weight = model.get_input_embeddings().weight
    weight.normal_()
    weight[:, :entries] = embeddings[: len(weight)]
    weight[:, 0] = 1  # constant, up to the head
    weight *= SCALE
    if not config.tie_word_embeddings:
        model.get_output_embeddings().weight.copy_(weight)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0

    for projection in (first.q_proj, first.k_proj, first.v_proj, first.o_proj):
        projection.weight.zero_()
    value = torch.arange(values, device=weight.device)
    group = config.num_attention_heads // config.num_key_value_heads  # heads that share their values: use the first
    first.v_proj.weight[value, value + 1] = 1
    column = value // first.head_dim * group * first.head_dim + value % first.head_dim
    first.o_proj.weight[value + 1, column] = 8 * SCALE

    for projection in (last.gate_proj, last.up_proj, last.down_proj):
        projection.weight.zero_()
    entry = torch.arange(1, entries, device=weight.device)
    last.gate_proj.weight[entry, entry] = 1
    last.up_proj.weight[entry, entry.roll(1)] = 1
    last.down_proj.weight[entry, entry] = 20 * SCALE

    norm = model.model.norm.weight
    norm.zero_()
    norm[1:entries] = SPREAD / (SCALE * width**0.5)
    # The constant entry takes from all logits what the best have: near 0 there are more numbers in bf16
    product = 20 * 0.55 * (entries / width) ** 0.5  # root mean square of what the MLP adds, in constant entries
    norm[0] = -4.5 * SPREAD * product / SCALE


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", required=True, help="Where the expert's config and the tokenizer are taken from.")
    parser.add_argument("--amateur", help="Where the amateur's config is taken from; by default the same.")
    parser.add_argument("--expert_config", type=json.loads, default={}, help="What to change in it, as JSON.")
    parser.add_argument("--amateur_config", type=json.loads, default={}, help="What to change in it, as JSON.")
    parser.add_argument("--output_dir", required=True, type=Path, help="For expert, amateur and steps.parquet.")
    parser.add_argument("--num_rows", type=int, default=160, help="Rows of the Dataset.")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    configs = {
        "expert": make_config(args.expert, args.expert_config),
        "amateur": make_config(args.amateur or args.expert, args.amateur_config),
    }
    tokenizer = AutoTokenizer.from_pretrained(args.expert)
    entries = min(size for each in configs.values() for size in (each.hidden_size, each.intermediate_size))
    values = min(entries - 1, 128, *map(num_values, configs.values()))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        embeddings = torch.randn(max(each.vocab_size for each in configs.values()), entries).sign()
        for name, config in configs.items():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            if name == "amateur":
                embeddings += AMATEUR_NOISE * torch.randn_like(embeddings)
            plant(model, embeddings, values)
            model.save_pretrained(args.output_dir / name)
            tokenizer.save_pretrained(args.output_dir / name)
            print(f"{model.num_parameters() / 1e9:.2f} billion parameters are in {args.output_dir / name}.")
            del model
    # Ids below the added tokens
    random_steps(args.num_rows, tokenizer.vocab_size).to_parquet(args.output_dir / "steps.parquet")


if __name__ == "__main__":
    main()
