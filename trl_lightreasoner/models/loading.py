"""Load a model, its config and its tokenizer, however the user names it."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError  # raised for files that hold more than tensors. Nothing is unpickled here
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    is_bitsandbytes_available,
)

from .adapter_loading import (
    check_adapter,
    count_saved_embeddings,
    load_adapter,
    load_adapter_config,
    load_generation_config,
    name_tensors,
)
from .hub_access import find_file, from_cache_if_unreachable
from .weights import get_base_model, is_peft_model, settle_4bit_layers


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel


logger = logging.get_logger(__name__)

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")
_VOCABULARY_FILES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json", "tokenization*.py")


@from_cache_if_unreachable
def load_model(
    model: "str | PreTrainedModel | PeftModel", is_trainable: bool = False, **kwargs: Any
) -> "PreTrainedModel | PeftModel":
    """
    Load a model or a PEFT adapter given by id or path. A model is returned as it is.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What the user passed.
        is_trainable (`bool`): Whether a loaded adapter will be trained further.
        kwargs: For [`~transformers.AutoModelForCausalLM.from_pretrained`]. `dtype` defaults to `"auto"`, as in
            [`resolve_dtype`], and the device to that of the process. With a `device_map`, `"auto"` is always the
            checkpoint's own.

    Raises:
        `ValueError`: If the weights do not fit the config, or an argument is unknown.
    """
    if not isinstance(model, str):
        return settle_4bit_layers(model)
    try:
        return _load_model(model, is_trainable, **kwargs)
    except UnpicklingError as error:
        raise ValueError(
            f"The model {model!r} cannot be loaded: its weights are damaged, or hold Python objects, which could run "
            "code when loaded. Use a copy with *.safetensors files."
        ) from error
    # Raised by PyTorch, safetensors, PEFT and transformers for a wrong file or argument
    except (RuntimeError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"The model {model!r} cannot be loaded: {' '.join(str(error).split()).rstrip('.')}."
        ) from error


def _load_model(model: str, is_trainable: bool, **kwargs: Any) -> "PreTrainedModel | PeftModel":
    kwargs.setdefault("dtype", "auto")
    device = PartialState().device
    source, repository = _locate(model, "model", kwargs)
    config = AutoConfig.from_pretrained(source, **repository)
    if "device_map" not in kwargs:
        kwargs["dtype"] = resolve_dtype(kwargs["dtype"], config, device.type, kwargs.get("quantization_config"))
        if device.type != "cpu":
            kwargs["device_map"] = {"": device}
    # Different shapes are reported with the other misfits
    kwargs |= {**repository, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded, info = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    unexpected = set(info["unexpected_keys"]) - {name for name, _ in loaded.named_buffers()}  # computed on loading
    if is_text_part(loaded, config):
        loaded._other_parts = sorted(unexpected)
        unexpected = set()  # those of its other parts
    misfits = {
        "missing": info["missing_keys"],
        "unexpected": unexpected,
        "of another shape": {name for name, *_ in info["mismatched_keys"]} | _other_shapes(loaded),
    }
    if any(misfits.values()):
        raise ValueError(
            f"The weights of the model {source!r} do not fit its config.json: {name_tensors(misfits)}. Save the model "
            "again with `save_pretrained`, or fix its config.json."
        )
    settle_4bit_layers(loaded)
    if source == model:
        return loaded
    return load_adapter(loaded, model, is_trainable, **hub_kwargs(kwargs))


def resolve_dtype(
    dtype: str | torch.dtype, config: PretrainedConfig, device_type: str, quantization_config: Any = None
) -> str | torch.dtype:
    """
    The `dtype` to load a checkpoint in. It is what the user asked for, but `"auto"` becomes `"float32"` for a float16
    checkpoint on a CPU. Most CPUs compute several times slower in float16, and float32 holds the same weights. A
    quantized model keeps `"auto"`.

    Example:

    ```python
    >>> config = PretrainedConfig(dtype="float16")
    >>> resolve_dtype("auto", config, "cpu"), resolve_dtype("auto", config, "cuda")
    ('float32', 'auto')

    ```
    """
    is_quantized = (quantization_config or getattr(config, "quantization_config", None)) is not None
    is_half = config.get_text_config().dtype == torch.float16
    return "float32" if dtype == "auto" and device_type == "cpu" and is_half and not is_quantized else dtype


def _other_shapes(model: PreTrainedModel) -> set[str]:
    """Names of weights in 4 or 8 bits with a wrong shape, which transformers does not check."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module.weight).__module__.startswith("bitsandbytes")
        and tuple((getattr(module.weight, "quant_state", None) or module.weight).shape)
        != (module.out_features, module.in_features)
    }


def is_text_part(model: PreTrainedModel, config: PretrainedConfig) -> bool:
    """Whether a model is only the text part of a config's model, which also has vision or audio."""
    return config.model_type != model.config.model_type and "text_config" in config.sub_configs


def left_out(model: PreTrainedModel, source: str, **kwargs: Any) -> list[str]:
    """
    Names of a checkpoint's tensors that its causal language model, as loaded by [`load_model`], does not use: those
    that transformers ignores, and those of other parts, such as vision. `kwargs` as for [`hub_kwargs`].
    """
    if index := find_file(source, SAFE_WEIGHTS_INDEX_NAME, **kwargs):
        names = list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    elif path := find_file(source, SAFE_WEIGHTS_NAME, **kwargs):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    else:
        names = []
    kept = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    ignored = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    passed_over = {name for name in ignored if not any(each.endswith(name) for each in kept)}  # or computed on loading
    return sorted(passed_over.union(getattr(model, "_other_parts", ())))


def name_parts(names: list[str]) -> str:
    """
    The parts of a model to which tensors belong, each with its number of tensors.

    Example:

    ```python
    >>> name_parts(["model.visual.a.weight", "model.visual.b.weight", "mtp.weight"])
    'model.visual (2), mtp (1)'

    ```
    """
    parts = [name.split(".") for name in names]
    counts = Counter(".".join(each[: 2 if each[0] == "model" else 1]) for each in parts)
    return ", ".join(f"{part} ({count:,})" for part, count in counts.most_common())


@from_cache_if_unreachable
def load_config(model: "str | PreTrainedModel | PeftModel", name: str = "model", **kwargs: Any) -> PretrainedConfig:
    """
    Load a model's configuration without the model, and check that LightReasoner can use the model.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What the user passed.
        name (`str`): What to call it in an error message: "expert", "amateur" or "model".
        kwargs: As for [`load_model`]. Only those that say where to find and how to quantize the model are used.

    Raises:
        `TypeError`: If it is none of the accepted types.
        `ImportError`: If loading in 4 or 8 bits needs bitsandbytes, and it is not installed.
        `ValueError`: If it has no next-token distribution (an encoder or encoder-decoder model), is an adapter of
            virtual tokens, cannot be found, has missing or damaged weights, or needs a GPU that is not there.
    """
    if isinstance(model, PreTrainedModel) or is_peft_model(model):
        if is_peft_model(model):
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
            if source != model and (rows := count_saved_embeddings(model, **hub_kwargs(kwargs))) is not None:
                config.get_text_config().vocab_size = rows
        except (OSError, StrictDataclassError) as error:
            if os.path.isfile(os.path.join(source, "config.json")):
                raise ValueError(
                    f"The config.json of the {name} {source!r} cannot be read: {' '.join(str(error).split())}"
                ) from error
            if os.path.isfile(os.path.join(source, "adapter_model.safetensors")):
                raise ValueError(
                    f"The {name} {source!r} is an adapter without its adapter_config.json. Copy the file from where "
                    "the adapter was saved."
                ) from error
            raise _not_found(source, name) from error
        _check_bitsandbytes(kwargs.get("quantization_config") or getattr(config, "quantization_config", None), name)
        is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
            getattr(config, "auto_map", None) or {}  # custom code
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
    # The mapping of causal models contains encoders, which are causal only with `is_decoder`
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
            f"`device_map` asks for a CUDA GPU ({device_map!r}), but PyTorch finds none here. Remove it, or check the "
            "driver and the build of PyTorch."
        )


def _check_weights(model: str, name: str) -> None:
    """Refuse a folder with missing or damaged weights. Only the header of each file is read."""
    folder = Path(model)
    if not folder.is_dir():  # on the Hub
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


@from_cache_if_unreachable
def load_tokenizer(
    model: str | torch.nn.Module, name: str = "model", argument: str = "processing_class", **kwargs: Any
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model. For an adapter without one, it is that of its base model.

    Args:
        model (`str` or `torch.nn.Module`): Id or path, or a loaded model that knows where it came from.
        name (`str`): What to call the model in an error message.
        argument (`str`): The argument with which the user can pass a tokenizer instead.
        kwargs: As for [`load_model`]. Only those that say where to find the model are used.

    Raises:
        `ValueError`: If there is none, it is damaged, or the model does not know where it came from.
    """
    if isinstance(model, str):
        try:
            source, repository = _locate(model, name, kwargs)
        except OSError as error:
            raise _not_found(model, name) from error
        if source != model and _has_tokenizer(model, hub_kwargs(kwargs)):
            # The class of the tokenizer depends on a config.json, which an adapter lacks
            config = AutoConfig.from_pretrained(source, **repository)
            own = _load_tokenizer(model, name, {**hub_kwargs(kwargs), "config": config})
            rows = count_saved_embeddings(model, **hub_kwargs(kwargs)) or config.get_text_config().vocab_size
            if max(own.get_vocab().values()) < rows:
                return own
            logger.warning(
                f"The tokenizer of the {name} {model!r} has more tokens than the base model has logits. The base "
                "model's tokenizer is used."
            )
    else:
        source, repository = get_base_model(model).config._name_or_path, hub_kwargs(kwargs)
    if not source:
        raise ValueError(f"The tokenizer of the {name} cannot be located. Pass the tokenizer as `{argument}`.")
    folder = Path(source)
    if folder.is_dir() and not _has_tokenizer(source, repository):  # transformers would create an empty one
        raise ValueError(
            f"The {name} has no tokenizer: {source!r} holds no tokenizer.json. Save the model's tokenizer there, or "
            f"in Python pass it as `{argument}`."
        )
    return _load_tokenizer(source, name, repository)


def _load_tokenizer(source: str, name: str, repository: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, **repository)
    except Exception as error:  # tokenizers raises no narrower type
        if not _has_config(source, repository):
            raise _not_found(source, name) from error
        raise ValueError(
            f"The tokenizer of the {name} {source!r} cannot be loaded: {' '.join(str(error).split()).rstrip('.')}."
        ) from error


def _not_found(source: str, name: str) -> ValueError:
    return ValueError(
        f"The {name} {source!r} cannot be found. It must be a folder with a config.json, or the id of a model on the "
        "Hub. Private and gated models need `hf auth login`, offline ones must be in the cache."
    )


def _has_config(source: str, repository: dict[str, Any]) -> bool:
    """Whether a folder exists, or a repository on the Hub has a config.json that can be loaded."""
    try:
        where = {name: value for name, value in repository.items() if name != "trust_remote_code"}
        return os.path.isdir(source) or cached_file(source, "config.json", **where) is not None
    except OSError:
        return False


def _has_tokenizer(source: str, repository: dict[str, Any]) -> bool:
    """Whether a folder, or a repository on the Hub, contains a tokenizer."""
    folder = Path(source)
    if folder.is_dir():
        return any(path for pattern in _VOCABULARY_FILES for path in folder.glob(pattern))
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any(find_file(source, file, **repository) is not None for file in files)


@from_cache_if_unreachable
def load_eos_ids(model: "str | PreTrainedModel | PeftModel", **kwargs: Any) -> set[int]:
    """
    The EOS ids in a model's generation_config, or else in its config, without loading the model.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): What the user passed. An adapter's own
            generation_config, as the trainer saves it, takes precedence over that of its base model.
        kwargs: As for [`load_model`]. Only those that say where to find the model are used.
    """
    if isinstance(model, str):
        source, repository = _locate(model, "model", kwargs)
        config = AutoConfig.from_pretrained(source, **repository)
        own = load_generation_config(model, **hub_kwargs(kwargs))
        generation_config = own or load_generation_config(source, **repository)
    else:
        config, generation_config = get_base_model(model).config, get_base_model(model).generation_config
    for each in (generation_config, config, config.get_text_config()):
        named = getattr(each, "eos_token_id", None)
        if named is not None:
            return set(named) if isinstance(named, list | tuple) else {named}
    return set()


def _locate(model: str, name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Id or path of the model, or of an adapter's base model, and the arguments with which to find it."""
    repository = hub_kwargs(kwargs)
    if (adapter := load_adapter_config(model, name, **repository)) is None:
        return model, repository
    # The user's revision is that of the adapter. The adapter names the revision of its base model
    return adapter.base_model_name_or_path, {**repository, "revision": adapter.revision or "main"}


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where to find a model, not how to load its weights."""
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check_bitsandbytes(quantization: Any, name: str) -> None:
    if quantization is None or is_bitsandbytes_available():
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        raise ImportError(
            f"Loading the {name} in 4 or 8 bits needs bitsandbytes: `pip install 'trl-lightreasoner[quantization]'`."
        )


def init_kwargs(
    args: Any, model: Any, quantization_config: BitsAndBytesConfig | None, owner: str, prefix: str = ""
) -> dict[str, Any]:
    """
    Keyword arguments of [`load_model`] from the settings of a config. Arguments and errors are those of
    [`add_quantization`].
    """
    kwargs = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    kwargs |= getattr(args, f"{prefix}model_init_kwargs") or {}
    return add_quantization(kwargs, model, quantization_config, owner, prefix)


def add_quantization(
    kwargs: dict[str, Any], model: Any, quantization_config: BitsAndBytesConfig | None, owner: str, prefix: str = ""
) -> dict[str, Any]:
    """
    Add the user's quantization to the keyword arguments of [`load_model`].

    Args:
        kwargs (`dict[str, Any]`): From the user's `model_init_kwargs`.
        model (`str` or `torch.nn.Module`): What the user passed. A loaded model is not changed, and a warning is
            logged.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): What the user passed.
        owner (`str`): The class that it was passed to: "trainer" or "sampler".
        prefix (`str`): Prefix of the arguments' names, such as "amateur_".

    Raises:
        `ValueError`: If `kwargs` also contains a quantization.
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
