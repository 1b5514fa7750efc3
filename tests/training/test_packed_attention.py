import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import scaled_dot_product_attention
from transformers import MistralConfig, MistralForCausalLM

from trl_lightreasoner import DataCollatorForLightReasoner, LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.training import packed_attention

from ..conftest import make_model


def naive_varlen_attn(query, key, value, begins, begins_k, longest, longest_k, scale=None, **kwargs):
    """Attention of each sequence for itself: `(N, H, D)`, with fewer heads of keys and values."""
    assert torch.equal(begins, begins_k) and longest == longest_k >= int(begins.diff().max())
    outputs = []
    for first, stop in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        states = (each[None, first:stop].transpose(1, 2) for each in (query, key, value))
        attended = scaled_dot_product_attention(*states, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def naive(monkeypatch):
    pytest.importorskip("torch.nn.attention.varlen", reason="needs PyTorch 2.10")
    monkeypatch.setattr(packed_attention, "varlen_attn", naive_varlen_attn)


def make_trainer(model, tokenizer, steps, tmp_path, packs, **kwargs):
    settings = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "max_steps": 2}
    trainer = LightReasonerTrainer(
        model,
        args=LightReasonerConfig(str(tmp_path), bf16=False, per_device_train_batch_size=3, **settings),
        train_dataset=steps,
        processing_class=tokenizer,
        **kwargs,
    )
    trainer._packs = packs  # on a CPU it would not
    return trainer


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_packed_batch_has_the_loss_and_the_gradient_of_a_padded_one(
    tokenizer, steps, tmp_path, naive, padding_side, adapter
):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    batch = DataCollatorForLightReasoner(padding_side=padding_side)(list(steps.select(range(4))))
    assert not batch["attention_mask"].all()
    results = []
    for packs in (False, True):
        torch.manual_seed(0)
        model = make_model(tokenizer)
        trainer = make_trainer(
            model, tokenizer, steps, tmp_path, packs, **({"peft_config": peft_config} if adapter else {})
        )
        shapes = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        loss = trainer.training_step(trainer.model, dict(batch), batch["step_mask"].sum())
        assert shapes == [(1, int(batch["attention_mask"].sum()))] if packs else [tuple(batch["input_ids"].shape)]
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        results.append((loss, torch.cat([parameter.grad.flatten() for parameter in trained])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_evaluation_of_packed_batches_is_the_same(tokenizer, steps, tmp_path, naive):
    metrics = []
    for packs in (False, True):
        trainer = make_trainer(make_model(tokenizer), tokenizer, steps, tmp_path, packs, eval_dataset=steps)
        metrics.append(trainer.evaluate())
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5)


def test_training_leaves_the_attention_of_the_model_as_it_was(tokenizer, steps, tmp_path, naive):
    model = make_model(tokenizer)
    make_trainer(model, tokenizer, steps, tmp_path, packs=True).train()
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_run_again_in_the_backward_pass_are_packed_too(tokenizer, steps, tmp_path, naive):
    model = make_model(tokenizer)
    trainer = make_trainer(model, tokenizer, steps, tmp_path, packs=True)
    batch = DataCollatorForLightReasoner()(list(steps.select(range(4))))
    expected = trainer.training_step(trainer.model, dict(batch), batch["step_mask"].sum())
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss = trainer.training_step(trainer.model, dict(batch), batch["step_mask"].sum())
    torch.testing.assert_close((loss, model.lm_head.weight.grad), (expected, gradient))


def test_a_call_of_compute_loss_alone_takes_a_padded_batch(tokenizer, steps, tmp_path, naive):
    batch = DataCollatorForLightReasoner()(list(steps.select(range(4))))
    padded, alone = (make_trainer(make_model(tokenizer), tokenizer, steps, tmp_path, packs) for packs in (False, True))
    assert torch.equal(alone.compute_loss(alone.model, batch), padded.compute_loss(padded.model, batch))


@pytest.mark.parametrize(
    "settings", [{"attn_implementation": "eager"}, {"attention_dropout": 0.1}], ids=["eager", "dropout"]
)
def test_attention_that_cannot_be_packed_is_told(tokenizer, naive, settings):
    assert packed_attention.can_pack(make_model(tokenizer))
    assert not packed_attention.can_pack(make_model(tokenizer, **settings))


def test_windows_of_attention_are_not_packed(naive):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=99, num_key_value_heads=2, sliding_window=8, **shape))
    assert not packed_attention.can_pack(model)


def test_an_older_pytorch_packs_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(packed_attention, "varlen_attn", None)
    assert not packed_attention.can_pack(make_model(tokenizer))
