"""Models in 4 and 8 bits: bitsandbytes runs on a CPU too, with layers whose sizes are multiples of 64."""

import importlib.util
import json
import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    LightReasonerConfig,
    LightReasonerTrainer,
    sampling_metadata,
)
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.models.weights import settle_4bit_layers
from trl_lightreasoner.sampling import branches
from trl_lightreasoner.sampling.branches import BranchedRows
from trl_lightreasoner.sampling.scoring import Trajectory

from ..conftest import QUESTIONS, make_model


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


def nf4(**kwargs) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**NF4, **kwargs)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tokenizer) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("quantization")
    for name, seed, dtype in (("expert", 0, "float32"), ("amateur", 1, "float32"), ("expert-bf16", 0, "bfloat16")):
        make_model(tokenizer, seed, hidden_size=64).to(getattr(torch, dtype)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def sampler(paths, tmp_path):
    """A sampler of a few short completions."""

    def make(expert=None, amateur=None, args=None, **kwargs) -> ContrastiveStepSampler:
        args = {"max_new_tokens": 6, "beta": 0.5, **(args or {})}
        args = ContrastiveSamplingConfig(str(tmp_path / "steps"), **args)
        return ContrastiveStepSampler(expert or paths["expert"], amateur or paths["amateur"], args, **kwargs)

    return make


@pytest.fixture
def trainer(tmp_path):
    def make(model, dataset, quantization_config=None, peft_config=None, **kwargs) -> LightReasonerTrainer:
        kwargs = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", **kwargs}
        return LightReasonerTrainer(
            model,
            LightReasonerConfig(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, report_to="none", **kwargs),
            train_dataset=dataset,
            eval_dataset=dataset,
            quantization_config=quantization_config,
            peft_config=peft_config or LoraConfig(**LORA),
        )

    return make


@pytest.fixture
def repacking(monkeypatch):
    """Every CPU as one that bitsandbytes would repack the weights for."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.fixture
def load_4bit(paths):
    """The expert as a user loads it."""
    return partial(AutoModelForCausalLM.from_pretrained, paths["expert"], quantization_config=nf4(), dtype="auto")


def layers_of(model, kind: str = "Linear4bit") -> list[torch.nn.Module]:
    import bitsandbytes

    return [module for module in model.modules() if type(module) is getattr(bitsandbytes.nn, kind)]


def repacks(model) -> set[bool]:
    return {bool(layer.support_avx512bf16_for_cpu) for layer in layers_of(model)}


def gradients_of(trainer) -> dict[str, torch.Tensor]:
    """Of the first batch, in the order of the dataset."""
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return gradients


# Sampling


@needs_bitsandbytes
@torch.no_grad()
def test_branches_of_a_model_in_4_bits_are_read_like_whole_contexts(paths):
    kwargs = {**NF4, "bnb_4bit_compute_dtype": "float32"}
    model = load_model(paths["amateur"], dtype="float32", quantization_config=BitsAndBytesConfig(**kwargs)).eval()
    rows = BranchedRows(model, [Trajectory([5, 6, 7], [8, 9, 10, 11, 0]), Trajectory([5, 9], [8, 0])], nullcontext)
    contexts = [(0, (8, 3)), (0, (8, 9, 10, 11, 12)), (1, (7, 7, 7)), (0, (1,)), (1, (8, 5))]
    for place, logits in [*rows.after(contexts), *rows.after(contexts)]:
        row, context = contexts[place]
        alone = model(torch.tensor([[*rows.rows[row].prompt_ids, *context]])).logits[0, -1]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    assert branches._READS_BRANCHES[model]


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("quantization", "kind", "described"),
    [
        (NF4, "Linear4bit", {"load_in_4bit": "True", "bnb_4bit_quant_type": "nf4"}),
        ({"load_in_8bit": True}, "Linear8bitLt", {"load_in_8bit": "True"}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "amateur_"])
def test_either_model_can_be_quantized(prefix, quantization, kind, described, sampler, prompts):
    made = sampler(**{f"{prefix}quantization_config": BitsAndBytesConfig(**quantization)})
    dataset = made.sample(prompts)
    quantized, other = (made.amateur, made.expert) if prefix else (made.expert, made.amateur)
    assert len(layers_of(quantized, kind)) == 14 and not layers_of(other, kind)
    metadata = sampling_metadata(dataset)
    quantized, other = ("amateur", "expert") if prefix else ("expert", "amateur")
    assert described.items() <= metadata[quantized]["quantization"].items()
    assert metadata[other]["quantization"] is None


@needs_bitsandbytes
def test_a_quantized_expert_is_sampled_by_path_as_the_object_is(sampler, load_4bit, prompts, tmp_path):
    by_path = sampler(quantization_config=nf4(), args={"beta": 0}).sample(prompts)
    args = ContrastiveSamplingConfig(str(tmp_path / "other"), max_new_tokens=6, beta=0)
    by_object = ContrastiveStepSampler(load_4bit(), sampler().amateur, args).sample(prompts)
    for column in ("completion_ids", "kl_divergence", "label_ids", "label_probs"):
        assert by_path[column] == by_object[column]


@needs_bitsandbytes
def test_an_adapter_is_sampled_on_a_quantized_base(sampler, load_4bit, prompts, tmp_path):
    model = get_peft_model(load_4bit(), LoraConfig(**LORA, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    made = sampler(str(tmp_path / "adapter"), quantization_config=nf4())
    made.sample(prompts)
    assert isinstance(made.expert, PeftModel) and len(layers_of(made.expert)) == 14


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("expert", "auto", torch.float32),
        ("expert-bf16", "auto", torch.bfloat16),
        ("expert", "bfloat16", torch.bfloat16),
        ("expert-bf16", "float32", torch.float32),
    ],
)
def test_what_is_not_quantized_has_the_dtype_of_an_unquantized_model(name, dtype, expected, paths):
    model = load_model(paths[name], dtype=dtype, quantization_config=nf4())
    # In 4-bit layers the bias takes part in their own computation
    rest = {name: p.dtype for name, p in model.named_parameters() if "proj" not in name}
    assert set(rest.values()) == {expected} == {model.dtype} and "model.norm.weight" in rest
    assert {layer.bias.dtype for layer in layers_of(model) if layer.bias is not None} == {torch.bfloat16}


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", [NF4, {"load_in_8bit": True}])
def test_a_quantized_model_that_was_used_goes_on_in_the_same_folder(quantization, sampler, prompts, caplog):
    made = sampler(quantization_config=BitsAndBytesConfig(**quantization))
    first = made.sample(prompts)
    assert made.sample(prompts)[:] == first[:]
    assert "Resuming: all 6 prompts are already sampled." in caplog.text


@needs_bitsandbytes
def test_another_quantization_in_the_same_folder_is_refused(sampler, prompts):
    sampler().sample(prompts)
    with pytest.raises(ValueError, match="expert weights"):
        sampler(quantization_config=nf4()).sample(prompts)


@pytest.mark.parametrize("prefix", ["", "amateur_"])
def test_quantization_set_in_two_places_is_refused(prefix, sampler):
    with pytest.raises(ValueError, match=f"You set `{prefix}quantization_config` both as a sampler argument"):
        sampler(
            args={f"{prefix}model_init_kwargs": {"quantization_config": NF4}},
            **{f"{prefix}quantization_config": nf4()},
        )


@pytest.mark.parametrize("prefix", ["", "amateur_"])
def test_quantization_of_a_loaded_model_is_said_to_be_ignored(prefix, sampler, paths, caplog):
    name = "amateur" if prefix else "expert"
    model = AutoModelForCausalLM.from_pretrained(paths[name])
    with caplog.at_level(logging.WARNING):
        sampler(**{name: model, f"{prefix}quantization_config": nf4()})
    assert f"The `{prefix}quantization_config` will be ignored." in caplog.text


def test_the_trainer_says_that_quantization_of_a_loaded_model_is_ignored(trainer, expert, steps, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(expert, steps, quantization_config=nf4())
    assert "You passed `quantization_config` to the trainer, but your model is already instantiated." in caplog.text


# Without bitsandbytes


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    """Nor may any model be loaded before it is missed."""
    monkeypatch.setattr("trl_lightreasoner.models.loading.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)


MISSED = "in 4 or 8 bits needs bitsandbytes: `pip install 'trl-lightreasoner.quantization.'`."


@pytest.mark.parametrize("prefix", ["", "amateur_"])
@pytest.mark.parametrize("quantization", [NF4, {"load_in_8bit": True}])
def test_the_sampler_says_how_to_install_bitsandbytes(prefix, quantization, without_bitsandbytes, sampler):
    with pytest.raises(ImportError, match=f"Loading the {prefix[:-1] or 'expert'} {MISSED}"):
        sampler(**{f"{prefix}quantization_config": BitsAndBytesConfig(**quantization)})


def test_the_trainer_says_how_to_install_bitsandbytes(without_bitsandbytes, trainer, paths, steps):
    with pytest.raises(ImportError, match=f"Loading the model {MISSED}"):
        trainer(paths["expert"], steps, quantization_config=nf4())


def test_settings_for_from_pretrained_miss_bitsandbytes_too(without_bitsandbytes, sampler):
    with pytest.raises(ImportError, match=MISSED):
        sampler(args={"model_init_kwargs": {"quantization_config": NF4}})


def test_a_checkpoint_in_4_bits_misses_bitsandbytes_too(without_bitsandbytes, sampler, tokenizer, paths, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    config = json.loads(open(f"{paths['expert']}/config.json").read())
    settings = {"quant_method": "bitsandbytes", **NF4}
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ImportError, match=MISSED):
        sampler(str(tmp_path / "saved"))


# Weights that a forward pass would repack


@needs_bitsandbytes
def test_a_model_loaded_by_path_is_not_repacked(repacking, paths):
    assert repacks(load_model(paths["expert"], quantization_config=nf4())) == {False}


@needs_bitsandbytes
def test_the_base_of_an_adapter_loaded_by_path_is_not_repacked(repacking, load_4bit, tmp_path):
    get_peft_model(load_4bit(), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    assert repacks(load_model(str(tmp_path / "adapter"), quantization_config=nf4())) == {False}


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["expert", "amateur"])
def test_sampling_does_not_repack_a_model(name, repacking, sampler, load_4bit, prompts):
    model = load_4bit()
    assert repacks(model) == {True}
    sampler(**{name: model}).sample(prompts)
    assert repacks(model) == {False}


@needs_bitsandbytes
def test_the_trainer_does_not_repack_a_model(repacking, trainer, load_4bit, steps):
    model = load_4bit()
    assert repacks(model) == {True}
    assert repacks(trainer(model, steps).model) == {False}


@needs_bitsandbytes
def test_a_repacked_model_is_refused(repacking, load_4bit, sampler, trainer, steps, prompts):
    model = load_4bit()
    layers_of(model)[0].weight.quant_state.packing_format_for_cpu = True  # as the forward pass leaves it
    for use in (lambda: sampler(model).sample(prompts), lambda: trainer(model, steps)):
        with pytest.raises(ValueError, match="were repacked for inference on this CPU.*Load it again"):
            use()


@needs_bitsandbytes
def test_a_forward_pass_changes_no_weight(load_4bit):
    model = settle_4bit_layers(load_4bit())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(torch.tensor([[1, 2, 3]]))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)


# Training


@needs_bitsandbytes
def test_a_model_that_was_sampled_is_trained_as_one_loaded_anew(repacking, sampler, trainer, load_4bit, prompts):
    model = load_4bit()
    dataset = sampler(model).sample(prompts)
    sampled, anew = gradients_of(trainer(model, dataset)), gradients_of(trainer(load_4bit(), dataset))
    assert sampled.keys() == anew.keys() and any(gradient.any() for gradient in sampled.values())
    assert all(torch.equal(sampled[name], anew[name]) for name in sampled)


@needs_bitsandbytes
def test_training_a_model_that_was_sampled_brings_its_loss_down(sampler, trainer, load_4bit, prompts):
    model = load_4bit()
    made = trainer(model, sampler(model).sample(prompts), max_steps=20)
    before = made.evaluate()["eval_loss"]
    made.train()
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    assert len(losses) == 20 and torch.tensor(losses).isfinite().all()
    assert made.evaluate()["eval_loss"] < 0.8 * before


@needs_bitsandbytes
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_a_quantized_model_is_trained_in_bfloat16(dora, trainer, paths, steps):
    made = trainer(paths["expert"], steps, nf4(), LoraConfig(**LORA, use_dora=dora))
    dtypes = {name: p.dtype for name, p in made.model.named_parameters() if p.requires_grad}
    magnitudes = {name for name in dtypes if "lora_magnitude_vector" in name}
    assert {dtypes[name] for name in dtypes.keys() - magnitudes} == {torch.bfloat16}
    assert {dtypes[name] for name in magnitudes} == ({torch.float32} if dora else set())


@needs_bitsandbytes
def test_gradient_checkpointing_trains_the_same_adapter(trainer, paths, steps):
    adapters = []
    for checkpointing in (False, True):
        made = trainer(paths["expert"], steps, nf4(), gradient_checkpointing=checkpointing)
        made.train()
        assert made.model.is_gradient_checkpointing is checkpointing
        adapters.append({name: p for name, p in made.model.named_parameters() if p.requires_grad})
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@needs_bitsandbytes
def test_a_saved_adapter_gives_the_logits_of_the_trained_model(repacking, trainer, paths, steps, tmp_path):
    made = trainer(paths["expert"], steps, nf4())
    made.evaluate()
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    loaded = load_model(str(tmp_path / "adapter"), quantization_config=nf4())
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:  # PEFT loads them into float32
            parameter.data = parameter.data.to(torch.bfloat16)
    ids = torch.tensor([steps[0]["prompt_ids"]])
    with torch.no_grad():
        trained, again = (model.eval()(ids).logits for model in (made.model, loaded))
        with made.model.disable_adapter():
            untrained = made.model(ids).logits
    assert torch.equal(trained, again)
    assert not torch.allclose(trained, untrained, atol=0.1)


@needs_bitsandbytes
def test_all_weights_of_a_quantized_model_cannot_be_trained(paths, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="quantized"):
        LightReasonerTrainer(paths["expert"], args, train_dataset=steps, quantization_config=nf4())


# On the command line


@pytest.fixture
def sample(paths, tmp_path):
    Dataset.from_dict({"prompt": QUESTIONS}).to_json(tmp_path / "prompts.jsonl")

    def run(*flags) -> int:
        argv = ["--expert", paths["expert"], "--amateur", paths["amateur"], "--max_new_tokens", "4", "--beta", "0.1"]
        files = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "steps")]
        return main(["sample", *argv, *files, *flags])

    return run


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("flags", "expert", "amateur"),
    [
        (["--load_in_4bit"], {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, None),
        (["--load_in_8bit"], {"load_in_8bit": "True"}, None),
        (["--amateur_load_in_4bit"], None, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}),
        (["--amateur_load_in_8bit"], None, {"load_in_8bit": "True"}),
        (
            ["--load_in_4bit", "--amateur_load_in_4bit", "--use_bnb_nested_quant"],
            {"bnb_4bit_use_double_quant": "True"},
            {"bnb_4bit_use_double_quant": "True"},
        ),
        (["--load_in_4bit", "--dtype", "float16"], {"bnb_4bit_compute_dtype": "float16"}, None),
    ],
)
def test_flags_quantize_either_model(flags, expert, amateur, sample, tmp_path):
    assert sample(*flags) == 0
    metadata = sampling_metadata(load_dataset(str(tmp_path / "steps"), split="train"))
    for name, expected in (("expert", expert), ("amateur", amateur)):
        quantization = metadata[name]["quantization"]
        assert quantization is None if expected is None else expected.items() <= quantization.items()


@needs_bitsandbytes
@pytest.mark.parametrize(
    "flags",
    [
        ["--load_in_4bit"],
        ["--load_in_8bit"],
        ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant"],
    ],
)
def test_sample_tells_how_to_train_a_quantized_expert(flags, sample, tmp_path, capsys):
    assert sample(*flags) == 0
    assert f"--dataset_name {tmp_path / 'steps'} {' '.join(flags)} --output_dir" in capsys.readouterr().out


@needs_bitsandbytes
def test_what_is_sampled_in_4_bits_is_trained_in_4_bits_without_a_warning(sample, paths, tmp_path, caplog):
    assert sample("--load_in_4bit") == 0
    files = ["--dataset_name", str(tmp_path / "steps"), "--output_dir", str(tmp_path / "adapter")]
    flags = ["--load_in_4bit", "--use_cpu", "--max_steps", "2", "--report_to", "none"]
    assert main(["train", "--model_name_or_path", paths["expert"], *files, *flags]) == 0
    assert not [record for record in caplog.records if record.name.startswith("trl_lightreasoner")]
    model = load_model(str(tmp_path / "adapter"), quantization_config=nf4())
    assert isinstance(model, PeftModel) and len(layers_of(model)) == 14


@pytest.mark.parametrize("prefix", ["", "amateur_"])
def test_4_and_8_bits_together_are_refused(prefix, sample, capsys):
    assert sample(f"--{prefix}load_in_4bit", f"--{prefix}load_in_8bit") == 2
    stderr = capsys.readouterr().err
    assert f": error: `--{prefix}load_in_4bit` and `--{prefix}load_in_8bit` cannot be combined.\n" in stderr


def test_the_commands_say_how_to_install_bitsandbytes(without_bitsandbytes, sample, paths, steps, tmp_path, capsys):
    steps.to_parquet(tmp_path / "steps.parquet")
    files = ["--dataset_name", str(tmp_path / "steps.parquet"), "--output_dir", str(tmp_path / "adapter")]
    assert sample("--load_in_4bit") == 2
    assert main(["train", "--model_name_or_path", paths["expert"], *files, "--load_in_4bit", "--use_cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 2 and all(line.endswith("`pip install 'trl-lightreasoner[quantization]'`.") for line in lines)
