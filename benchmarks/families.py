"""
Which families of models come out right? Builds a tiny model of every causal class of the installed transformers, and
holds what the package makes of it to a loop: one row, one context at a time, in float64, without a cache.

For each: completions, divergences and labels at batch size 1 and 8; the divergence from itself; the loss before
training; 25 updates of an adapter, and the loss after them; the model saved, loaded again and merged. Results are
written as they come, so that a run that was stopped goes on.

```bash
python benchmarks/families.py --output_dir families
python benchmarks/families.py --output_dir families --families qwen2 rwkv
```
"""

import argparse
import copy
import importlib.metadata
import json
import math
import re
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    logging,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
)
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.models.merging import merge
from trl_lightreasoner.sampling.scoring import Trajectory, score_trajectories


PROMPTS = [
    "2+2=",
    "Ann has 3 apples.",
    "12",
    "Ben had 17 coins, lost 5.",
    "A prime:",
    "x",
    "60*3 is",
    "How far is it?",
]
ALPHA, BETA, NEW_TOKENS, UPDATES = 0.2, 1e-4, 6, 25
TOLERANCE = 2e-3  # of divergences and losses, relative; what is wrong is off by more
SECONDS = 90  # a family
WIDTH = 264  # 256 bytes and some columns that no token owns

# What makes a config small, by the names that the families use
SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "dim_model", "input_embedding_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers", "num_blocks"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["linear_num_key_heads", "index_n_heads", "mamba_num_heads", "linear_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "attention_head_dim", "num_kv_heads"], 4),
    **dict.fromkeys(["linear_num_value_heads"], 4),
    **dict.fromkeys(
        ["head_dim", "kv_channels", "linear_key_head_dim", "linear_value_head_dim", "d_kv", "dim_head"], 8
    ),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "global_head_dim"], 8),
    **dict.fromkeys(["swa_head_dim", "swa_v_head_dim", "mamba_head_dim", "conditional_head_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_head_dim", "rotary_dim_full"], 16),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff"], 64),
    **dict.fromkeys(["ffn_hidden_size", "dim_ff", "shared_intermediate_size", "intermediate_size_mlp", "d_inner"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "attention_hidden_size", "lru_width", "block_size_"], 32),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "zero_expert_num"], 1),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], WIDTH),
    **dict.fromkeys(["hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_length_"], 128),
    **dict.fromkeys(["max_source_positions", "context_length", "max_seq_len", "max_sequence_length"], 128),
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size", "time_step_rank"], 8),
    **dict.fromkeys(["sliding_window", "attention_window_size", "window_size", "local_window"], 16),
    **dict.fromkeys(["n_groups", "mamba_n_groups", "num_memory_blocks"], 1),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 16),
    **dict.fromkeys(["initializer_range", "init_std", "init_method_std"], 0.2),
    **dict.fromkeys(["pad_token_id", "padding_idx"], 0),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "decoder_start_token_id", "cls_token_id", "sep_token_id"], 0),
    **dict.fromkeys(["is_decoder"], True),
    **dict.fromkeys(["dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0),
    **dict.fromkeys(["activation_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "layerdrop"], 0.0),
    **dict.fromkeys(["decoder_layerdrop", "encoder_layerdrop", "hidden_dropout", "residual_dropout"], 0.0),
    **dict.fromkeys(["rope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["use_cache"], True),
}
# Where one family means something else by a name, or sizes have to fit each other
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "inkling2_text": {"unpadded_vocab_size": WIDTH},
    "inkling2_loop_text": {"unpadded_vocab_size": WIDTH},
    "llama4": {"pad_token_id": None},
    "mpt": {"attn_pdrop": 0},
    "ministral": {"head_dim": 8},
    "rembert": {"output_embedding_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "is_decoder": True,
        "hash_seed": 0,
        "local_attn_chunk_length": 16,
    },
    "xlm": {"emb_dim": 32, "n_words": WIDTH, "causal": True},
}


_MAMBA = ("mamba", "mamba2", "falcon_mamba")


class TooLong(Exception):
    """A family that takes too much time."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and 0 ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0, **{each: i for i, each in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def small_config(config_class: type[PretrainedConfig], own: dict[str, Any] | None = None) -> PretrainedConfig:
    """The config of a class, of which everything is made small that `SMALL` or `own` names, parts included."""
    default = config_class()
    given, own = default.to_dict(), own or {}
    computed = {name for name in given if isinstance(getattr(config_class, name, None), property)}
    values: dict[str, Any] = {}
    for name in default.sub_configs:
        if isinstance(part := given.get(name), dict):
            held = vars(default).get(name)
            part_class = type(held) if isinstance(held, PretrainedConfig) else CONFIG_MAPPING[part["model_type"]]
            values[name] = small_config(part_class, FAMILIES.get(part_class.model_type)).to_dict()
    names = {*given, *config_class.attribute_map} - computed
    for name, value in SMALL.items():
        usual = given.get(name, given.get(config_class.attribute_map.get(name, "")))
        if name in names and (usual is not None or name in ("pad_token_id", "eos_token_id")):
            values[name] = value
    heads, groups = given.get("num_attention_heads"), given.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and groups < heads:
        values["num_key_value_heads"] = 2
    kinds = None if "layer_types" in computed else given.get("layer_types")
    if isinstance(kinds, list | tuple) and kinds:
        layers = list(dict.fromkeys(kinds))
        layers = layers * 2 if len(layers) == 1 else layers
        values |= {"layer_types": layers, "num_hidden_layers": len(layers)}
        for name in names - {"layer_types"}:
            of_layers = given.get(name)
            if isinstance(of_layers, list | tuple) and len(of_layers) == len(kinds):
                values[name] = [of_layers[list(kinds).index(kind)] for kind in layers]
    # By its own name each, where another name stands for it as well
    values = {name: value for name, value in values.items() if config_class.attribute_map.get(name) not in values}
    return config_class(**{**values, **own})


def make_model(family: str, seed: int) -> PreTrainedModel:
    """A tiny random model of a family, whose distributions are neither flat nor sure."""
    config_class = CONFIG_MAPPING[family]
    config = small_config(config_class, FAMILIES.get(family))
    torch.manual_seed(seed)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    model = model_class(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > 30e6:
        raise ValueError(f"its default config does not become small: {count:,} parameters")
    # Some begin at nothing, and would say the same of every context
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.std() < 1e-6:
                parameter.normal_(std=0.1)
        head = model.get_output_embeddings()
        ids = torch.tensor([list(range(1, 9))])
        spread = model.eval()(input_ids=ids).logits[0, -1].float().std().item()
        if head is not None and spread > 0 and head.weight is not model.get_input_embeddings().weight:
            head.weight.mul_(min(max(2 / spread, 0.01), 100))
    return model.float().eval()


def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def loop(expert: PreTrainedModel, amateur: PreTrainedModel, prompts: list[list[int]], vocabulary: torch.Tensor):
    """Completions, divergences and labels as the method defines them: a context at a time."""
    rows = []
    for prompt in prompts:
        row: dict[str, list] = {"completion_ids": [], "kl_divergence": [], "labels": []}
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            logp, logq = (logits_of(each, ids)[-1][vocabulary].log_softmax(-1) for each in (expert, amateur))
            kl = (logp.exp() * (logp - logq)).sum().item()
            plausible = logp >= logp.max() + math.log(ALPHA)
            label = torch.where(plausible, logp - logq, -math.inf).softmax(-1)
            row["kl_divergence"].append(kl)
            row["labels"].append({vocabulary[i].item(): label[i].item() for i in plausible.nonzero()[:, 0].tolist()})
            token = vocabulary[logp.argmax()].item()
            row["completion_ids"].append(token)
            ids.append(token)
            if token == 0:
                break
        rows.append(row)
    return rows


def compare(sampled: Dataset, expected: list[dict[str, list]], what: str) -> list[str]:
    """What of a sampling is wrong."""
    faults: Counter[str] = Counter()
    worst = 0.0
    for row, right in zip(sampled, expected, strict=True):
        if row["completion_ids"] != right["completion_ids"]:
            faults["completions"] += 1
            continue
        errors = [abs(a - b) / max(b, 1e-2) for a, b in zip(row["kl_divergence"], right["kl_divergence"], strict=True)]
        worst = max([worst, *errors])
        faults["divergences"] += max(errors) > TOLERANCE
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            label = right["labels"][t]
            given = dict(zip(ids, probs, strict=True))
            if any(abs(given.get(i, 0) - label.get(i, 0)) > TOLERANCE for i in {*given, *label}):
                faults["labels"] += 1
                break
    return [
        f"{what}: {name} of {count} of {len(expected)} rows" + (f" by {worst:.1e}" if name == "divergences" else "")
        for name, count in faults.items()
        if count
    ]


def refusal(error: Exception) -> str | None:
    """The sentence of an error that the package raises by itself, or `None`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = any(name in frames[-1].filename for name in ("trl_lightreasoner", "/peft/", "/transformers/"))
    return str(error) if own and isinstance(error, ValueError | TypeError | ImportError) else None


def examine(family: str, folder: Path) -> tuple[str, str, list[float]]:
    """Result and reason of one family, and its losses before and after training, if it was trained."""
    tokenizer = make_tokenizer()
    try:
        expert, amateur = make_model(family, 0), make_model(family, 1)
        width = expert.config.get_text_config().vocab_size
        double = [copy.deepcopy(each).double() for each in (expert, amateur)]
        for each in double:
            each.config._experts_implementation = "eager"  # the others know no float64
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        vocabulary = torch.arange(len(tokenizer))
        expert.save_pretrained(folder / "expert")
        tokenizer.save_pretrained(folder / "expert")
    except TooLong:
        raise
    except Exception as error:
        return "cannot be built", f"{type(error).__name__}: {error}", []
    try:
        expected = loop(*double, prompts, vocabulary)
    except TooLong:
        raise
    except Exception:
        double = [expert, amateur]  # its code names float32
        try:
            expected = loop(*double, prompts, vocabulary)
        except Exception as error:
            return "cannot be built", f"its forward fails, {type(error).__name__}: {error}", []
    faults = []
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    for size in (1, 8):
        args = ContrastiveSamplingConfig(
            str(folder / f"steps-{size}"),
            alpha=ALPHA,
            beta=BETA,
            max_new_tokens=NEW_TOKENS,
            per_device_batch_size=size,
        )
        models_ = {"processing_class": tokenizer, "amateur_processing_class": tokenizer}
        steps = ContrastiveStepSampler(expert, amateur, args, **models_).sample(dataset)
        faults += compare(steps, expected, f"batch of {size}")
    sampler = ContrastiveStepSampler(expert, amateur, args, **models_)
    trajectories = [Trajectory(*ids) for ids in zip(steps["prompt_ids"], steps["completion_ids"], strict=True)]
    own = score_trajectories(expert, expert, trajectories, sampler.shared_vocabulary, ALPHA, BETA)
    if (largest := max(abs(kl) for row in own for kl in row.kl_divergence)) > 1e-5:
        faults.append(f"divergence from itself {largest:.1e}")
    of_training, trained = examine_training(folder, expert, double[0], tokenizer, steps, vocabulary)
    faults += of_training
    return ("silent", "; ".join(faults), trained) if faults else ("exact", f"{width} logits", trained)


def examine_training(
    folder: Path,
    expert: PreTrainedModel,
    double: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    steps: Dataset,
    vocabulary: torch.Tensor,
) -> tuple[list[str], list[float]]:
    """What of a training is wrong, and the loss before and after it on the rows that it reads."""
    faults = []
    losses = []
    for row in steps:
        logps = logits_of(double, [*row["prompt_ids"], *row["completion_ids"]])[:, vocabulary].log_softmax(-1)
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True):
            label = torch.tensor(probs).double()
            logq = logps[len(row["prompt_ids"]) + t - 1, torch.tensor(ids)]
            losses.append((torch.special.xlogy(label, label) - label * logq).sum().item())
    naive = sum(losses) / len(losses)
    args = LightReasonerConfig(
        str(folder / "adapter"),
        max_steps=UPDATES,
        beta=BETA,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=1,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    )
    head = expert.get_output_embeddings()
    linear = [name for name, part in expert.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]
    # PEFT refuses `out_proj` of some recurrent families
    without = [name for name in linear if name.rsplit(".", 1)[-1] != "out_proj"]
    linear = linear or "all-linear"  # of a class of its own, as GPT-2 has
    recurrent = hasattr(expert.config, "mamba_d_conv") or expert.config.model_type in (*_MAMBA, "nemotron_h")
    adapted = without if recurrent else linear
    trainer = LightReasonerTrainer(
        str(folder / "expert"),
        args,
        train_dataset=steps,
        eval_dataset=steps,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules=adapted, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    if not abs(before - naive) <= TOLERANCE * max(naive, 1e-2):
        faults.append(f"loss {before:.5f} before training, in the loop {naive:.5f}")
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    after = trainer.evaluate()["eval_loss"]
    # Nor need it fall: to whom a token is routed is no matter of gradients
    if len(logged) != UPDATES or not all(map(math.isfinite, [*logged, after])):
        faults.append(f"the losses of training are {logged}")
    trainer.save_model()
    trained = trainer.model.eval()
    ids = [*steps[1]["prompt_ids"], *steps[1]["completion_ids"]]
    right = logits_of(trained, ids)
    loaded = load_model(str(folder / "adapter")).eval()
    for name, model in (("loaded", loaded), ("merged", merge(loaded))):
        if (error := (logits_of(model, ids) - right).abs().max().item()) > TOLERANCE * right.std():
            faults.append(f"logits of the {name} model are off by {error:.1e}")
    return faults, [before, after]


def examine_in_time(family: str) -> tuple[str, str, list[float]]:
    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    folder = Path(tempfile.mkdtemp())
    try:
        return examine(family, folder)
    except TooLong:
        return "cannot be built", f"more than {SECONDS} s", []
    except Exception as error:
        if (sentence := refusal(error)) is not None:
            return "refused", sentence, []
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "fails", f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})", []
    finally:
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)


def as_table(results: dict[str, tuple[str, str, list[float]]]) -> str:
    """The results as Markdown."""
    counts = Counter(result for result, *_ in results.values())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft"))
    counted = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    exact = ", ".join(f"`{family}`" for family, (result, *_) in sorted(results.items()) if result == "exact")
    losses = {family: each for family, (*_, each) in sorted(results.items()) if each}
    rose = [f"`{family}` ({each[0]:.3g} to {each[1]:.3g})" for family, each in losses.items() if each[1] >= each[0]]
    lines = [f"{len(results)} families with {versions}: {counted}.", "", f"Exact: {exact}.", ""]
    lines += [f"The loss fell in {len(losses) - len(rose)} of {len(losses)}; not in: {', '.join(rose) or 'none'}.", ""]
    lines += ["| family | result | why |", "|---|---|---|"]
    for family, (result, reason, _) in sorted(results.items()):
        if result != "exact":
            why = re.sub(rf"{re.escape(tempfile.gettempdir())}[^\s']+", "FOLDER", " ".join(reason.split()))
            why = why.replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{family}` | {result} | {why[:220].rstrip()}{'...' if len(why) > 220 else ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for results.json and table.md.")
    parser.add_argument("--families", nargs="+", help="Model types; by default all that are causal.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for family in args.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if family in results and not args.families:
            continue
        results[family] = examine_in_time(family)
        result, reason, losses = results[family]
        trained = ", loss {:.4g} to {:.4g}".format(*losses) if losses else ""
        print(f"{family}: {result}: {reason[:400]}{trained}", flush=True)
        path.write_text(json.dumps(results, indent=1))
        (args.output_dir / "table.md").write_text(as_table(results))


if __name__ == "__main__":
    main()
