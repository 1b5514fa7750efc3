"""Settings that do not go together, and the sentence that names both. No weights are loaded to find them."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.training.combinations import (
    check_combinations,
    check_metric,
    check_trained_weights,
    fsdp_version,
)

from ..conftest import make_model


FSDP1 = {"ACCELERATE_USE_FSDP": "true"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ALL_WEIGHTS = (
    r"`load_in_{}bit` cannot be combined with training all weights: quantized weights cannot be updated\. Train an "
    r"adapter \(`peft_config`; `--use_peft true` on the command line\), or load the model unquantized\."
)
FP16 = r"`fp16` cannot be combined with `load_in_{}bit`, whose adapter is trained in bfloat16\. Set `bf16` instead\."
STORAGE = (
    r"`load_in_4bit` works with FSDP{0} only if `bnb_4bit_quant_storage` is {1}, got {2}\. Change it, or launch with "
    r"DDP\."
)
INT8 = (
    r"`load_in_8bit` cannot be combined with FSDP, which cannot split 8-bit weights\. Launch with DDP, or set "
    r"`load_in_4bit`, and `bnb_4bit_quant_storage` to float32\."
)
HALF = r".* cannot be combined with training all weights in {}\. Remove `dtype` to train in float32, or set `bf16`\."
STORED = "--bnb_4bit_quant_storage"


@pytest.fixture
def environment(monkeypatch):
    def set_environment(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_environment


@pytest.fixture
def unloadable(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("weights were loaded before the mistake was found")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("flags", "variables", "sentence"),
    [
        (["--load_in_4bit", "--use_peft", "false"], {}, ALL_WEIGHTS.format(4)),
        (["--load_in_8bit", "--use_peft", "false"], {}, ALL_WEIGHTS.format(8)),
        (["--load_in_4bit", "--fp16"], {}, FP16.format(4)),
        (["--load_in_8bit", "--fp16"], {}, FP16.format(8)),
        (["--load_in_4bit"], {"ACCELERATE_MIXED_PRECISION": "fp16"}, FP16.format(4)),
        (["--use_peft", "false", "--dtype", "float16", "--fp16"], {}, HALF.format("float16")),
        (["--use_peft", "false", "--dtype", "bfloat16", "--fp16"], {}, HALF.format("bfloat16")),
        (["--load_in_8bit"], FSDP1, INT8),
        (["--load_in_8bit"], FSDP2, INT8),
        (["--load_in_4bit"], FSDP1, STORAGE.format(1, "float32", "uint8")),
        (["--load_in_4bit", STORED, "bfloat16"], FSDP1, STORAGE.format(1, "float32", "bfloat16")),
        (["--load_in_4bit"], FSDP2, STORAGE.format(2, "float32", "uint8")),
        (["--load_in_4bit", STORED, "bfloat16"], FSDP2, STORAGE.format(2, "float32", "bfloat16")),
        (["--load_in_4bit", "--fsdp"], {}, STORAGE.format(2, "float32", "uint8")),
        (
            ["--use_liger_kernel"],
            {},
            "`use_liger_kernel` needs a GPU. Remove it.",
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused_in_one_sentence(
    flags, variables, sentence, environment, unloadable, expert_path, steps, tmp_path, capsys
):
    if "--load_in_4bit" in flags or "--load_in_8bit" in flags:
        pytest.importorskip("bitsandbytes")
    environment(variables)
    steps.to_parquet(tmp_path / "steps.parquet")
    argv = ["train", "--model_name_or_path", expert_path, "--dataset_name", str(tmp_path / "steps.parquet")]
    assert main([*argv, "--output_dir", str(tmp_path / "out"), "--use_cpu", *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightreasoner")]
    # Where settings are flags
    assert re.fullmatch(f"lightreasoner train: error: {sentence}", re.sub("`--(?!use_peft)", "`", line))


def test_the_same_in_python(environment, unloadable, expert_path, steps, tmp_path):
    pytest.importorskip("bitsandbytes")
    environment(FSDP2)
    with pytest.raises(ValueError, match=f"^{STORAGE.format(2, 'float32', 'bfloat16')}$"):
        LightReasonerTrainer(
            expert_path,
            LightReasonerConfig(str(tmp_path), use_cpu=True),
            train_dataset=steps,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"}


@pytest.mark.parametrize(
    ("settings", "variables", "quantization", "dtype", "adapter"),
    [
        ({}, FSDP2, NF4, "bfloat16", True),
        ({}, FSDP1, {**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "bfloat16", True),
        ({}, {}, {"load_in_4bit": True}, "bfloat16", True),
        ({}, {}, {"load_in_8bit": True}, "bfloat16", True),
        ({}, FSDP2, None, "bfloat16", True),
        ({}, FSDP2, {"quant_method": "gptq", "bits": 4}, "float16", True),
        ({"fp16": True}, {}, None, "bfloat16", True),  # PEFT keeps an adapter in float32
        ({"fp16": True}, {}, None, torch.float32, False),
        ({}, {}, None, torch.bfloat16, False),
    ],
)
def test_what_goes_together_is_not_refused(settings, variables, quantization, dtype, adapter, environment, tmp_path):
    environment(variables)
    check_combinations(LightReasonerConfig(str(tmp_path), use_cpu=True, **settings), quantization, dtype, adapter)


LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_fp16_without_a_gpu_is_told(precision, tmp_path, caplog, propagated_logs):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, **{precision: True})
    check_combinations(args, None, None, adapter=True)
    assert ("`fp16` needs a GPU" in caplog.text) == (precision == "fp16")


def test_several_processes_must_make_equal_numbers_of_batches(tmp_path, monkeypatch):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, accelerator_config={"even_batches": False})
    check_combinations(args, None, None, adapter=True)
    monkeypatch.setattr(LightReasonerConfig, "world_size", 2)
    with pytest.raises(ValueError, match="^`accelerator_config` cannot have `even_batches: false` with several proc"):
        check_combinations(args, None, None, adapter=True)
    check_combinations(LightReasonerConfig(str(tmp_path), use_cpu=True), None, None, adapter=True)


@pytest.mark.parametrize(
    ("adapter", "weight"),
    [
        (None, "model.embed_tokens.weight"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.modules_to_save.default.weight"),
        ({"bias": "lora_only"}, r"base_model\..*\.base_layer\.bias"),
        ({"autocast_adapter_dtype": False}, r"base_model\..*\.lora_A\.default\.weight"),
    ],
    ids=["all weights", "modules_to_save", "bias", "adapter"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp16_takes_trained_weights_in_float32_only(adapter, weight, dtype, expert, steps, tmp_path):
    model = expert.to(dtype)
    if adapter is not None:
        casts = adapter.pop("autocast_adapter_dtype", True)
        model = get_peft_model(model, LoraConfig(**LORA, **adapter), autocast_adapter_dtype=casts)
        adapter |= {} if casts else {"autocast_adapter_dtype": False}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"^`fp16` cannot be combined with trained weights in {name}, such as {weight}\. Load"
    ):
        args = LightReasonerConfig(str(tmp_path), use_cpu=True, fp16=True)
        LightReasonerTrainer(model, args, train_dataset=steps)


def test_fsdp2_takes_trained_weights_of_one_dtype_unless_accelerate_casts_them(environment, expert, tmp_path):
    model = get_peft_model(expert.to(torch.bfloat16), LoraConfig(**LORA, bias="lora_only"))
    plain, cast = (LightReasonerConfig(str(tmp_path), use_cpu=True, bf16=bf16) for bf16 in (False, True))
    check_trained_weights(plain, model)
    environment(FSDP2)
    check_trained_weights(cast, model)
    for args, is_quantized in ((plain, False), (cast, True)):  # as DoRA's magnitudes on 4 bits
        model.is_loaded_in_4bit = is_quantized
        with pytest.raises(ValueError, match="^FSDP2 needs all trained weights in one dtype, but .* Remove"):
            check_trained_weights(args, model)


@pytest.mark.parametrize(
    ("metric", "sets", "has_questions"),
    [("accuracy", [""], False), ("eval_loss", [], True), ("loss", ["a", "b"], False), ("f1", [""], True)],
)
def test_a_metric_that_is_not_evaluated_is_refused(metric, sets, has_questions, tmp_path):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", metric_for_best_model=metric)
    with pytest.raises(ValueError, match=f"^`metric_for_best_model` must be .* got '{metric}'. Choose from .*"):
        check_metric(args, sets, has_questions, adapter=True)


def test_a_metric_is_that_of_a_subclass(expert, steps, tmp_path):
    class Measuring(LightReasonerTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_f1"] = 1.0
            return output

    settings = {"eval_strategy": "steps", "max_steps": 1, "eval_steps": 1, "report_to": "none"}
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, metric_for_best_model="f1", **settings)
    with pytest.raises(ValueError, match="`metric_for_best_model`"):
        LightReasonerTrainer(expert, args, train_dataset=steps, eval_dataset=steps)
    trainer = Measuring(expert, args, train_dataset=steps, eval_dataset=steps)
    trainer.train()
    assert trainer.state.best_metric == 1.0


def test_every_metric_that_is_known_is_evaluated(expert, steps, tmp_path):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = LightReasonerTrainer(
        expert, args, train_dataset=steps, eval_dataset=steps, peft_config=LoraConfig(**LORA)
    )
    metrics = trainer.evaluate()
    for name in metrics:
        args = LightReasonerConfig(
            str(tmp_path), use_cpu=True, eval_strategy="steps", metric_for_best_model=name, report_to="none"
        )
        if name not in ("epoch", "eval_model_preparation_time"):
            check_metric(args, [""], has_questions=False, adapter=True)


def test_ddp_does_not_search_for_unused_weights(tmp_path):
    assert LightReasonerConfig(str(tmp_path), use_cpu=True).ddp_find_unused_parameters is False


def test_deepspeed_scales_gradients_of_fp16_itself(tmp_path, monkeypatch):
    args = LightReasonerConfig(str(tmp_path), use_cpu=True, fp16=True)
    with pytest.raises(ValueError, match=FP16.format(4)):
        check_combinations(args, {"load_in_4bit": True}, "float16", adapter=True)
    monkeypatch.setattr(args, "deepspeed_plugin", object())
    check_combinations(args, {"load_in_4bit": True}, "float16", adapter=True)


def test_fsdp_is_found_wherever_it_was_asked_for(environment, tmp_path):
    assert fsdp_version(LightReasonerConfig(str(tmp_path), use_cpu=True)) is None
    assert fsdp_version(LightReasonerConfig(str(tmp_path), use_cpu=True, fsdp=True)) == 2
    settings = {"fsdp": True, "fsdp_config": {"version": 1}}
    assert fsdp_version(LightReasonerConfig(str(tmp_path), use_cpu=True, **settings)) == 1
    environment(FSDP2)
    assert fsdp_version(LightReasonerConfig(str(tmp_path), use_cpu=True)) == 2
    environment({"ACCELERATE_USE_FSDP": "false"})
    assert fsdp_version(LightReasonerConfig(str(tmp_path), use_cpu=True)) is None


def test_fsdp2_does_not_cast_4_bit_weights(tokenizer, steps, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    make_model(tokenizer, hidden_size=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def policy_of(quantization_config: BitsAndBytesConfig | None) -> str | None:
        args = LightReasonerConfig(str(tmp_path), use_cpu=True)
        Accelerator(cpu=True)
        plugin = SimpleNamespace(mixed_precision_policy="bf16", activation_checkpointing=False)
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
        LightReasonerTrainer(
            str(tmp_path / "model"),
            args,
            train_dataset=steps,
            quantization_config=quantization_config,
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
        return plugin.mixed_precision_policy

    # accelerate has no FSDP2 on a CPU
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    assert policy_of(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")) is None
    assert policy_of(None) == "bf16"


def test_liger_kernels_leave_the_forward_alone(expert, steps, tmp_path, monkeypatch):
    applied = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config))
    monkeypatch.setattr("trl_lightreasoner.training.adapters.check_combinations", lambda *args: None)
    settings = {"use_cpu": True, "max_steps": 1, "use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
    args = LightReasonerConfig(str(tmp_path), report_to="none", **settings)
    LightReasonerTrainer(expert, args, train_dataset=steps).train()
    assert applied == [{"rope": False, "fused_linear_cross_entropy": False}]
    assert args.liger_kernel_config == {"rope": False}
