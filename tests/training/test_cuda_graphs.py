"""Without a GPU the layers run again where a graph would be replayed; the buffers and the gradients are the same."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from trl_lightreasoner import DataCollatorForLightReasoner
from trl_lightreasoner.training.cuda_graphs import GraphedLayers, can_capture, round_up

from ..conftest import make_model
from ..training.test_packed_attention import make_trainer, naive  # noqa: F401


class OnStepEnd(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_end(self, *args, **kwargs):
        self.call()


def make_adapted(tokenizer, steps, tmp_path, dropout=0.0):
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    return make_trainer(make_model(tokenizer), tokenizer, steps, tmp_path, packs=True, peft_config=lora)


def gradients(trainer):
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    return {name: parameter.grad.clone() for name, parameter in trained.items()}


def with_argument(model, **arguments):
    def call(**kwargs):
        return model(**kwargs, **arguments)

    call.training, call.config = model.training, model.config
    return call


def step(trainer, rows):
    batch = DataCollatorForLightReasoner()(rows)
    return trainer.training_step(trainer.model, dict(batch), batch["step_mask"].sum())


@pytest.fixture
def trainers(tokenizer, steps, tmp_path, naive):  # noqa: F811
    plain, graphed = (make_adapted(tokenizer, steps, tmp_path) for _ in range(2))
    graphed._graphs = GraphedLayers(graphed.model)
    return plain, graphed


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 257, 4096, 14_000, 100_000])
def test_tokens_are_rounded_to_a_few_sizes(num_tokens):
    rounded, multiple = round_up(num_tokens)
    assert rounded >= num_tokens and rounded % multiple == 0
    assert rounded - num_tokens < max(256, num_tokens / 8 + 1)


def test_a_replay_has_the_loss_and_the_gradient_of_the_layers(trainers, steps):
    rows = list(steps)
    for part in (rows[:3], rows[3:6], rows[:2], rows[:3]):
        results = []
        for trainer in trainers:
            trainer.model.zero_grad()
            results.append((step(trainer, part), gradients(trainer)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert not trainers[1]._graphs.failed and len(trainers[1]._graphs._captured) == 2


def test_gradients_of_several_batches_add_up(trainers, steps):
    rows, results = list(steps), []
    for trainer in trainers:
        for part in (rows[:3], rows[3:6]):
            step(trainer, part)
        results.append(gradients(trainer))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_second_pass_within_a_step_is_not_replayed(trainers, steps):
    """Of a subclass that computes the loss twice."""
    results = []
    for trainer in trainers:
        once = type(trainer).compute_loss

        def twice(model, inputs, once=once, trainer=trainer, **kwargs):
            return once(trainer, model, inputs, **kwargs) + once(trainer, model, inputs, **kwargs) ** 2

        trainer.compute_loss = twice
        loss = step(trainer, list(steps)[:3])
        results.append((loss, gradients(trainer)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@contextmanager
def in_evaluation_mode(model):
    model.eval()
    yield
    model.train()


@pytest.mark.parametrize(
    "another", [lambda model: model.disable_adapter(), lambda model: torch.no_grad(), in_evaluation_mode]
)
def test_a_pass_that_trains_nothing_is_not_replayed(another, trainers, steps, monkeypatch):
    """Of a subclass that compares the model with what it is without its adapter, say, and calls it before."""
    graphed = trainers[1]
    once, captured = type(graphed).compute_loss, []

    def compute_loss(model, inputs, **kwargs):
        with another(graphed.model):
            once(graphed, model, inputs, **kwargs)
            assert not captured
        return once(graphed, model, inputs, **kwargs)

    capture = graphed._graphs._capture
    monkeypatch.setattr(graphed._graphs, "_capture", lambda *args: captured.append(1) or capture(*args))
    graphed.compute_loss = compute_loss
    step(graphed, list(steps)[:3])
    assert captured


def test_layers_that_are_asked_for_more_are_not_replayed(trainers, steps):
    _, graphed = trainers
    asked = []

    def forward(*args, once=graphed._graphs.layers.forward, **kwargs):
        asked.append(kwargs.get("output_hidden_states"))
        return once(*args, **kwargs)

    graphed._graphs.layers.forward = forward
    compute_loss = graphed.compute_loss
    graphed.compute_loss = lambda model, inputs, **kwargs: compute_loss(
        with_argument(model, output_hidden_states=True), inputs, **kwargs
    )
    step(graphed, list(steps)[:3])
    assert asked == [True] and not graphed._graphs._captured


def test_weights_that_move_are_captured_anew(trainers, steps):
    rows = list(steps)[:3]
    for trainer in trainers:
        step(trainer, rows)
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data * 1.5
        trainer.model.zero_grad()
    plain, graphed = ((step(trainer, rows), gradients(trainer)) for trainer in trainers)
    torch.testing.assert_close(plain, graphed, rtol=1e-4, atol=1e-6)


def test_an_adapter_that_comes_later_is_trained(trainers, steps):
    rows, results = list(steps)[:3], []
    for trainer in trainers:
        step(trainer, rows)
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        trainer.model.add_adapter("later", lora)
        trainer.model.set_adapter("later")
        trainer.model.zero_grad()
        results.append((step(trainer, rows), gradients(trainer)))
    assert all(gradient.any() for gradient in results[1][1].values())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_batch_that_fits_neither_way_leaves_the_graphs_on(trainers, steps, monkeypatch):
    graphed = trainers[1]

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("trl_lightreasoner.training.cuda_graphs._CapturedLayers", fail)
        patch.setattr(graphed._graphs.layers, "forward", fail)
        step(graphed, list(steps)[:3])
    step(graphed, list(steps)[:2])
    assert graphed._graphs._captured


def test_layers_that_cannot_be_captured_run_as_they_are(trainers, steps, caplog, monkeypatch):
    plain, graphed = trainers

    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("trl_lightreasoner.training.cuda_graphs._CapturedLayers", fail)
    rows = list(steps)[:3]
    with caplog.at_level("WARNING", logger="trl_lightreasoner.training.cuda_graphs"):
        losses = [step(graphed, rows) for _ in range(2)]
    assert torch.equal(losses[0], step(plain, rows))
    (message,) = [m for m in caplog.messages if "CUDA graphs" in m]
    assert "not permitted when stream is capturing" in message and "use_cuda_graphs=False" in message


def test_evaluation_is_not_replayed(trainers, steps):
    plain, graphed = (trainer.evaluate(steps)["eval_loss"] for trainer in trainers)
    assert graphed == pytest.approx(plain, rel=1e-5)
    assert not trainers[1]._graphs._captured


def test_all_weights_are_not_trained_by_graphs(tokenizer):
    assert not can_capture(make_model(tokenizer))


def test_training_leaves_the_forward_of_the_layers_as_it_was(trainers):
    graphed = trainers[1]
    captured = []
    graphed.add_callback(OnStepEnd(lambda: captured.append(len(graphed._graphs._captured))))
    graphed.train()
    assert captured == [1, 1] and not graphed._graphs._captured
    assert "forward" not in vars(graphed.model.get_base_model().model)
