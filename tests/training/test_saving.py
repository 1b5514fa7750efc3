"""What is saved is what was trained, and what saving would refuse is refused before training."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, Zamba2Config, Zamba2ForCausalLM

from trl_lightreasoner import LightReasonerConfig, LightReasonerTrainer
from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.merge import main as merge
from trl_lightreasoner.models.loading import load_model

from ..conftest import make_model


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def trainer(expert_path, steps, tmp_path):
    def make(model=expert_path, **kwargs) -> LightReasonerTrainer:
        args = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "no", **kwargs.pop("args", {})}
        args = LightReasonerConfig(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, report_to="none", **args)
        return LightReasonerTrainer(model, args, train_dataset=steps, **kwargs)

    return make


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(torch.arange(5, 25)[None]).logits


ADAPTERS = {
    "LoRA": LoraConfig(**LORA),
    "biases": LoraConfig(**LORA, bias="all"),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "whole modules": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "rank-stabilized": LoraConfig(**LORA, use_rslora=True, rank_pattern={"q_proj": 2}),
    "PiSSA": LoraConfig(**LORA, init_lora_weights="pissa"),
    "OLoRA": LoraConfig(**LORA, init_lora_weights="olora"),
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "AdaLoRA": AdaLoraConfig(**LORA, init_r=4, target_r=1, total_step=4, tinit=0, tfinal=1, deltaT=1),
}


@pytest.mark.parametrize("peft_config", [None, *ADAPTERS.values()], ids=["all weights", *ADAPTERS])
def test_what_is_saved_is_what_was_trained(peft_config, trainer, expert, tmp_path):
    made = trainer(peft_config=copy.deepcopy(peft_config))
    made.train()
    made.save_model()  # which compares
    loaded = load_model(str(tmp_path / "out"))
    assert not torch.allclose(logits_of(loaded), logits_of(expert), rtol=0, atol=2e-4)
    torch.testing.assert_close(logits_of(loaded), logits_of(made.model), rtol=0, atol=5e-5)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "trained", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [7, 330]}], ids=str
)
def test_embeddings_of_more_tokens_are_saved_as_they_were_trained(trained, is_tied, tokenizer, trainer, tmp_path):
    make_model(tokenizer, tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(331)
    made = trainer(model, processing_class=tokenizer, peft_config=LoraConfig(**LORA, **trained))
    made.train()
    made.save_model()  # which compares
    loaded = load_model(str(tmp_path / "out"))
    torch.testing.assert_close(logits_of(loaded), logits_of(made.model), rtol=0, atol=5e-5)


@pytest.mark.parametrize("peft_config", [None, ADAPTERS["LoRA"], ADAPTERS["OLoRA"]], ids=["full", "LoRA", "OLoRA"])
def test_a_file_that_is_not_what_was_trained_is_an_error_that_keeps_it(peft_config, trainer, tmp_path, monkeypatch):
    made = trainer(peft_config=copy.deepcopy(peft_config))
    made.train()
    trained = logits_of(made.model)
    parameter = next(parameter for parameter in reversed([*made.model.parameters()]) if parameter.requires_grad)
    save = type(made)._save_beside

    def change_behind(self, folder):
        save(self, folder)
        parameter.data.mul_(1.5)

    monkeypatch.setattr(type(made), "_save_beside", change_behind)
    with pytest.raises(ValueError, match=f"^The files saved in '{tmp_path}/out' differ from .*The files"):
        made.save_model()
    monkeypatch.undo()
    torch.testing.assert_close(logits_of(load_model(str(tmp_path / "out"))), trained, rtol=0, atol=1e-4)


def test_a_trained_tensor_that_is_not_on_the_disk_is_an_error(trainer, expert, tmp_path):
    model = get_peft_model(expert, LoraConfig(**LORA))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'base_model\.model\.model\.norm\.weight' was trained, but is missing"):
        trainer(model, processing_class=AutoTokenizer.from_pretrained(expert.config._name_or_path)).train()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "adapter with `init_lora_weights='pissa_niter_4'`, whose random deco",
        ),
        (
            {"alora_invocation_tokens": [3]},
            r"adapter that acts through PEFT's own forward \(aLoRA\), which generation",
        ),
    ],
)
def test_an_adapter_that_is_never_the_one_that_was_trained_is_refused(changes, sentence, trainer, expert, tmp_path):
    peft_config = LoraConfig(**LORA, **changes)
    with pytest.raises(ValueError, match=f"The `peft_config` is an {sentence}"):
        trainer(peft_config=copy.deepcopy(peft_config))
    get_peft_model(expert, peft_config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"The model is an {sentence}"):
        load_model(str(tmp_path / "adapter"))


def test_adalora_prunes(trainer):
    made = trainer(peft_config=copy.deepcopy(ADAPTERS["AdaLoRA"]))
    made.train()
    ranks = made.model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in ranks.values()) == 4 * 1  # modules, target_r


def test_adalora_that_would_not_have_pruned_when_training_ends_is_refused(trainer):
    config = AdaLoraConfig(**LORA, init_r=4, target_r=1, total_step=100)
    with pytest.raises(ValueError, match=r"prunes its ranks until update 100 .*, but training makes 4\. Set"):
        trainer(peft_config=config).train()


@pytest.fixture
def zamba(tmp_path, tokenizer) -> str:
    """A model whose layers share the weights of one block."""
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_attention_heads=4,
        num_mem_blocks=1,
        mamba_d_state=8,
        mamba_expand=2,
        n_mamba_heads=4,
        mamba_ngroups=1,
        use_shared_attention_adapter=False,
        adapter_rank=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
    )
    Zamba2ForCausalLM(config).save_pretrained(tmp_path / "zamba")
    tokenizer.save_pretrained(tmp_path / "zamba")
    return str(tmp_path / "zamba")


def save_random_adapter(base: str, folder, **kwargs) -> None:
    torch.manual_seed(1)
    model = load_model(base)
    get_peft_model(model, LoraConfig(**{**LORA, **kwargs}, init_lora_weights=False)).save_pretrained(folder)


def test_an_adapter_of_a_weight_in_several_places_is_not_merged(zamba, tmp_path):
    save_random_adapter(zamba, tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"uses in several places \(.*q_proj\.weight and .*q_proj\.weight\)\. Merging"
    ):
        merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


def test_a_merge_that_says_something_else_is_an_error(expert_path, tmp_path, monkeypatch):
    save_random_adapter(expert_path, tmp_path / "adapter")
    save = type(AutoModelForCausalLM.from_pretrained(expert_path)).save_pretrained

    def save_another(self, folder, **kwargs):
        self.model.norm.weight.data.mul_(1.5)
        save(self, folder, **kwargs)

    monkeypatch.setattr("transformers.Qwen2ForCausalLM.save_pretrained", save_another)
    with pytest.raises(ValueError, match="^The merged model differs from the base model with the adapter by "):
        merge(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "model")))


def test_all_weights_are_saved_with_a_generation_config_that_transformers_would_refuse(trainer, expert_path, tmp_path):
    # Training changes its EOS, and what was changed transformers does not save with a temperature that does nothing
    settings = {"do_sample": False, "temperature": 0.9, "eos_token_id": 5}
    path = Path(shutil.copytree(expert_path, tmp_path / "expert")) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    made = trainer(str(path.parent))
    made.train()
    made.save_model()
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.9 and 5 in saved["eos_token_id"]


def test_what_saving_refuses_is_refused_before_training(trainer):
    made = trainer()
    made.model.config.answer = {1, 2}  # no JSON
    with pytest.raises(ValueError, match="The trained model could not be saved: .* not JSON serializable"):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize("peft_config", [None, ADAPTERS["LoRA"]], ids=["full", "LoRA"])
def test_a_model_that_cannot_be_saved_leaves_its_weights(peft_config, trainer, tmp_path, monkeypatch):
    made = trainer(peft_config=copy.deepcopy(peft_config))
    made.train()

    def fail(*args, **kwargs):
        raise TypeError("Nothing is saved today.")

    monkeypatch.setattr(type(made.model), "save_pretrained", fail)
    with pytest.raises(ValueError, match="could not be saved in .*: Nothing is saved today. The trained weights"):
        made.save_model()
    weights = load_file(tmp_path / "out" / "trained_weights.safetensors")
    trained = {name: each for name, each in made.model.named_parameters() if each.requires_grad}
    assert weights.keys() == trained.keys() and all(torch.equal(weights[name], trained[name]) for name in trained)


@pytest.fixture
def split(monkeypatch):
    """As under FSDP: no process holds all weights, and what is saved was gathered from all of them."""
    monkeypatch.setattr(LightReasonerTrainer, "_is_split", True)

    def save_model(self, output_dir=None, _internal_call=False):
        self._save(output_dir, state_dict={**self._whole_model().state_dict()})

    monkeypatch.setattr(Trainer, "save_model", save_model)


SPLIT = {name: ADAPTERS[name] for name in ("LoRA", "whole modules", "OFT")}


@pytest.mark.parametrize("peft_config", [None, *SPLIT.values()], ids=["all weights", *SPLIT])
def test_gathered_weights_are_compared_with_the_files(
    peft_config, split, trainer, monkeypatch, caplog, propagated_logs
):
    made = trainer(peft_config=copy.deepcopy(peft_config), args={"max_steps": 1})
    made.train()
    made.save_model()
    assert "cannot be compared" not in caplog.text and made._gathered is None
    save = type(made)._save_beside

    def change_behind(self, folder):
        save(self, folder)
        name, parameter = [each for each in self.model.named_parameters() if each[1].requires_grad][-1]
        self._gathered[name] = parameter.detach() + 1

    monkeypatch.setattr(type(made), "_save_beside", change_behind)
    with pytest.raises(ValueError, match=r"^The files saved in '.*' differ from the trained weights: '.*' has diff"):
        made.save_model()


def test_weights_that_nobody_gathered_are_not_compared_in_silence(
    split, trainer, monkeypatch, caplog, propagated_logs, tmp_path
):
    made = trainer(peft_config=copy.deepcopy(ADAPTERS["LoRA"]), args={"max_steps": 1})
    made.train()
    monkeypatch.setattr(Trainer, "save_model", lambda *_: None)  # as FSDP does with SHARDED_STATE_DICT
    made.save_model()
    assert f"The files in '{tmp_path}/out' cannot be compared with the trained weights" in caplog.text
