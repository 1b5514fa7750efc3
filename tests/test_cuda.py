"""What runs on a CUDA GPU only: captured graphs, packed attention and the fused kernel, against their naive twins."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback

from trl_lightreasoner import (
    ContrastiveSamplingConfig,
    ContrastiveStepSampler,
    DataCollatorForLightReasoner,
    LightReasonerConfig,
    LightReasonerTrainer,
)
from trl_lightreasoner.contrast import NonFiniteLogitsError, contrast_steps, step_divergence
from trl_lightreasoner.fused_divergence import can_fuse, compile_ahead, fused_divergence
from trl_lightreasoner.generation.cuda_graphs import (
    complete_in_slots,
    generate_greedy_by_graph,
    why_by_mask,
    why_no_graph,
)
from trl_lightreasoner.generation.greedy import cut_after_eos, generate_greedy
from trl_lightreasoner.generation.row_attention import row_attention_forward, row_bounds, why_no_row_attention
from trl_lightreasoner.generation.row_cache import rows_that_fit
from trl_lightreasoner.models.loading import load_model
from trl_lightreasoner.vocabulary import model_vocabulary

from .conftest import QUESTIONS, make_model, make_tokenizer
from .generation.test_greedy import make_prompts


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, as by CUDA_VISIBLE_DEVICES=0")


@pytest.fixture
def big_tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(big_tokenizer):
    return make_model(big_tokenizer, hidden_size=128).cuda()


def test_a_graph_decodes_what_generate_does(model, big_tokenizer):
    vocabulary = model_vocabulary(big_tokenizer, model.config.vocab_size)
    prompts = make_prompts([3, 40, 17, 9, 25, 1, 2, 30])
    assert why_no_graph(model) is None
    expected = generate_greedy(model, prompts, vocabulary, [], 100)
    assert generate_greedy_by_graph(model, prompts, vocabulary, [], 100).completions == expected
    eos_ids = [expected[0][4], expected[3][9], expected[5][50]]  # rows leave, and a new graph is captured
    expected = generate_greedy(model, prompts, vocabulary, eos_ids, 100)
    assert len(set(map(len, expected))) > 2
    assert generate_greedy_by_graph(model, prompts, vocabulary, eos_ids, 100).completions == expected


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_slots_decode_what_generate_does(model, big_tokenizer, num_slots):
    vocabulary = model_vocabulary(big_tokenizer, model.config.vocab_size)
    prompts, rooms = make_prompts([3, 40, 17, 9, 25, 1, 2, 30]), [100, 7, 64, 1, 33, 100, 50, 2]
    expected = generate_greedy(model, prompts, vocabulary, [], 100)
    eos_ids = [expected[0][4], expected[5][50]]
    expected = [cut_after_eos(ids[:room], set(eos_ids)) for ids, room in zip(expected, rooms, strict=True)]
    completions = [[] for _ in prompts]
    complete_in_slots(model, prompts, rooms, vocabulary, eos_ids, num_slots, completions)
    assert completions == expected


def test_an_answer_in_slots_ends_at_the_look_that_found_it(model, big_tokenizer):
    vocabulary = model_vocabulary(big_tokenizer, model.config.vocab_size)
    prompts = make_prompts([3, 40, 17, 9])
    expected = generate_greedy(model, prompts, vocabulary, [], 200)
    completions = [[] for _ in prompts]
    arguments = (model, prompts, [200] * 4, vocabulary, [], 2, completions)
    complete_in_slots(*arguments, lambda row, ids: len(ids) >= [70, 64, 500, 500][row])
    assert completions == [expected[0][:128], expected[1][:64], *expected[2:]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, groups, width", [(2, 6, 128), (4, 1, 64), (1, 8, 256)])
@pytest.mark.parametrize("num_rows", [3, 300])
def test_a_layer_attends_by_length_as_the_scaled_dot_product_does(dtype, heads, groups, width, num_rows):
    torch.manual_seed(0)
    keys, values = torch.randn(2, num_rows, 320, heads, width, device="cuda").to(dtype)
    query = torch.randn(num_rows, heads * groups, 1, width, device="cuda").to(dtype)
    assert why_no_row_attention(keys, values) is None
    lengths = torch.arange(num_rows, device="cuda") * 319 // (num_rows - 1) + 1
    bounds = row_bounds(num_rows, 320, query.device)
    bounds[0, 0, 0, :-1] = lengths
    views = [states.transpose(1, 2) for states in (keys, values)]
    made, _ = row_attention_forward(None, query, *views, bounds, scaling=0.1)
    mask = (torch.arange(320, device="cuda") < lengths[:, None])[:, None, None]
    repeated = [states.float().repeat_interleave(groups, 1) for states in views]
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), *repeated, mask, scale=0.1)
    torch.testing.assert_close(made.float(), expected.transpose(1, 2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("hidden_size", [128, 256])
def test_a_model_in_half_precision_attends_by_length(big_tokenizer, hidden_size):
    model = make_model(big_tokenizer, hidden_size=hidden_size).cuda().bfloat16()
    vocabulary = model_vocabulary(big_tokenizer, model.config.vocab_size)
    prompts = make_prompts([3, 40, 17, 9, 25, 1, 2, 30])
    made = generate_greedy_by_graph(model, prompts, vocabulary, [], 60).completions
    assert why_by_mask(model) is None
    alone = [generate_greedy_by_graph(model, [ids], vocabulary, [], 60).completions[0] for ids in prompts]
    # Near ties may fall the other way, but not at the beginning of many rows
    assert sum(one[:10] == other[:10] for one, other in zip(made, alone, strict=True)) >= 6


def test_as_many_rows_are_decoded_together_as_fit(model):
    assert rows_that_fit(model, 10) == 1024
    assert rows_that_fit(model, 10**9) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 4096, 151_665])
def test_the_fused_divergence_is_that_of_pytorch(dtype, width):
    torch.manual_seed(0)
    expert, amateur = ((5 * torch.randn(7, width + 3, device="cuda")).to(dtype)[:, :width] for _ in range(2))
    amateur += 3
    amateur[1] = expert[1]
    logps = [logits.double().log_softmax(-1) for logits in (expert, amateur)]
    assert can_fuse(expert, amateur)
    fused = fused_divergence(expert, amateur)
    torch.testing.assert_close(fused, step_divergence(*logps).float(), rtol=1e-5, atol=1e-5)
    assert fused[1] == 0 and (fused >= 0).all()


@pytest.mark.parametrize("name", ["expert", "amateur"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_fused_divergence_shows_what_is_not_finite(name, value):
    logits = {each: 20 * torch.randn(3, 9000, device="cuda") for each in ("expert", "amateur")}
    logits[name][1, 8000] = value
    assert fused_divergence(**{f"{each}_logits": rows for each, rows in logits.items()}).isfinite().tolist() == [
        True,
        False,
        True,
    ]
    with pytest.raises(NonFiniteLogitsError, match=f"The {name}'s logits at row 1"):
        contrast_steps(logits["expert"], logits["amateur"], alpha=0.2, beta=0.4)


@pytest.mark.parametrize("fit", ["full", "lora"])
def test_a_packed_batch_has_the_loss_and_the_gradient_of_a_padded_one(model, big_tokenizer, steps, tmp_path, fit):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = LightReasonerTrainer(
        model,
        args=LightReasonerConfig(str(tmp_path), bf16=True, report_to="none"),
        train_dataset=steps,
        processing_class=big_tokenizer,
        peft_config=lora if fit == "lora" else None,
    )
    assert trainer._packs
    batch = DataCollatorForLightReasoner()(list(steps.select(range(4))))
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    results = []
    model = trainer.accelerator.prepare_model(trainer.model)  # under autocast
    trainer._graphs = None
    for packs in (False, True):
        trainer._packs = packs
        trainer.model.zero_grad()
        loss = trainer.training_step(model, dict(batch), batch["step_mask"].sum())
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        results.append((loss, torch.cat([parameter.grad.flatten() for parameter in trained])))
    (loss, gradient), (packed_loss, packed_gradient) = results
    torch.testing.assert_close(loss, packed_loss, rtol=2e-2, atol=2e-2)
    assert torch.nn.functional.cosine_similarity(gradient, packed_gradient, dim=0) > 0.995


def quantized(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return load_model(str(tmp_path / "model"), dtype="bfloat16", quantization_config=nf4)


def adapted(model, tokenizer, steps, tmp_path, dropout=0.0):
    """A trainer of an adapter, and its model under autocast."""
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    args = LightReasonerConfig(str(tmp_path), bf16=True, report_to="none")
    trainer = LightReasonerTrainer(model, args, train_dataset=steps, processing_class=tokenizer, peft_config=lora)
    return trainer, trainer.accelerator.prepare_model(trainer.model)


def step(trainer, model, steps, rows):
    batch = DataCollatorForLightReasoner()(list(steps.select(rows)))
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    return trainer.training_step(model, batch, batch["step_mask"].sum())


def trained(trainer):
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "nf4"])
def test_a_graph_trains_an_adapter_as_its_kernels_do_one_by_one(weights, model, big_tokenizer, steps, tmp_path):
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    model = quantized(tmp_path, model) if weights == "nf4" else model.to(getattr(torch, weights))
    trainer, model = adapted(model, big_tokenizer, steps, tmp_path)
    graphs = trainer._graphs
    results = []
    for trainer._graphs in (None, graphs):
        trainer.model.zero_grad()
        for rows in (range(4), range(2, 5), range(1, 5)):  # two sizes, one of them twice; gradients add up
            loss = step(trainer, model, steps, rows)
        results.append((loss, torch.cat([parameter.grad.flatten().float() for parameter in trained(trainer)])))
    assert not graphs.failed and len(graphs._captured) == 2
    (loss, gradient), (graphed_loss, graphed_gradient) = results
    torch.testing.assert_close(loss, graphed_loss, rtol=1e-2, atol=1e-2)
    assert torch.nn.functional.cosine_similarity(gradient, graphed_gradient, dim=0) > 0.999
    torch.testing.assert_close(gradient.norm(), graphed_gradient.norm(), rtol=2e-2, atol=0)


def test_every_replay_has_a_dropout_of_its_own(model, big_tokenizer, steps, tmp_path):
    trainer, model = adapted(model, big_tokenizer, steps, tmp_path, dropout=0.5)

    def losses():
        torch.cuda.manual_seed(0)
        return [step(trainer, model, steps, range(4)).item() for _ in range(4)]

    first, again = losses(), losses()
    assert len(set(first)) == 4 and first == again


def test_parameters_that_autograd_knows_from_another_stream_are_captured(model, big_tokenizer, steps, tmp_path):
    """As under DDP, which holds what adds up the gradient of each parameter."""
    trainer, model = adapted(model, big_tokenizer, steps, tmp_path)
    held = [parameter.expand_as(parameter).grad_fn.next_functions[0][0] for parameter in trained(trainer)]
    step(trainer, model, steps, range(4))
    assert held and not trainer._graphs.failed and trainer._graphs._captured


def test_training_goes_on_after_a_capture_that_broke_off(model, big_tokenizer, steps, tmp_path, caplog):
    """With dropout, which draws from a generator that took part in it."""
    trainer, model = adapted(model, big_tokenizer, steps, tmp_path, dropout=0.5)
    layer = trainer.model.get_base_model().model.layers[1]

    def synchronize(*args):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    layer.register_forward_hook(synchronize)
    with caplog.at_level("WARNING", logger="trl_lightreasoner.training.cuda_graphs"):
        losses = [step(trainer, model, steps, range(4)).item() for _ in range(3)]
    assert trainer._graphs.failed and len(set(losses)) == 3
    assert any("not permitted when stream is capturing" in message for message in caplog.messages)
    # The allocator must not believe that it goes on either: then it would keep all that it has
    before = torch.cuda.memory_reserved()
    filler = torch.empty(2**28, device="cuda")
    del filler
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    whole = torch.cuda.CUDAGraph()
    number = torch.zeros(1, device="cuda")
    with torch.cuda.graph(whole):
        number += 1
    whole.replay()
    assert number.item() == 1


def test_the_fused_divergence_can_be_compiled_ahead():
    wide = torch.randn(3, 999, device="cuda", dtype=torch.float16)
    compile_ahead(wide[:1].to("meta")[:, :991], wide[:1].to("meta")[:, :991], wide.device)
    one, other = wide[:, :991], wide.flip(0)[:, :991]
    expected = step_divergence(one.float().log_softmax(-1), other.float().log_softmax(-1))
    torch.testing.assert_close(fused_divergence(one, other), expected, rtol=1e-4, atol=1e-5)


class Recorder(TrainerCallback):
    """The weights of an adapter after every update."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = [parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad]
        self.weights.append(torch.cat(weights).clone())


def train(trainer_class, model, tokenizer, steps, tmp_path, callback):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    args = LightReasonerConfig(str(tmp_path), bf16=True, logging_steps=6, learning_rate=1e-2, **settings)
    trainer = trainer_class(
        model, args, train_dataset=steps, processing_class=tokenizer, callbacks=[callback], peft_config=lora
    )
    trainer.train()
    return trainer


def test_no_update_waits_for_the_one_before(model, big_tokenizer, steps, tmp_path):
    class NoWaiting(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if state.global_step in (2, 3, 4) else "default")

    try:
        trainer = train(LightReasonerTrainer, model, big_tokenizer, steps, tmp_path, NoWaiting())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer._packs and trainer.state.global_step == 6


def test_answers_on_the_way_leave_the_graphs_of_training_as_they_are(model, big_tokenizer, steps, tmp_path):
    pytest.importorskip("math_verify")

    class Graphs(TrainerCallback):
        def __init__(self):
            self.captured = []

        def on_step_end(self, args, state, control, **kwargs):
            self.captured.append({key: id(graph) for key, graph in trainer._graphs._captured.items()})

    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "eval_max_new_tokens": 16}
    graphs = Graphs()
    trainer = LightReasonerTrainer(
        model,
        LightReasonerConfig(str(tmp_path), bf16=True, learning_rate=1e-2, **settings),
        train_dataset=steps,
        processing_class=big_tokenizer,
        callbacks=[graphs],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        eval_questions=Dataset.from_dict({"prompt": QUESTIONS, "answer": ["7"] * len(QUESTIONS)}),
    )
    trainer.train()
    assert trainer._questions._answering.decode.by_graph and not trainer._graphs.failed
    assert graphs.captured[0] and graphs.captured[0].items() <= graphs.captured[-1].items()
    assert [log["step"] for log in trainer.state.log_history if "eval_accuracy" in log] == list(range(7))


def test_an_update_that_is_not_finite_is_left_out_on_a_gpu(model, big_tokenizer, steps, tmp_path):
    class Poisoned(LightReasonerTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss * math.nan if self.state.global_step in (1, 2, 5) else loss

    recorder = Recorder()
    trainer = train(Poisoned, model, big_tokenizer, steps, tmp_path, recorder)
    pairs = zip(recorder.weights, recorder.weights[1:], strict=False)
    assert [not torch.equal(before, after) for before, after in pairs] == [False, False, True, True, False]
    assert recorder.weights[-1].isfinite().all()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["num_nonfinite_updates"] == 3 and math.isfinite(log["loss"])


def test_the_sampler_gives_on_a_gpu_what_it_gives_on_a_cpu(expert, amateur, tokenizer, prompts, tmp_path):
    datasets = []
    for device in ("cpu", "cuda"):
        args = ContrastiveSamplingConfig(str(tmp_path / device), max_new_tokens=12, beta=1.95)
        sampler = ContrastiveStepSampler(expert.to(device), amateur.to(device), args, tokenizer, tokenizer)
        datasets.append(sampler.sample(prompts))
        assert sampler._decode.by_graph == (device == "cuda")
    on_cpu, on_gpu = datasets
    assert sum(map(len, on_cpu["step_positions"])) > 0
    for column in ("completion_ids", "step_positions", "label_ids"):
        assert on_cpu[column][:] == on_gpu[column][:]
    for one, other in zip(on_cpu["kl_divergence"], on_gpu["kl_divergence"], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
