"""vLLM as the generator: against stand-ins for its server and its package, and the true package where there is one."""

import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler, sampling_metadata
from trl_lightreasoner.commands.cli import main
from trl_lightreasoner.generation.greedy import generate_greedy
from trl_lightreasoner.generation.vllm import VLLMServer
from trl_lightreasoner.sampling import contrastive_step_sampler, model_pair
from trl_lightreasoner.steps.writer import StepWriter
from trl_lightreasoner.vocabulary import model_vocabulary

from ..conftest import QUESTIONS, make_model
from ..generation.test_greedy import make_prompts


HAS_VLLM = importlib.util.find_spec("vllm") is not None
# What a request must say, lest the checkpoint's generation_config have a say
GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
}


@torch.no_grad()
def answer(model, prompt_ids: list[int], settings: dict) -> list[int]:
    """One completion as vLLM gives it: every column can be chosen unless the settings say which."""
    allowed = torch.tensor(settings.get("allowed_token_ids") or range(model.config.vocab_size))
    completion = []
    while len(completion) < settings["max_tokens"]:
        logits = model(torch.tensor([prompt_ids + completion])).logits[0, -1]
        completion.append(int(allowed[logits[allowed].argmax()]))
        if completion[-1] in settings["stop_token_ids"]:
            break
    return completion


class StandIn:
    """A server that speaks as much of vLLM's protocol as is needed, with a tiny model behind."""

    def __init__(self, path: str):
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.cards = [{"id": path, "root": path}]
        self.requests = []
        self.change = lambda choices: choices  # on their way out
        self.refusal = None  # status and body
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = {"/v1/models": {"data": stand_in.cards}, "/version": {"version": "0.30.0"}}[self.path]
                self.reply(200, json.dumps(content))

            def do_POST(self):
                assert self.path == "/v1/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.requests.append(body)
                if stand_in.refusal is not None:
                    return self.reply(*stand_in.refusal)
                choices = [
                    {"index": index, "prompt_token_ids": ids, "token_ids": answer(stand_in.model, ids, body)}
                    for index, ids in enumerate(body["prompt"])
                ]
                self.reply(200, json.dumps({"choices": stand_in.change(choices)}))

            def reply(self, status, text):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.handler = Handler
        self.start()

    def start(self, port: int = 0) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self.handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(expert_path):
    stand_in = StandIn(expert_path)
    yield stand_in
    stand_in.stop()


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package `vllm`, which records what it is given."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.__version__ = "0.30.0"
    module.engines, module.calls, module.shutdown = [], [], Mock()

    class SamplingParams:
        def __init__(self, **kwargs):
            self.kwargs = kwargs

    class LLM:
        def __init__(self, model, **kwargs):
            module.engines.append((model, kwargs))
            self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=module.shutdown))
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=kwargs["dtype"])

        def generate(self, prompts, sampling_params, use_tqdm):
            module.calls.append((prompts, sampling_params.kwargs))
            outputs = [answer(self.model, prompt["prompt_token_ids"], sampling_params.kwargs) for prompt in prompts]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(ids))]) for ids in outputs]

    module.SamplingParams, module.LLM = SamplingParams, LLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture
def no_package(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name == "vllm" else find_spec(name))


@pytest.fixture
def make_sampler(expert_path, amateur_path, tmp_path):
    def make(server=None, expert=None, output_dir="steps", quantization_config=None, **settings):
        if server is not None:
            settings = {"vllm_mode": "server", "vllm_server_base_url": server.url, **settings}
        settings = {"use_vllm": True, "max_new_tokens": 12, "beta": 1.95, "per_device_batch_size": 4, **settings}
        args = ContrastiveSamplingConfig(str(tmp_path / output_dir), **settings)
        return ContrastiveStepSampler(
            expert or expert_path, amateur_path, args, quantization_config=quantization_config
        )

    return make


@pytest.fixture
def plain(make_sampler, prompts):
    return make_sampler(output_dir="plain", use_vllm=False).sample(prompts)


@pytest.fixture
def unloadable(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(model_pair, "load_model", fail)


@pytest.fixture
def vocabulary(tokenizer, expert):
    return model_vocabulary(tokenizer, expert.config.vocab_size)


@pytest.fixture
def generator(server, expert_path):
    return VLLMServer(expert_path, server.url, timeout=5)


def rows_of(dataset: Dataset) -> list[dict]:
    return dataset.remove_columns("sampling_metadata").to_list()


# What comes out


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_the_dataset_is_that_of_plain_generation(mode, server, package, make_sampler, prompts, plain):
    made = make_sampler(server if mode == "server" else None).sample(prompts)
    assert rows_of(made) == rows_of(plain)
    metadata, expected = sampling_metadata(made), sampling_metadata(plain)
    assert (metadata["settings"].pop("use_vllm"), expected["settings"].pop("use_vllm")) == (True, False)
    assert metadata["versions"].pop("vllm") == "0.30.0"
    assert metadata == expected


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_server_gives_what_generate_greedy_gives(count, generator, expert, vocabulary):
    naive = generate_greedy(expert, make_prompts(), vocabulary, [], 10)
    eos_ids = [naive[1][2], naive[3][5], naive[2][0]][:count]
    expected = generate_greedy(expert, make_prompts(), vocabulary, eos_ids, 10)
    assert generator(expert, make_prompts(), vocabulary, eos_ids, 10) == expected


def test_a_request_leaves_nothing_to_the_servers_defaults(generator, server, expert, expert_path, vocabulary):
    generator(expert, make_prompts(), vocabulary, [297, 5], 7)
    assert server.requests[0] == {
        "model": expert_path,
        "prompt": make_prompts(),
        "return_token_ids": True,
        "max_tokens": 7,
        "stop_token_ids": [297, 5],
        **GREEDY,
    }


@pytest.mark.parametrize("value", [1e4, float("inf"), float("nan")])
def test_padded_columns_are_never_chosen(value, generator, server, expert, vocabulary):
    with torch.no_grad():
        server.model.lm_head.weight[300:] = value
    expected = generate_greedy(expert, make_prompts(), vocabulary, [], 10)
    assert generator(expert, make_prompts(), vocabulary, [], 10) == expected


def test_only_prompts_that_went_astray_are_sent_again(generator, server, expert, vocabulary):
    with torch.no_grad():
        server.model.lm_head.weight[300:] = 0

    def lead_one_astray(choices):
        if len(server.requests) == 1:
            choices[2]["token_ids"][4] = 305
        return choices

    server.change = lead_one_astray
    completions = generator(expert, make_prompts(), vocabulary, [], 10)
    assert completions == generate_greedy(expert, make_prompts(), vocabulary, [], 10)
    first, second = server.requests
    assert second == {**first, "prompt": make_prompts()[2:3], "allowed_token_ids": list(range(300))}
    assert "allowed_token_ids" not in first


def test_answers_may_come_in_any_order(generator, server, expert, vocabulary):
    expected = generator(expert, make_prompts(), vocabulary, [297], 10)
    server.change = lambda choices: choices[::-1]
    assert generator(expert, make_prompts(), vocabulary, [297], 10) == expected


# What a server may do wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:-1], "ended a completion after 9 tokens, where .* ended it after 10"),
        (lambda ids: [*ids, 7], "ended a completion after 11 tokens, where .* ended it after 10"),
        (lambda ids: [], "ended a completion after 0 tokens, where .* ended it after 10"),
        (lambda ids: [ids[0], 297, *ids[2:]], "ended a completion after 10 tokens, where .* ended it after 2"),
    ],
)
def test_a_completion_that_ends_elsewhere_is_refused(change, message, generator, server, expert, vocabulary):
    server.change = lambda choices: [
        {**choice, "token_ids": change([7] * 10)} if choice["index"] == 1 else choice for choice in choices
    ]
    with pytest.raises(ValueError, match=f"^vLLM {message}"):
        generator(expert, make_prompts(), vocabulary, [297], 10)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda choices: choices[:-1], 3),
        (lambda choices: [*choices, choices[0]], 5),
        (lambda choices: [], 0),
        (lambda choices: [{**choice, "prompt_token_ids": [1, *choice["prompt_token_ids"]]} for choice in choices], 4),
        (lambda choices: [{"index": choice["index"], "text": "four"} for choice in choices], 4),
    ],
    ids=["fewer", "more", "none", "another prompt", "text only"],
)
def test_anything_but_one_answer_a_prompt_is_refused(change, count, generator, server, expert, vocabulary):
    server.change = change
    with pytest.raises(
        ValueError, match=f"gave {count} answers to 4 prompts, and not one to each, with its token ids"
    ):
        generator(expert, make_prompts(), vocabulary, [297], 10)


@pytest.mark.parametrize(
    ("body", "told"),
    [('{"error": {"message": "The context is 16 tokens."}}', "The context is 16 tokens."), ("Bad day", "Bad day.")],
)
def test_what_the_server_refuses_is_told(body, told, server, make_sampler, prompts):
    server.refusal = (400, body)
    with pytest.raises(ValueError) as error:
        make_sampler(server).sample(prompts)
    assert str(error.value) == f"The vLLM server at {server.url} answered /v1/completions with status 400: {told}"


def test_a_server_that_is_not_there_is_named(server, make_sampler, prompts, unloadable, expert_path):
    server.stop()
    with pytest.raises(ConnectionError, match="cannot be reached .* Start it with `vllm serve ") as error:
        make_sampler(server, vllm_server_timeout=0.1).sample(prompts)
    assert server.url in str(error.value) and expert_path in str(error.value)


def test_a_server_that_comes_up_late_is_waited_for(server, expert_path):
    server.stop()
    timer = threading.Timer(0.5, server.start, [server.server.server_port])
    timer.start()
    start = time.monotonic()
    assert VLLMServer(expert_path, server.url, timeout=30).version == "0.30.0"
    assert 0.5 <= time.monotonic() - start < 10


def test_a_run_goes_on_when_the_server_is_back(server, make_sampler, prompts, plain, caplog):
    writes = StepWriter.write

    def stop_the_server(writer, *args):
        writes(writer, *args)
        server.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepWriter, "write", stop_the_server)
        with pytest.raises(ConnectionError, match="cannot be reached .* and run the same again"):
            make_sampler(server).sample(prompts)
    server.start(server.server.server_port)
    assert rows_of(make_sampler(server).sample(prompts)) == rows_of(plain)
    assert "4 of 6 prompts are already sampled" in caplog.text


@pytest.mark.parametrize(
    ("root", "name", "fits"),
    [
        ("other", "other", False),
        ("expert", "expert", True),
        ("expert", "short", True),
        ("other", "expert", True),
        ("relative", "short", True),
        (None, "expert", True),
        (None, "other", False),
    ],
)
def test_the_server_must_serve_the_expert(root, name, fits, server, make_sampler, prompts, expert_path, unloadable):
    names = {"expert": expert_path, "relative": os.path.relpath(expert_path)}
    server.cards = [{"id": names.get(name, name), "root": names.get(root, root)}]
    with pytest.raises(AssertionError if fits else ValueError) as error:
        make_sampler(server).sample(prompts)
    if not fits:
        assert f"serves 'other' and not the expert {expert_path!r}. Start it with " in str(error.value)


def test_the_model_asked_for_is_the_expert_among_several(server, expert_path, expert, vocabulary):
    # As of a server with `--lora-modules`
    server.cards = [{"id": "base", "root": "base"}, {"id": "tuned", "root": expert_path, "parent": "base"}]
    VLLMServer(expert_path, server.url, timeout=5)(expert, [[1]], vocabulary, [], 1)
    assert server.requests[0]["model"] == "tuned"


@pytest.mark.parametrize("text", ["<html>", "[]", "{}", '"data"'])
def test_another_server_is_told_apart(text, server, expert_path, monkeypatch):
    monkeypatch.setattr(server.handler, "do_GET", lambda handler: handler.reply(200, text))
    with pytest.raises(ValueError, match=r"is no vLLM server: /v1/models gave no JSON object with 'data'\."):
        VLLMServer(expert_path, server.url, timeout=5)


# An engine of our own


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_what_the_engine_is_given(dtype, expected, package, make_sampler, prompts, expert_path):
    sampler = make_sampler(
        dtype=dtype, vllm_gpu_memory_utilization=0.5, model_init_kwargs={"revision": "main", "use_safetensors": True}
    )
    made = sampler.sample(prompts)
    longest = max(map(len, made["prompt_ids"]))
    ((model, kwargs),) = package.engines
    assert model == expert_path
    assert kwargs == {
        "dtype": expected,
        "max_model_len": longest + 12,
        "gpu_memory_utilization": 0.5,
        "generation_config": "vllm",
        "revision": "main",
        "trust_remote_code": False,
    }
    given, settings = package.calls[0]
    longest_first = sorted(made["prompt_ids"], key=len, reverse=True)
    assert given == [{"prompt_token_ids": ids} for ids in longest_first[:4]]
    settings.pop(
        "allowed_token_ids", None
    )  # where a padded column of the random model won, in the same call's second go
    assert settings == {**GREEDY, "max_tokens": 12, "stop_token_ids": [297], "detokenize": False}


@pytest.mark.parametrize("fails", [False, True])
def test_the_engine_is_shut_down_when_sampling_ends(fails, package, make_sampler, prompts, monkeypatch):
    sampler = make_sampler()
    if fails:
        monkeypatch.setattr(StepWriter, "write", Mock(side_effect=OSError("The disk is full.")))
        with pytest.raises(OSError, match="The disk is full"):
            sampler.sample(prompts)
    else:
        sampler.sample(prompts)
    package.shutdown.assert_called_once_with()


def test_no_engine_is_made_when_nothing_is_left_to_sample(package, make_sampler, prompts):
    first = make_sampler().sample(prompts)
    assert rows_of(make_sampler().sample(prompts)) == rows_of(first)
    assert len(package.engines) == package.shutdown.call_count == 1


def test_an_engine_that_does_not_start_is_one_sentence(package, make_sampler, prompts, monkeypatch, expert_path):
    def fail(*args, **kwargs):
        raise RuntimeError("Engine core initialization failed.\nSee root cause above.")

    monkeypatch.setattr(package, "LLM", fail)
    with pytest.raises(ValueError) as error:
        make_sampler().sample(prompts)
    assert str(error.value) == (
        f"vLLM cannot load the expert {expert_path!r}: Engine core initialization failed. See root cause above."
    )


# What is refused before anything is loaded


def test_vllm_that_is_not_installed_is_named(no_package, make_sampler, unloadable):
    with pytest.raises(ImportError, match=r"`use_vllm` needs vLLM: `pip install 'trl-lightreasoner\[vllm\]'`"):
        make_sampler()


def test_a_server_needs_no_vllm_here(no_package, server, make_sampler, prompts, plain):
    assert rows_of(make_sampler(server).sample(prompts)) == rows_of(plain)


def test_the_program_tells_it_in_a_sentence(no_package, expert_path, amateur_path, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": QUESTIONS[0]}) + "\n")
    flags = {"expert": expert_path, "amateur": amateur_path, "dataset_name": tmp_path / "prompts.jsonl"}
    argv = ["sample", "--output_dir", str(tmp_path / "steps"), "--use_vllm"]
    assert main([*argv, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]) == 2
    *_, line = capsys.readouterr().err.rstrip("\n").split("\n")
    assert line.startswith("lightreasoner sample: error: `--use_vllm` needs vLLM: `pip install ")


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_an_expert_in_memory_is_refused(mode, package, server, make_sampler, expert):
    with pytest.raises(ValueError, match="the expert must be given by id or path.*; got `Qwen2ForCausalLM`"):
        make_sampler(server if mode == "server" else None, expert)


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_a_quantized_expert_is_refused(mode, package, server, make_sampler, monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.models.loading.is_bitsandbytes_available", lambda: True)
    with pytest.raises(ValueError, match="Leave out `use_vllm` or the quantization of the expert"):
        make_sampler(server if mode == "server" else None, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_an_adapter_is_merged_first_or_served(package, server, make_sampler, prompts, expert, tmp_path):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = str(tmp_path / "adapter")
    model = get_peft_model(expert, config)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="is an adapter.*Merge it with `lightreasoner merge --model "):
        make_sampler(expert=folder)
    server.model, server.cards = model.merge_and_unload(), [{"id": "tuned", "root": folder}]
    made = make_sampler(server, folder).sample(prompts)
    plain = make_sampler(expert=folder, output_dir="plain", use_vllm=False).sample(prompts)
    assert made["completion_ids"] == plain["completion_ids"]


def test_processes_share_a_server_and_not_a_gpu(package, make_sampler, monkeypatch):
    class Two(contrastive_step_sampler.Processes):
        def __init__(self):
            self.index, self.count = 0, 2

    monkeypatch.setattr(contrastive_step_sampler, "Processes", Two)
    make_sampler(vllm_mode="server")
    with pytest.raises(ValueError, match="^2 processes cannot each run vLLM.* `vllm_mode='server'`"):
        make_sampler()


def test_given_completions_leave_nothing_to_generate(server, make_sampler, unloadable):
    dataset = Dataset.from_dict({"prompt": ["2+2="], "completion": ["4"]})
    with pytest.raises(ValueError, match="^The dataset has a column 'completion', so there is nothing for vLLM"):
        make_sampler(server).sample(dataset)


def test_rows_of_one_run_come_from_one_generator(server, make_sampler, prompts):
    make_sampler(server).sample(prompts)
    with pytest.raises(ValueError, match="use_vllm"):
        make_sampler(use_vllm=False).sample(prompts)


# The true package


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllm_itself_gives_what_generate_greedy_gives(make_sampler, prompts, tokenizer, tmp_path):
    import psutil  # which vLLM needs

    # vLLM has no kernels for heads as small as those of the other models here
    model = make_model(tokenizer, hidden_size=128)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = [297, 5]
    folder = str(tmp_path / "expert")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"max_new_tokens": 24, "beta": 0.5}
    plain = make_sampler(expert=folder, output_dir="plain", use_vllm=False, **settings).sample(prompts)
    # Left free, it would now and then choose a column that no token owns
    free = [answer(model, ids, {"max_tokens": 24, "stop_token_ids": [297, 5]}) for ids in plain["prompt_ids"]]
    assert 0 < sum(max(ids) >= 300 for ids in free) < len(prompts)
    sampler = make_sampler(expert=folder, **settings)
    assert rows_of(sampler.sample(prompts)) == rows_of(plain)
    assert not any("EngineCore" in child.name() for child in psutil.Process().children())
