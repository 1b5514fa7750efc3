"""vLLM in place of `generate_greedy`: an engine in this process, or a running server.

The contract is that of `generate_greedy`: prompts are token ids, every step takes the most probable real token by raw
logits, and any of `eos_ids` ends a completion and is kept once. In fp32 the completions are the same. In half
precision vLLM's kernels round differently from those of transformers, so near ties can be decided differently. The
scores always come from the expert and the amateur themselves.

The server is vLLM's own (`vllm serve`), used through `/v1/completions`, which takes and returns token ids. TRL's
`VLLMClient` uses the same server, but needs vLLM in this environment, which a server is meant to avoid.
"""

import importlib.util
import json
import os
import time
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from transformers import logging

from ..models.adapter_loading import load_adapter_config
from ..models.forward import rope_switch
from ..models.loading import hub_kwargs, load_config
from ..safe_path import start_processes_safely
from ..vocabulary import Vocabulary


if TYPE_CHECKING:
    from ..evaluation.evaluation_config import EvaluationConfig
    from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig


logger = logging.get_logger(__name__)

# Everything is set: a server takes what a request does not set from the checkpoint's generation_config
_GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # the checkpoint's EOS. Ours are in `stop_token_ids`
}


def check_vllm(
    args: "ContrastiveSamplingConfig | EvaluationConfig",
    expert: Any,
    num_processes: int,
    name: str = "expert",
    **kwargs: Any,
) -> None:
    """
    Refuse models and settings that vLLM cannot generate with, before anything is loaded.

    Args:
        args ([`ContrastiveSamplingConfig`] or [`EvaluationConfig`]): Settings.
        expert: What the user passed.
        num_processes (`int`): Number of processes that share the run.
        name (`str`): What to call the expert in an error message.
        kwargs: Arguments to load the expert with, as for [`load_model`].

    Raises:
        `ImportError`: If mode `"colocate"` is requested and vLLM is not installed.
        `ValueError`: If vLLM would generate with a different model from the one that scores, or if several processes
            would run it on one GPU.
    """
    if not isinstance(expert, str):
        raise ValueError(
            f"With `use_vllm`, the {name} must be given by id or path, from where vLLM loads it too; got "
            f"`{type(expert).__name__}`. A model in memory can be saved with `save_pretrained`."
        )
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            f"vLLM loads the {name} as its checkpoint is, and would not generate with the quantized one that scores. "
            f"Leave out `use_vllm` or the quantization of the {name}."
        )
    if args.vllm_mode == "server":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "`use_vllm` needs vLLM: `pip install 'trl-lightreasoner[vllm]'`, or take a server that runs elsewhere "
            "with `vllm_mode='server'`."
        )
    if num_processes > 1:
        raise ValueError(
            f"{num_processes} processes cannot each run vLLM beside the models. Start one process, or a server for "
            "all with `vllm serve`, and set `vllm_mode='server'`."
        )
    if load_adapter_config(expert, name, **hub_kwargs(kwargs)) is not None:
        raise ValueError(
            f"The {name} {expert!r} is an adapter, and vLLM beside the models needs a plain model. Merge it with "
            f"`lightreasoner merge --model {expert} --output_dir MODEL`, and give MODEL as the {name}."
        )


def connect_vllm(
    args: "ContrastiveSamplingConfig | EvaluationConfig",
    expert: str,
    max_length: int,
    name: str = "expert",
    **kwargs: Any,
) -> "ColocatedVLLM | VLLMServer":
    """
    Start or connect to vLLM, as set in `args`.

    Args:
        args ([`ContrastiveSamplingConfig`] or [`EvaluationConfig`]): Settings.
        expert (`str`): Id or path of the expert.
        max_length (`int`): Tokens of the longest prompt and its completion together.
        name (`str`): What to call the expert in an error message.
        kwargs: Arguments that the expert is loaded with, as for [`load_model`].

    Raises:
        `ValueError`: If vLLM would read contexts with a different rope.
    """
    switch = rope_switch(load_config(expert, name, **kwargs))
    if switch is not None and (args.vllm_mode == "server" or max_length > switch):
        raise ValueError(
            f"The {name} reads contexts beyond {switch} tokens with another rope (longrope), which vLLM then uses for "
            "every context. Leave out `use_vllm`."
        )
    if args.vllm_mode == "server":
        return VLLMServer(expert, args.vllm_server_base_url, args.vllm_server_timeout, name)
    kwargs = {name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}
    return ColocatedVLLM(expert, max_length, args.vllm_gpu_memory_utilization, name, **kwargs)


class VLLMGeneration:
    """Base class of both modes. A call has the arguments and the result of [`generate_greedy`]."""

    version: str

    def __call__(
        self,
        model: torch.nn.Module,
        prompt_ids: list[list[int]],
        vocabulary: Vocabulary,
        eos_ids: list[int],
        max_new_tokens: int,
    ) -> list[list[int]]:
        settings = {**_GREEDY, "max_tokens": max_new_tokens, "stop_token_ids": eos_ids}
        completions = self._complete(model, prompt_ids, settings)
        # An answer made of real tokens is correct even if other tokens were allowed. So the list of allowed tokens,
        # which is as long as the vocabulary, is sent only for the answers that contain other tokens.
        astray = [i for i, ids in enumerate(completions) if not vocabulary.contains(torch.tensor(ids)).all()]
        if astray:
            settings["allowed_token_ids"] = vocabulary.ids.tolist()
            again = self._complete(model, [prompt_ids[i] for i in astray], settings)
            for i, ids in zip(astray, again, strict=True):
                completions[i] = ids
        for ids in completions:
            end = next((position for position, token_id in enumerate(ids) if token_id in eos_ids), max_new_tokens - 1)
            if len(ids) != end + 1:
                raise ValueError(
                    f"vLLM ended a completion after {len(ids)} tokens, where an EOS token or `max_new_tokens` would "
                    f"have ended it after {end + 1}. Give it neither stop tokens nor a shorter context of its own."
                )
        return completions

    def _complete(
        self, model: torch.nn.Module, prompt_ids: list[list[int]], settings: dict[str, Any]
    ) -> list[list[int]]:
        raise NotImplementedError

    def close(self) -> None:
        """Release its resources."""


class ColocatedVLLM(VLLMGeneration):
    """
    An engine in this process, created at the first call.

    Args:
        expert (`str`): Id or path of the expert.
        max_length (`int`): Tokens of the longest prompt and its completion, for which the engine reserves memory.
        gpu_memory_utilization (`float`): Fraction of the GPU's memory that it uses.
        name (`str`): What to call the expert in an error message.
        kwargs: `revision` and `trust_remote_code` of the expert.
    """

    def __init__(
        self, expert: str, max_length: int, gpu_memory_utilization: float, name: str = "expert", **kwargs: Any
    ):
        start_processes_safely()  # vLLM starts several
        import vllm

        self.version = vllm.__version__
        self.llm: Any = None
        self.expert, self.name = expert, name
        self.kwargs = {"max_model_len": max_length, "gpu_memory_utilization": gpu_memory_utilization, **kwargs}

    def _complete(
        self, model: torch.nn.Module, prompt_ids: list[list[int]], settings: dict[str, Any]
    ) -> list[list[int]]:
        from vllm import LLM, SamplingParams

        if self.llm is None:
            # By default, vLLM would load an fp32 checkpoint as fp16
            dtype = str(model.dtype).removeprefix("torch.")
            try:
                self.llm = LLM(self.expert, dtype=dtype, generation_config="vllm", **self.kwargs)
            except Exception as error:  # of many types, already logged by the engine
                raise ValueError(
                    f"vLLM cannot load the {self.name} {self.expert!r}: {' '.join(str(error).split()).rstrip('.')}."
                ) from error
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = self.llm.generate(prompts, SamplingParams(**settings, detokenize=False), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        # Otherwise its processes, and their memory on the GPU, would outlive the object
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None


class VLLMServer(VLLMGeneration):
    """
    A running server.

    Args:
        expert (`str`): Id or path of the expert, which the server must serve under this name or from this path.
        base_url (`str`): Such as `"http://localhost:8000"`.
        timeout (`float`): Seconds to wait for the server.
        name (`str`): What to call the expert in an error message.

    Raises:
        `ConnectionError`: If the server is not up in time.
        `ValueError`: If it serves another model, or is not a vLLM server.
    """

    def __init__(self, expert: str, base_url: str, timeout: float, name: str = "expert"):
        self.expert = expert
        self.url = base_url.rstrip("/")
        cards = self._wait_for_models(timeout)
        # A model's path can differ between two machines. An adapter's card has the adapter's path
        names = [(card["id"], card.get("root") or card["id"]) for card in cards]
        fitting = [each for each in names if os.path.realpath(expert) in map(os.path.realpath, each)]
        if not fitting:
            served = ", ".join(repr(root) for _, root in names)
            raise ValueError(
                f"The vLLM server at {self.url} serves {served} and not the {name} {expert!r}. Start it with "
                f"`vllm serve {expert}`, or, if that is the {name} under another name, with "
                f"`--served-model-name {expert}`."
            )
        self.model = fitting[0][0]
        self.version = self._request("version", "/version")

    def _wait_for_models(self, timeout: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self._request("data", "/v1/models", timeout=timeout)
            except ConnectionError as error:
                if time.monotonic() >= deadline:
                    raise
                logger.warning_once(f"{error} Waiting up to {timeout:g} seconds.")
                time.sleep(min(1, timeout))

    def _complete(
        self, model: torch.nn.Module, prompt_ids: list[list[int]], settings: dict[str, Any]
    ) -> list[list[int]]:
        body = {"model": self.model, "prompt": prompt_ids, "return_token_ids": True, **settings}
        choices = sorted(self._request("choices", "/v1/completions", body), key=lambda choice: choice["index"])
        # It also returns the prompts, which shows whether it read what was sent
        if [choice.get("prompt_token_ids") for choice in choices] != prompt_ids:
            raise ValueError(
                f"The vLLM server at {self.url} gave {len(choices)} answers to {len(prompt_ids)} prompts, and not "
                "one to each, with its token ids. vLLM 0.22 or newer does."
            )
        return [choice["token_ids"] for choice in choices]

    def _request(self, key: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """The value under `key` in the response, a JSON object."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(self.url + path, data, {"Content-Type": "application/json"})
            with urlopen(request, timeout=timeout) as response:
                return json.load(response)[key]
        except HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                text = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                pass
            raise ValueError(
                f"The vLLM server at {self.url} answered {path} with status {error.code}: {text.rstrip('.')}."
            ) from error
        except (OSError, HTTPException) as error:
            raise ConnectionError(
                f"The vLLM server at {self.url} cannot be reached ({error}). Start it with `vllm serve {self.expert}` "
                "and run the same again, or name another with `vllm_server_base_url`."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"What answers at {self.url} is no vLLM server: {path} gave no JSON object with {key!r}."
            ) from error
