"""Loading an expert or an amateur, whichever way the user names it, and calling it at chosen positions only."""

import hashlib
import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError  # raised for files that hold more than tensors; none is read that way
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import cached_file, is_bitsandbytes_available
from transformers.utils.peft_utils import find_adapter_config_file


logger = logging.get_logger(__name__)

# What `head_makes_logits` has found out
_HEAD_MAKES_LOGITS: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")
_VOCABULARY_FILES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json", "tokenization*.py")


def load_model(
    model: str | PreTrainedModel | PeftModel, is_trainable: bool = False, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """
    The model itself, loaded if it is named by an id or a path (of a model or of a PEFT adapter).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What the user passed.
        is_trainable (`bool`): Whether an adapter that is loaded is to be trained further.
        kwargs: For [`~transformers.AutoModelForCausalLM.from_pretrained`]. `dtype` defaults to `"auto"`, the
            checkpoint's own; the device is the process's own.

    Raises:
        `ValueError`: If the weights are not those of the config, or an argument is unknown.
    """
    if not isinstance(model, str):
        return settle_4bit_layers(model)
    try:
        return _load_model(model, is_trainable, **kwargs)
    except UnpicklingError as error:
        raise ValueError(
            f"The model {model!r} cannot be loaded: its weights are damaged, or hold Python objects, which could run "
            "code when they are read. Use a copy with *.safetensors files."
        ) from error
    # What a wrong file or argument sets off, by PyTorch, safetensors, PEFT and transformers
    except (RuntimeError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if "mismatch" in reason:  # with a report of every tensor
            reason = "its weights have other shapes than its config, or for an adapter its base model, asks for"
        raise ValueError(f"The model {model!r} cannot be loaded: {reason}.") from error


def _load_model(model: str, is_trainable: bool, **kwargs: Any) -> PreTrainedModel | PeftModel:
    kwargs.setdefault("dtype", "auto")
    device = PartialState().device
    if "device_map" not in kwargs and device.type != "cpu":
        kwargs["device_map"] = {"": device}
    source, repository = _locate(model, "model", kwargs)
    loaded = settle_4bit_layers(AutoModelForCausalLM.from_pretrained(source, **{**kwargs, **repository}))
    if source == model:
        return loaded
    repository = hub_kwargs(kwargs)
    repository.pop("trust_remote_code", None)  # an adapter has no code of its own
    return PeftModel.from_pretrained(loaded, model, is_trainable=is_trainable, **repository)


def load_config(model: str | PreTrainedModel | PeftModel, name: str = "model", **kwargs: Any) -> PretrainedConfig:
    """
    The model's configuration, without loading the model.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What the user passed.
        name (`str`): What to call it in an error message: "expert", "amateur", "model".
        kwargs: As for [`load_model`]; of them, those count that say where the model is found and how it is quantized.

    Raises:
        `TypeError`: If it is none of the accepted types.
        `ImportError`: If it is to be loaded in 4 or 8 bits and bitsandbytes is not installed.
        `ValueError`: If it is an encoder-decoder model or an encoder, which have no next-token distribution, an
            adapter of virtual tokens, or a folder whose weights are missing or damaged; or if the weights are to go
            where there is no GPU.
    """
    if isinstance(model, PreTrainedModel | PeftModel):
        if isinstance(model, PeftModel):
            check_adapter(model.active_peft_config, name)
        config = get_base_model(model).config
        is_causal = get_base_model(model).can_generate()
    elif isinstance(model, str):
        _check_device_map(kwargs.get("device_map"))
        source = model
        try:
            source, repository = _locate(model, name, kwargs)
            if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
                raise FileNotFoundError(source)
            config = AutoConfig.from_pretrained(source, **repository)
        except (OSError, StrictDataclassError) as error:
            if os.path.isfile(os.path.join(source, "config.json")):
                raise ValueError(
                    f"The config.json of the {name} {source!r} cannot be read: {' '.join(str(error).split())}"
                ) from error
            raise ValueError(
                f"The {name} {source!r} cannot be found. It must be a folder with a config.json, or the id of a model "
                "on the Hub; private and gated models need `hf auth login`, offline ones must be in the cache."
            ) from error
        _check_bitsandbytes(kwargs.get("quantization_config") or getattr(config, "quantization_config", None), name)
        is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
            getattr(config, "auto_map", None) or {}  # code of its own
        )
    else:
        raise TypeError(
            f"The {name} must be a model id, a path, a `PreTrainedModel` or a `PeftModel`, got "
            f"`{type(model).__name__}`."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"The {name} is an encoder-decoder model (`{config.model_type}`). LightReasoner needs a causal language "
            "model, such as Qwen2.5."
        )
    # The mapping of causal models holds encoders too, which are causal with `is_decoder` only
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if is_encoder or not is_causal:
        raise ValueError(
            f"The {name} (`{config.model_type}`) has no next-token distribution. LightReasoner needs a causal "
            "language model, such as Qwen2.5."
        )
    if isinstance(model, str):
        for folder in dict.fromkeys((model, source)):
            _check_weights(folder, name)
    return config


def _check_device_map(device_map: Any) -> None:
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    if any(str(device).startswith("cuda") for device in devices) and not torch.cuda.is_available():
        raise ValueError(
            f"`device_map` asks for a CUDA GPU ({device_map!r}), but PyTorch finds none here. Leave it out, or see to "
            "the driver and the build of PyTorch."
        )


def _check_weights(model: str, name: str) -> None:
    """Refuse a folder without weights or with damaged ones; of every file the header is read."""
    folder = Path(model)
    if not folder.is_dir():  # of the Hub
        return
    if not any(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)):
        raise ValueError(
            f"The {name} {model!r} has no weights: the folder holds no *.safetensors file. Download or save it again."
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}). Download or save it again.") from error


def load_tokenizer(
    model: str | torch.nn.Module, name: str = "model", argument: str = "processing_class", **kwargs: Any
) -> PreTrainedTokenizerBase:
    """
    The tokenizer that lies beside a model; for an adapter without one, beside its base model.

    Args:
        model (`str` or `torch.nn.Module`): Id or path, or a loaded model that knows where it came from.
        name (`str`): What to call the model in an error message.
        argument (`str`): The argument by which the user can pass a tokenizer instead.
        kwargs: As for [`load_model`]; of them, those count that say where the model is found.

    Raises:
        `ValueError`: If there is none, it is damaged, or the model does not know where it came from.
    """
    if isinstance(model, str):
        source, repository = _locate(model, name, kwargs)
        if source != model and _has_tokenizer(model, hub_kwargs(kwargs)):
            # The kind of tokenizer is told by a config.json, which an adapter has not
            config = AutoConfig.from_pretrained(source, **repository)
            own = _load_tokenizer(model, name, {**hub_kwargs(kwargs), "config": config})
            if max(own.get_vocab().values()) < config.get_text_config().vocab_size:
                return own
            logger.warning(
                f"The tokenizer beside the {name} {model!r} has more tokens than the base model has logits. That of "
                "the base model is used."
            )
    else:
        source, repository = get_base_model(model).config._name_or_path, hub_kwargs(kwargs)
    if not source:
        raise ValueError(f"The {name} does not say where its tokenizer is. Pass the tokenizer as `{argument}`.")
    folder = Path(source)
    if folder.is_dir() and not _has_tokenizer(source, repository):  # transformers would make an empty one
        raise ValueError(
            f"There is no tokenizer beside the {name}: {source!r} holds no tokenizer.json. Save the model's tokenizer "
            f"there, or pass it as `{argument}`."
        )
    return _load_tokenizer(source, name, repository)


def _load_tokenizer(source: str, name: str, repository: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, **repository)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"The tokenizer of the {name} {source!r} cannot be loaded: {' '.join(str(error).split()).rstrip('.')}."
        ) from error


def _has_tokenizer(source: str, repository: dict[str, Any]) -> bool:
    """Whether a tokenizer lies in a folder, or in a repository of the Hub."""
    folder = Path(source)
    if folder.is_dir():
        return any(path for pattern in _VOCABULARY_FILES for path in folder.glob(pattern))
    where = {name: value for name, value in repository.items() if name != "trust_remote_code"}
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(source, file, **where, **quietly) is not None for file in files)


def load_generation_config(model: str | PreTrainedModel | PeftModel, **kwargs: Any) -> GenerationConfig:
    """
    The model's generation_config, or what its config says where it has none, without loading the model.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What the user passed.
        kwargs: As for [`load_model`]; of them, those count that say where the model is found.
    """
    if not isinstance(model, str):
        return get_base_model(model).generation_config
    source, repository = _locate(model, "model", kwargs)
    config = AutoConfig.from_pretrained(source, **repository)
    repository.pop("trust_remote_code", None)  # it has no code
    try:
        return GenerationConfig.from_pretrained(source, **repository)
    except OSError:  # as `from_pretrained` of the model does
        return GenerationConfig.from_model_config(config)


def _locate(model: str, name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Id or path of the model, or of the base model of an adapter, and the arguments with which it is found."""
    repository = hub_kwargs(kwargs)
    if (adapter := load_adapter_config(model, name, **repository)) is None:
        return model, repository
    # The user's revision is the adapter's, which names that of its base model
    return adapter.base_model_name_or_path, {**repository, "revision": adapter.revision or "main"}


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where a model is found, not how its weights are loaded."""
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return {name: kwargs[name] for name in names if name in kwargs}


def load_adapter_config(model: str, name: str = "model", **kwargs: Any) -> PeftConfig | None:
    """The configuration of a PEFT adapter, or `None` if `model` is not one; `kwargs` as of [`hub_kwargs`]."""
    kwargs.pop("trust_remote_code", None)  # an adapter has no code of its own
    if find_adapter_config_file(model, **kwargs) is None:
        return None
    try:
        config = PeftConfig.from_pretrained(model, **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"The adapter_config.json of the {name} {model!r} cannot be read: {str(error).rstrip('.')}."
        ) from error
    check_adapter(config, name)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The {name} {model!r} is an adapter that does not name its base model. Set `base_model_name_or_path` in "
            "its adapter_config.json."
        )
    return config


def check_adapter(config: PeftConfig, name: str) -> None:
    """Refuse an adapter of virtual tokens."""
    # Virtual tokens shift the positions at which logits are read, and the base model that generates does not see them
    if config.is_prompt_learning:
        raise ValueError(
            f"The {name} is an adapter of virtual tokens (`{config.peft_type.value}`), which is not supported. Use "
            "one that changes the weights, such as LoRA."
        )


def _check_bitsandbytes(quantization: Any, name: str) -> None:
    if quantization is None or is_bitsandbytes_available():
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        raise ImportError(
            f"Loading the {name} in 4 or 8 bits needs bitsandbytes: `pip install 'trl-lightreasoner[quantization]'`."
        )


def add_quantization(
    kwargs: dict[str, Any], model: Any, quantization_config: BitsAndBytesConfig | None, owner: str, prefix: str = ""
) -> dict[str, Any]:
    """
    The keyword arguments of [`load_model`] with the quantization that the user asked for beside them.

    Args:
        kwargs (`dict[str, Any]`): From the user's `model_init_kwargs`.
        model (`str` or `torch.nn.Module`): What the user passed. A loaded model stays as it is, with a warning.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): What the user passed.
        owner (`str`): Who took it: "trainer", "sampler".
        prefix (`str`): Of the arguments' names, such as "amateur_".

    Raises:
        `ValueError`: If `kwargs` has one too.
    """
    if quantization_config is None:
        return kwargs
    if not isinstance(model, str):
        logger.warning(
            f"You passed `{prefix}quantization_config` to the {owner}, but your model is already instantiated. The "
            f"`{prefix}quantization_config` will be ignored."
        )
        return kwargs
    if "quantization_config" in kwargs:
        raise ValueError(
            f"You set `{prefix}quantization_config` both as a {owner} argument and in "
            f"`args.{prefix}model_init_kwargs`. Please set it in only one place, preferably as a {owner} argument."
        )
    return {**kwargs, "quantization_config": quantization_config}


def settle_4bit_layers(model: torch.nn.Module) -> torch.nn.Module:
    """
    The model itself, whose 4-bit layers no forward pass changes any more. To be called before the first one.

    On a CPU with AVX512-BF16 bitsandbytes repacks the weights for inference in the first pass in evaluation mode;
    training then gets wrong gradients, and saving wrong weights. On any device it casts the biases.

    Raises:
        `ValueError`: If the weights are repacked already.
    """
    for module in model.modules():
        if not hasattr(module, "compute_type_is_set"):  # which bitsandbytes' `Linear4bit` alone has
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "The 4-bit weights of the model were repacked for inference on this CPU by a forward pass; it can no "
                "longer be trained or saved. Load it again and pass it before its first use, or give its path."
            )
        module.support_avx512bf16_for_cpu = False
        if module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)
    return model


def describe_model(model: torch.nn.Module, name: str | None = None) -> dict[str, Any]:
    """
    What tells one expert from another, in values that JSON can hold.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        name (`str`, *optional*): Id or path that the user gave; of an adapter, the model itself does not know it.
    """
    base = get_base_model(model)
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_diff_dict()
    return {
        "model": base.config._name_or_path,
        "revision": getattr(base.config, "_commit_hash", None),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": quantization and {key: str(value) for key, value in quantization.items()},
        "adapter": (name or list(model.active_adapters)) if isinstance(model, PeftModel) else None,
    }


def get_base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def weight_fingerprint(model: torch.nn.Module) -> str:
    """A checksum over the names, shapes, dtypes and bytes of all weights and the active adapters, on every device."""
    adapters = [model.active_adapters, model.get_model_status().enabled] if isinstance(model, PeftModel) else []
    digest = hashlib.sha256(str(adapters).encode())
    for name, tensor in model.state_dict().items():
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        whole = len(content) // 8 * 8
        words = content[:whole].view(torch.int64)
        # The sum (modulo 2**64) sees a change anywhere, the sample sees values that change places
        sample = words[:: max(1, len(words) // 64)].tolist()
        summary = [words.sum().item(), *sample, *content[whole:].tolist()]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {summary}".encode())
    return digest.hexdigest()


def accepts_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the forward can leave out the positions whose logits nobody reads."""
    return "logits_to_keep" in inspect.signature(get_base_model(model).forward).parameters


def has_full_attention(model: torch.nn.Module) -> bool:
    """
    Whether every layer attends to all tokens before its own by PyTorch's scaled dot product, so that whoever masks or
    packs tokens differently gets what the model means.
    """
    config = get_base_model(model).config
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return config._attn_implementation == "sdpa" and layers == {DynamicLayer}


def attention_backends(device: torch.device) -> AbstractContextManager:
    """
    PyTorch's kernels of the scaled dot product without cuDNN's, which can return NaN from the backward pass of a
    padded batch for a loss that is finite (seen with torch 2.11 on an H100, bf16).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def forward_at(model: torch.nn.Module, positions: torch.Tensor, to_keep: bool, **inputs: torch.Tensor) -> Any:
    """
    Run `model` and keep the logits of chosen positions only.

    Args:
        model (`torch.nn.Module`): The model as it is called, wrapped by DDP or not.
        positions (`torch.Tensor` of shape `(batch, length)`, bool): True where logits are wanted. Or, if there is one
            row, where that is: `(n,)`, int64.
        to_keep (`bool`): What [`accepts_logits_to_keep`] says of the model. If False, all logits are computed and the
            rest is dropped afterwards.
        inputs: `input_ids`, `attention_mask` and so on.

    Returns:
        The model's output with `logits` of shape `(positions.sum(), W)` or `(n, W)`, in the order of the batch's rows.
    """
    if to_keep:
        outputs = model(**inputs, logits_to_keep=positions, use_cache=False)
        _check_logits(model, outputs)
        outputs.logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
    else:
        outputs = model(**inputs, use_cache=False)
        _check_logits(model, outputs)
        logits = outputs.logits if positions.ndim == 2 else outputs.logits[0]
        outputs.logits = logits[positions.to(logits.device)]
    return outputs


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on another device, without waiting until a GPU has done what it had to do before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def hidden_states_at(model: torch.nn.Module, positions: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor | None:
    """
    What the output head would get at chosen positions.

    Args:
        model (`torch.nn.Module`): The model.
        positions (`torch.Tensor` of shape `(n,)`, int64): Where, in the flattened batch, hidden states are wanted.
        input_ids (`torch.Tensor` of shape `(batch, length)`): Ids, padding behind them if there is any.

    Returns:
        `(n, hidden_size)`, from which `get_output_embeddings()` makes the logits; or `None` where
        [`head_makes_logits`] is false.
    """
    if not head_makes_logits(model, input_ids):
        return None
    hidden_states = get_base_model(model).get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden_states.flatten(0, 1)[positions]


def head_makes_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> bool:
    """
    Whether the logits of a model are what its output head makes of its last hidden states. Some models scale them, cap
    them or take tokens out, which shows in a few tokens of `input_ids` `(batch, length)`, read once a model.
    """
    base = get_base_model(model)
    if base not in _HEAD_MAKES_LOGITS:
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        makes = decoder is not None and decoder is not base and head is not None
        if makes:
            few = {"input_ids": input_ids[:1, :8], "use_cache": False}
            outputs = base(**few)
            _check_logits(base, outputs)
            logits, made = outputs.logits, head(decoder(**few).last_hidden_state)
            makes = logits.shape == made.shape and torch.allclose(logits, made, rtol=0, atol=0, equal_nan=True)
        _HEAD_MAKES_LOGITS[base] = makes
    return _HEAD_MAKES_LOGITS[base]


def _check_logits(model: torch.nn.Module, outputs: Any) -> None:
    if getattr(outputs, "logits", None) is None:
        raise ValueError(
            f"`{type(model).__name__}` returned no logits. LightReasoner needs a causal language model whose forward "
            "gives an output with `logits`."
        )
