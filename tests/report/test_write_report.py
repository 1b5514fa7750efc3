"""What a report says, as files: the numbers behind it are in test_statistics.py, the page at work in a browser in
test_page_in_chromium.py."""

import json
import math
import re
import shutil
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM

from trl_lightreasoner import check_steps, write_report
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.commands.report import make_parser, name_datasets
from trl_lightreasoner.models.adapter_loading import count_saved_embeddings
from trl_lightreasoner.report.charts import Axis, Chart, write_number
from trl_lightreasoner.report.figures import curve_title, order_curves, training_figures
from trl_lightreasoner.report.model_reading import add_probabilities, add_trained
from trl_lightreasoner.report.page import as_json
from trl_lightreasoner.report.shown_steps import MAX_TOKENS, choose_rows, load_trajectories
from trl_lightreasoner.report.statistics import StepStatistics
from trl_lightreasoner.report.training_curves import load_curves
from trl_lightreasoner.sampling.pair_check import CAVEAT, RESTS_ON
from trl_lightreasoner.steps.dataset import last_parts, sampling_metadata

from ..conftest import QUESTIONS, make_model, make_tokenizer


LOG = [
    {"loss": 0.5, "entropy": 1.0, "mean_token_accuracy": 0.25, "num_tokens": 10.0, "epoch": 0.5, "step": 10},
    {"eval_loss": 0.4, "eval_runtime": 1.0, "eval_kl_to_expert": 0.01, "step": 10},
    {"loss": 0.25, "entropy": float("nan"), "mean_token_accuracy": 0.5, "num_nonfinite_updates": 0, "step": 20},
    {"train_runtime": 2.0, "total_flos": 1e9, "train_loss": 0.3, "step": 20},
]


class Outline(HTMLParser):
    """The elements of a page, which must be closed in order; their attributes; and the text of scripts."""

    VOID = {"meta", "link", "br", "path", "rect", "input"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def page_of(folder: Path) -> tuple[str, Outline, dict]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    return text, outline, json.loads(outline.scripts[0])


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """They take most of the time."""
    if "pictures" not in request.node.name and "matplotlib" not in request.node.name:
        monkeypatch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])


@pytest.fixture
def training_dir(tmp_path) -> str:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return str(tmp_path / "adapter")


@pytest.fixture(scope="module")
def report(tmp_path_factory, steps) -> tuple[str, Outline, dict]:
    folder = tmp_path_factory.mktemp("report")
    assert write_report(steps, str(folder)) == folder / "report.html"
    return page_of(folder)


# The page


def test_the_page_holds_all_that_it_needs_and_forbids_the_rest(report):
    text, outline, _ = report
    policy = next(attrs["content"] for tag, attrs in outline.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy
    assert not {"img", "iframe", "object", "embed", "base"} & {tag for tag, _ in outline.elements}
    assert "form-action 'none'" in policy  # the forms of the search go nowhere
    for tag, attrs in outline.elements:
        assert not {"src", "action", "formaction"} & set(attrs)
        assert not [name for name in attrs if name.startswith("on")]
        assert attrs.get("href", "#").startswith("#") or (tag, attrs["href"]) == ("link", "data:,")
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_kept_step_that_is_shown_can_be_opened(report, steps):
    _, outline, details = report
    buttons = [attrs for tag, attrs in outline.elements if tag == "button" and "data-step" in attrs]
    assert [attrs["data-step"] for attrs in buttons] == list(details)
    assert len(buttons) == sum(map(len, steps["step_positions"]))


def test_a_step_holds_expert_amateur_and_label_side_by_side(report, steps, expert, amateur):
    _, _, details = report
    for detail in details.values():
        row = steps[detail["row"]]
        k = row["step_positions"].index(detail["t"])
        context = torch.tensor([row["prompt_ids"] + row["completion_ids"][: detail["t"]]])
        for key, model in (("e", expert), ("a", amateur)):
            with torch.no_grad():
                probs = model(context).logits[0, -1, :300].softmax(-1)  # without the columns that no token owns
            assert detail[key] == pytest.approx(probs[row["label_ids"][k]].tolist(), abs=2e-5)
        assert detail["v"] == pytest.approx(row["label_probs"][k], abs=2e-5)
        assert row["label_ids"][k][detail["taken"]] == row["completion_ids"][detail["t"]]


def test_figures_have_descriptions_and_tables(report):
    _, outline, _ = report
    charts = [attrs for _, attrs in outline.elements if attrs.get("role") == "img"]
    assert len(charts) == 6 and all(attrs["aria-label"] for attrs in charts)
    assert sum(tag == "figure" for tag, _ in outline.elements) == 6
    assert sum(attrs.get("class") == "numbers" for _, attrs in outline.elements) == 6


def test_the_judgement_of_the_pair_stands_at_the_head(report, steps):
    text, _, _ = report
    check = check_steps(steps)
    head = unescape(text[: text.index("kept steps</dt>")])
    for sentence in (check.headline, *check.reasons, *check.warnings, CAVEAT, RESTS_ON):
        assert sentence in head
    assert text.count('class="verdict"') == 1


def test_each_of_two_datasets_is_judged(steps, tmp_path):
    write_report({"a": steps, "b": steps}, str(tmp_path), load_models=False)
    assert page_of(tmp_path)[0].count('class="verdict"') == 2


def test_paths_of_this_machine_are_not_told(report, expert_path):
    text, _, _ = report
    assert str(Path(expert_path).parent) not in text
    assert last_parts(expert_path) in text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "</script><img src=x onerror=a>", "\"'&", "\u202e\x00"]
)
def test_text_of_models_and_datasets_is_no_markup(hostile, steps, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "expert")
    path = tmp_path / "expert" / "tokenizer.json"
    content = json.loads(path.read_text())
    taken = {row["completion_ids"][row["step_positions"][0]] for row in steps if row["step_positions"]}
    content["model"]["merges"] = []
    vocabulary = content["model"]["vocab"]
    for token, token_id in list(vocabulary.items()):
        if token_id in taken:
            del vocabulary[token]
            vocabulary[f"{hostile}{token_id}"] = token_id
    content["decoder"] = None
    path.write_text(json.dumps(content))
    dataset = steps.remove_columns("prompt").add_column("prompt", [hostile] * len(steps))
    write_report({hostile: dataset}, str(tmp_path / "out"), expert=str(tmp_path / "expert"), load_models=False)
    text, outline, details = page_of(tmp_path / "out")
    assert {tag for tag, _ in outline.elements} & {"img"} == set() and "onerror" not in str(outline.elements[0])
    assert sum(tag == "script" for tag, _ in outline.elements) == 4
    assert not any("onerror" in attrs for _, attrs in outline.elements)
    assert "\u202e" not in text and "\x00" not in text
    assert any(hostile[:4] in token or "U+202E" in token for step in details.values() for token in step["tokens"])


def test_json_in_a_script_element_cannot_end_it():
    text = as_json({"a": "</script><!--\u2028\ud800&"})
    assert text.isascii() and "<" not in text and ">" not in text and "&" not in text
    assert json.loads(text) == {"a": "</script><!--\u2028\ud800&"}


def test_conversations_and_texts_are_shown_as_prompts(steps, tmp_path):
    messages = [[{"role": "system", "content": "Think."}, {"role": "user", "content": q}] for q in QUESTIONS]
    dataset = steps.remove_columns("prompt").add_column("prompt", messages)
    write_report(dataset, str(tmp_path), load_models=False)
    text, _, _ = page_of(tmp_path)
    assert QUESTIONS[1] in text and "Think." not in text
    write_report(steps.remove_columns("prompt"), str(tmp_path), load_models=False)
    assert QUESTIONS[1] in page_of(tmp_path)[0]  # from the ids


def test_long_completions_are_cut_and_the_page_says_so(steps, tmp_path):
    row = steps[0]
    times = 1 + MAX_TOKENS // len(row["completion_ids"])
    row.update({name: row[name] * times for name in ("completion_ids", "kl_divergence")})
    write_report(Dataset.from_list([row], features=steps.features), str(tmp_path), load_models=False)
    text, outline, _ = page_of(tmp_path)
    assert f"The first {MAX_TOKENS} of {len(row['completion_ids'])} tokens." in text
    assert sum("nats" in attrs.get("title", "") for _, attrs in outline.elements) == MAX_TOKENS


def test_a_dataset_without_kept_steps_has_a_report(steps, tmp_path):
    empty = [[] for _ in range(len(steps))]
    dataset = steps.map(lambda row: dict.fromkeys(("step_positions", "label_ids", "label_probs"), []))
    assert dataset["step_positions"][:] == empty
    write_report(dataset, str(tmp_path))
    text, _, details = page_of(tmp_path)
    assert details == {} and "No step is kept" in text


# What is shown


@pytest.mark.parametrize("knows", [True, False])
def test_a_dataset_that_does_not_know_every_divergence_has_a_report_and_pictures(steps, tmp_path, knows):
    pytest.importorskip("matplotlib")

    def forget(row: dict) -> dict:
        kept = row["step_positions"] if knows else []
        return {"kl_divergence": [value if t in kept else None for t, value in enumerate(row["kl_divergence"])]}

    known = sum(map(len, steps["step_positions"])) if knows else 0
    page = write_report(steps.map(forget), str(tmp_path), load_models=False).read_text(encoding="utf-8")
    num_steps = sum(map(len, steps["completion_ids"]))
    assert f"Divergences are known at {known:,} of the {num_steps:,} steps." in page
    assert ("How far the two diverge" in page) is knows
    assert "divergence not known" in page
    assert (tmp_path / "kl_distribution.png").exists() is knows
    assert (tmp_path / "label_mass.png").exists()


def test_rows_are_drawn_from_those_with_a_kept_step(steps):
    numbers = StepStatistics(steps)
    kept = [i for i, positions in enumerate(steps["step_positions"]) if positions]
    for seed in range(5):
        (rows,), paired = choose_rows([numbers], 2, seed)
        assert not paired and len(rows) == 2 and rows == sorted(rows) and set(rows) <= set(kept)
    (rows,), _ = choose_rows([numbers], 100, 0)
    assert rows == kept


def test_two_datasets_of_the_same_prompts_show_the_same_ones(steps):
    other = steps.select([5, 4, 3, 2, 1, 0])
    (first, second), paired = choose_rows([StepStatistics(steps), StepStatistics(other)], 3, 0)
    assert paired
    assert [steps[i]["prompt_ids"] for i in first] == [other[i]["prompt_ids"] for i in second]


def test_two_datasets_of_different_prompts_show_their_own(steps):
    numbers = [StepStatistics(steps.select(rows)) for rows in ([0, 1, 2], [3, 4, 5])]
    (first, second), paired = choose_rows(numbers, 2, 0)
    assert not paired
    assert first and second


# Expert and amateur


def test_without_the_models_the_label_and_the_ratio_are_shown(steps, tmp_path):
    write_report(steps, str(tmp_path), load_models=False)
    text, _, details = page_of(tmp_path)
    assert "Only the label is shown, without the probabilities of expert and amateur" in text
    for detail in details.values():
        assert "e" not in detail and "a" not in detail
        assert detail["r"] == pytest.approx([p / max(detail["v"]) for p in detail["v"]], abs=1e-4)


def test_models_that_are_not_here_are_no_mistake(steps, tmp_path):
    def moved(row):
        return {"sampling_metadata": row["sampling_metadata"].replace('"model": "', '"model": "/nowhere')}

    write_report(steps.map(moved), str(tmp_path))
    text, _, details = page_of(tmp_path)
    assert "/nowhere" not in text
    assert "Tokens are shown by number" in text and "Only the label is shown" in text
    assert QUESTIONS[1] in text and 'class="plain"' in text and 'title="' not in text.partition("</article>")[0]
    assert all(re.fullmatch(r"#\d+", token) for step in details.values() for token in step["tokens"])


def test_models_without_embeddings_for_the_tokens_are_not_shown(steps, amateur_path, expert_path):
    rows = steps.map(lambda row: {"completion_ids": [token_id + 1000 for token_id in row["completion_ids"]]})
    trajectories = load_trajectories(rows, list(range(len(rows))))
    reason = add_probabilities(trajectories, sampling_metadata(rows), None, None)
    assert reason.startswith("the dataset holds tokens beyond the ")
    with pytest.raises(ValueError, match="The models cannot be read: the dataset holds tokens beyond the "):
        add_probabilities(trajectories, sampling_metadata(rows), expert_path, amateur_path)


def test_models_that_do_not_read_that_far_are_not_shown(steps, amateur_path, expert_path):
    rows = steps.map(lambda row: {"prompt_ids": row["prompt_ids"] * 20})
    trajectories = load_trajectories(rows, list(range(len(rows))))
    with pytest.raises(ValueError, match="holds steps beyond the expert's maximum of 256 tokens"):
        add_probabilities(trajectories, sampling_metadata(rows), expert_path, amateur_path)


def test_models_that_give_another_label_are_not_shown(steps, amateur_path, expert_path):
    trajectories = load_trajectories(steps, list(range(len(steps))))
    metadata = sampling_metadata(steps)
    metadata["expert"], metadata["amateur"] = metadata["amateur"], metadata["expert"]
    assert "give a v_C that differs from the dataset's" in add_probabilities(trajectories, metadata, None, None)
    assert all(step.expert_probs is None for trajectory in trajectories for step in trajectory.steps)
    with pytest.raises(ValueError, match="These cannot be the sampled models: .* Name the"):
        add_probabilities(trajectories, sampling_metadata(steps), amateur_path, expert_path)


def test_models_can_be_named(steps, expert_path, amateur_path):
    trajectories = load_trajectories(steps, [0, 1])
    assert add_probabilities(trajectories, {}, expert_path, amateur_path) is None
    probs = [step.expert_probs for trajectory in trajectories for step in trajectory.steps]
    assert probs and all(0 < sum(each) <= 1 + 1e-6 for each in probs)


# The trained model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, expert_path) -> str:
    """An adapter of the expert that changes what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    model = Qwen2ForCausalLM.from_pretrained(expert_path)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return str(folder)


def test_the_model_of_a_training_stands_beside_the_label(steps, adapter, expert, tmp_path):
    write_report(steps, str(tmp_path), training_dir=adapter)
    trained = PeftModel.from_pretrained(expert, adapter).eval()
    for detail in page_of(tmp_path)[2].values():
        row = steps[detail["row"]]
        k = row["step_positions"].index(detail["t"])
        context = torch.tensor([row["prompt_ids"] + row["completion_ids"][: detail["t"]]])
        with torch.no_grad():
            probs = trained(context).logits[0, -1, :300].softmax(-1)
        assert detail["m"] == pytest.approx(probs[row["label_ids"][k]].tolist(), abs=2e-5)
        assert detail["m"] != pytest.approx(detail["e"], abs=1e-3)


def test_tokenizers_that_are_loaded_are_not_loaded_again(steps, adapter, tokenizer, tmp_path, monkeypatch):
    write_report(steps, str(tmp_path / "loads"), training_dir=adapter)
    monkeypatch.delattr("trl_lightreasoner.report.model_reading.load_tokenizer")
    given = {"processing_class": tokenizer, "amateur_processing_class": tokenizer}
    write_report(steps, str(tmp_path / "given"), training_dir=adapter, **given)
    details = [page_of(tmp_path / name)[2] for name in ("loads", "given")]
    assert details[0] == details[1] and all("m" in detail for detail in details[0].values())


@pytest.mark.parametrize("is_resized", [False, True])
def test_an_adapter_reads_on_a_loaded_expert_and_leaves_it_as_it_was(
    is_resized, steps, adapter, expert, expert_path, tokenizer, tmp_path
):
    if is_resized:
        base = Qwen2ForCausalLM.from_pretrained(expert_path)
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        adapter = str(tmp_path / "adapter")
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(adapter)
        assert count_saved_embeddings(adapter) == len(tokenizer) < expert.config.vocab_size
    before = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    found = [load_trajectories(steps, [0, 1]) for _ in range(2)]
    for trajectories, loaded in zip(found, (expert, None), strict=True):
        add_trained(trajectories, sampling_metadata(steps), adapter, loaded, tokenizer)
    probs = [[step.trained_probs for trajectory in each for step in trajectory.steps] for each in found]
    assert [pytest.approx(values) for values in probs[1]] == probs[0]
    assert expert.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in expert.state_dict().items())


@pytest.mark.parametrize(
    "changes", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_that_would_stay_in_a_loaded_expert_is_read_apart(
    changes, steps, expert, expert_path, tokenizer, tmp_path
):
    config = LoraConfig(target_modules=["q_proj"], **changes)
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(expert_path), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    add_trained(load_trajectories(steps, [0, 1]), sampling_metadata(steps), str(tmp_path), expert, tokenizer)
    assert expert.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in expert.state_dict().items())


def test_a_trained_model_that_is_named_must_be_readable(steps, tmp_path):
    make_tokenizer(290).save_pretrained(tmp_path / "other")
    make_model(make_tokenizer(290)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="The trained model cannot be read: its tokens differ from the expert's."):
        write_report(steps, str(tmp_path / "out"), model=str(tmp_path / "other"), load_models=False)


def test_a_trained_model_that_is_found_and_cannot_be_read_is_a_note(steps, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    write_report(steps, str(tmp_path / "out"), training_dir=str(tmp_path / "adapter"))
    text, _, details = page_of(tmp_path / "out")
    assert "The trained model cannot be read: " in text
    assert details and all("m" not in detail for detail in details.values())


# Training


def test_curves_are_whatever_was_logged(training_dir):
    curves = load_curves(training_dir)
    assert curves == {
        "loss": {"train": [(10, 0.5), (20, 0.25)], "eval": [(10, 0.4)]},
        "entropy": {"train": [(10, 1.0)]},
        "mean_token_accuracy": {"train": [(10, 0.25), (20, 0.5)]},
        "kl_to_expert": {"eval": [(10, 0.01)]},
        "num_nonfinite_updates": {"train": [(20, 0)]},
    }
    assert order_curves(curves) == ["loss", "entropy", "mean_token_accuracy", "kl_to_expert"]
    assert curve_title("kl_to_expert") == "KL to expert" and curve_title("loss") == "Loss"


ACCURACIES = [
    {"eval_accuracy": 0.5, "eval_accuracy_standard_error": 0.05, "eval_accuracy_num_cut": 0, "step": 0},
    {"loss": 0.5, "step": 10},
    {"eval_accuracy": 0.6, "eval_accuracy_standard_error": 0.049, "eval_accuracy_num_cut": 0, "step": 20},
]


@pytest.fixture
def answering_dir(tmp_path) -> str:
    """Output of a training that answered questions."""
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": ACCURACIES}))
    return str(tmp_path)


def test_the_accuracy_comes_first_with_its_error_around_it(answering_dir):
    curves = load_curves(answering_dir)
    assert order_curves(curves) == ["accuracy", "loss"]  # no answer was cut
    page = training_figures(curves)
    assert "<h3>Accuracy</h3>" in page and "<h3>Answers cut</h3>" not in page and "andard error</h3>" not in page
    assert "<td>50\u00a0% ± 5\u00a0%</td>" in page and "<td>60\u00a0% ± 4.9\u00a0%</td>" in page
    # From 45 % to 64.9 %, and a tenth of that above and below
    (points,) = re.findall(r'<path class="band s1" d="M(.*?)Z"/>', page)
    heights = [float(point.split()[1]) for point in points.split("L")]
    low, high = 0.45 - 0.0199, 0.649 + 0.0199
    expected = [1000 * (high - value) / (high - low) for value in (0.55, 0.649, 0.551, 0.45)]
    assert heights == pytest.approx(expected, rel=1e-2)


def test_answers_that_were_cut_have_a_curve(answering_dir):
    curves = load_curves(answering_dir)
    curves["accuracy_num_cut"]["eval"][1] = (20, 3)
    assert order_curves(curves) == ["accuracy", "loss", "accuracy_num_cut"]


def test_the_accuracy_is_among_the_pictures(steps, answering_dir, tmp_path):
    pytest.importorskip("matplotlib")
    write_report(steps, str(tmp_path / "out"), training_dir=answering_dir, load_models=False)
    assert (tmp_path / "out" / "training_accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_the_last_checkpoint_has_the_log_too(tmp_path):
    for number in (9, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        state = {"log_history": [{"loss": float(number), "step": number}]}
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps(state))
    assert load_curves(str(tmp_path)) == {"loss": {"train": [(10, 10.0)]}}


def test_the_training_is_in_the_report(steps, training_dir, tmp_path):
    write_report(steps, str(tmp_path / "out"), training_dir=training_dir, load_models=False)
    text, _, _ = page_of(tmp_path / "out")
    for title in ("Loss", "Entropy", "Agreement", "KL to expert"):
        assert f"<h3>{title}</h3>" in text
    assert "training from 0.5 to 0.25" in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            None,
            "is not the output folder of a training: neither it nor a checkpoint in it holds a trainer_state.json.",
        ),
        ("{", "is damaged. Name another checkpoint, or remove `training_dir`."),
        ('{"log_history": [{"loss": 1.0}]}', "is damaged. Name another checkpoint, or remove `training_dir`."),
        ('{"log_history": []}', "is empty. Train with smaller `logging_steps`."),
    ],
)
def test_a_folder_without_a_log_is_refused(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError) as error:
        load_curves(str(tmp_path))
    assert str(error.value).endswith(sentence)


# Pictures


def test_the_figures_are_saved_as_pictures(steps, training_dir, tmp_path):
    pytest.importorskip("matplotlib")
    write_report(
        {"a": steps, "_b$": steps.select(range(4))},
        str(tmp_path / "out"),
        training_dir=training_dir,
        load_models=False,
    )
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert names == {
        *("kl_distribution", "kl_along_trajectories", "share_kept", "kept_by_position", "label_support", "label_mass"),
        *("tokens_1", "tokens_2", "training_loss", "training_entropy", "training_mean_token_accuracy"),
        "training_kl_to_expert",
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (tmp_path / "out").glob("*.png"))


def test_without_matplotlib_there_is_the_page_and_one_sentence(steps, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sentences = []
    monkeypatch.setattr("trl_lightreasoner.report.write_report.logger.warning", sentences.append)
    write_report(steps, str(tmp_path), load_models=False)
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".csv"}
    assert sentences == [
        "The PNG figures need matplotlib: `pip install 'trl-lightreasoner[report]'`. The page shows the figures "
        "without it."
    ]


# Numbers on paper


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis(0, 0.012), [0, 0.0025, 0.005, 0.0075, 0.01]),
        (Axis(1e-6, 10, is_log=True), [1e-5, 1e-3, 1e-1, 10]),
        (Axis(2, 3, is_log=True), []),
    ],
)
def test_ticks_are_round_and_inside(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize("value", [3.14159e-9, 0.00123, 0.5, 2.5, 99.9, 123456.0])
def test_a_number_is_written_to_three_digits(value):
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    text = write_number(value).replace("·10", "e").translate(superscripts).replace(",", "")
    assert float(text) == pytest.approx(value, rel=5e-3)


def test_what_lies_outside_an_axis_is_at_its_end():
    axis = Axis(0.01, 1, is_log=True)
    assert [axis.place(value) for value in (0, 0.1, 5)] == pytest.approx([0, 0.5, 1])
    chart = Chart(axis, Axis(0, 1))
    chart.bars([0.01, 0.1, 1], [0.5, math.inf], "s0")
    assert 'x="500.0" y="0.0" width="500.0" height="1000.0"' in chart.html("")


# The command


def test_the_command_writes_a_report(steps, training_dir, tmp_path, capsys):
    steps.to_parquet(tmp_path / "steps.parquet")
    steps.select(range(3)).to_parquet(tmp_path / "fewer.parquet")
    argv = [str(tmp_path / "steps.parquet"), str(tmp_path / "fewer.parquet"), "--output_dir", str(tmp_path / "out")]
    assert main(["report", *argv, "--training_dir", training_dir, "--no_load_models"]) == 0
    stdout, stderr = capsys.readouterr()
    assert f"The report is in {tmp_path / 'out' / 'report.html'}." in stdout
    flags = rf"--model {re.escape(training_dir)} --baseline \S+ --output_dir EVALUATION"
    assert re.search(rf"\nNext: lightreasoner eval {flags}\n$", stdout)
    assert f"\nReading {len(steps)} rows of " in stderr and "steps.parquet and 3 rows of " in stderr
    text, _, _ = page_of(tmp_path / "out")
    assert "steps.parquet" in text and "fewer.parquet" in text and 'id="training"' in text


def test_the_datasets_can_come_from_a_config_file(tmp_path):
    (tmp_path / "report.yaml").write_text("dataset_name: [a, b]\nnum_trajectories: 3\n")
    (args,) = make_parser().parse(["--config", str(tmp_path / "report.yaml")])
    assert (args.dataset_name, args.num_trajectories, args.output_dir) == (["a", "b"], 3, "report")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "A dataset is missing. It comes first: `lightreasoner report DATASET --output_dir DIR`."),
        (["a", "b", "c"], "A report shows one dataset or two side by side, got 3."),
        (["a", "a"], "The two datasets are the same. Name two different ones, or only one."),
        (
            ["a", "--output_dir", "x", "b"],
            "Unexpected argument 'b'. The datasets come first: `lightreasoner report DATASET",
        ),
        (["a", "--num_trajectories", "0"], "`--num_trajectories` must be a whole number, 1 or more, got 0."),
        (["a", "--outputdir", "x"], "There is no flag `--outputdir`. Did you mean `--output_dir`?"),
        (["./nowhere"], "There is no file or folder './nowhere'."),
        (["{prompts}"], "The dataset has no column 'prompt_ids'; it has 'prompt'. Make it with"),
        (["{steps}", "--training_dir", "nowhere"], "'nowhere' is not the output folder of a training"),
        (["{steps}", "--output_dir", "{prompts}"], "'{prompts}' is a file. Choose another `--output_dir`."),
        (["{steps}", "--expert", "nowhere"], "The expert 'nowhere' cannot be found. It must be a folder with"),
        (["{steps}", "--model", "nowhere"], "The trained model 'nowhere' cannot be found. It must be a folder with"),
    ],
)
def test_mistakes_are_told_in_one_sentence(argv, sentence, steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "2+2="}\n')
    steps.to_parquet("steps.parquet")
    places = {"prompts": "prompts.jsonl", "steps": "steps.parquet"}
    assert main(["report", *(arg.format(**places) for arg in argv)]) == 2
    stderr = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert stderr.startswith(f"lightreasoner report: error: {sentence.format(**places)}")
    assert not Path("report").exists()


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["user/steps"], ["user/steps"]),
        (["runs/a/dataset", "runs/b/dataset"], ["a/dataset", "b/dataset"]),
        (["a/x/data/set", "b/x/data/set"], ["a/x/data/set", "b/x/data/set"]),
        (["steps"], ["steps"]),
    ],
)
def test_datasets_are_called_by_the_end_of_their_paths(sources, names):
    assert name_datasets(sources) == names


def test_the_report_of_the_train_command_finds_the_log(steps, expert_path, tmp_path):
    steps.to_parquet(tmp_path / "steps.parquet")
    argv = ["--model_name_or_path", expert_path, "--dataset_name", str(tmp_path / "steps.parquet"), "--use_cpu"]
    argv += ["--output_dir", str(tmp_path / "adapter"), "--max_steps", "2", "--logging_steps", "1"]
    assert main(["train", *argv, "--save_strategy", "no", "--disable_tqdm", "true"]) == 0
    curves = load_curves(str(tmp_path / "adapter"))
    assert {"loss", "entropy", "mean_token_accuracy"} <= set(curves)
    assert [update for update, _ in curves["loss"]["train"]] == [1, 2]


def test_rows_of_two_amateurs_name_both_and_show_the_probabilities_of_neither(steps, tmp_path):
    metadata = sampling_metadata(steps)
    metadata["amateur"]["model"] = "private/models/another"
    others = steps.map(lambda row: {"sampling_metadata": json.dumps(metadata)})
    mixed = concatenate_datasets([steps.select(range(2)), others.select(range(2, 4))])
    page = unescape(write_report(mixed, str(tmp_path)).read_text())
    assert "pair/amateur and models/another" in re.sub("pair[0-9]+", "pair", page)
    assert "The rows come from 2 samplings" in page and "2 rows with amateur models/another" in page
    assert "without the probabilities of expert and amateur: the rows come from 2 samplings" in page
    assert "private/models" not in page


def test_a_report_that_is_broken_off_has_no_page_yet(steps, tmp_path, monkeypatch):
    def break_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_lightreasoner.report.write_report.save_pictures", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_report(steps, str(tmp_path), load_models=False)
    assert not (tmp_path / "report.html").exists()
