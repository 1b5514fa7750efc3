"""`lightreasoner merge`: merge an adapter into its base model, for a plain model that needs no PEFT."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..config_help import help_from_docstring
from .arguments import ArgumentParser
from .next_command import next_command
from .running_on import announce, dtype_of, tell


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_FEW_TOKENS = 64  # number of tokens to compare two models with
# Largest divergence of the merged model from base model and adapter, as a share of what the adapter changes
_MOST_LOST = 0.1
# PEFT cannot merge these. What most of them add depends on the input
_UNMERGEABLE_TYPES = ("ADAPTION_PROMPT", "LILY")


EXAMPLE = r"""example:
  lightreasoner merge --model adapter --output_dir model"""


@dataclass
@help_from_docstring
class MergeArguments:
    """
    Settings of `lightreasoner merge`.

    Parameters:
        model (`str`):
            Hub id or path of the adapter.
        output_dir (`str`):
            Folder for the model, new or empty.
        base_model_name_or_path (`str`, *optional*):
            Hub id or path of the base model in full precision. If not set, it is the one named in the adapter's
            config.
        model_revision (`str`, *optional*):
            Branch, tag or commit id of the adapter. The revision of the base model is the one named in the adapter's
            config.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type for merging and saving the weights: `"auto"` (the base model's own), `"bfloat16"`,
            `"float16"` or `"float32"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code.
    """

    model: str
    output_dir: str
    base_model_name_or_path: str | None = None
    model_revision: str | None = None
    dtype: str = field(default="auto", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    trust_remote_code: bool = False


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([MergeArguments], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(args: MergeArguments) -> None:
    """
    Merge an adapter into its base model, and save the result with tokenizer, generation config and card.

    Args:
        args ([`MergeArguments`]): What to merge, and where to write it.

    Raises:
        `ValueError`: If the folder is not empty, there is no such adapter or base model, or no plain model in full
            precision gives the same predictions. Nothing is written then.

    Example:

    ```python
    >>> from trl_lightreasoner.commands.merge import MergeArguments, main

    >>> main(MergeArguments("adapter", "model"))  # doctest: +SKIP
    The model is in model.

    ```
    """
    from ..models.hub_access import cache_if_unreachable

    folder = check_output_dir(args)
    with cache_if_unreachable(args.model):
        adapter = find_adapter(args)
    base = args.base_model_name_or_path or adapter.base_model_name_or_path
    if not base:
        raise ValueError("The adapter's config names no base model. Name it with `--base_model_name_or_path`.")
    with cache_if_unreachable(args.model, base):
        write_merged(base, adapter, args, folder)


def write_merged(base: str, adapter: "PeftConfig", args: MergeArguments, folder: Path) -> None:
    """Write the merged model to the folder. After an error the folder is removed."""
    import torch

    from ..generation.greedy import save_generation_config, without_generation_config
    from ..hub.merged_card import load_card, merged_card
    from ..models.forward import divergence, next_token_log_probs
    from ..models.loading import left_out, load_model, name_parts
    from ..steps.prompt_format import load_prompt_format

    base_kwargs = {"trust_remote_code": args.trust_remote_code}
    if base == adapter.base_model_name_or_path:
        base_kwargs["revision"] = adapter.revision
    check_base(base, adapter, args, base_kwargs)
    tokenizer = find_tokenizer(base, args, base_kwargs)
    check_weights(args)
    prompt_format = load_prompt_format(args.model, revision=args.model_revision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Cannot write to {args.output_dir!r} ({error.strerror}). Choose another `output_dir`, or fix the "
            "permissions."
        ) from error
    dtype = dtype_of(base, args.dtype, "base model", device_map=None, **base_kwargs)
    announce(f"merged in {dtype}", cpu=True)
    try:
        tell("1/3 Loading the base model and the adapter")
        # On the CPU, whose memory may be larger than the GPU's
        model = load_model(base, dtype=args.dtype, device_map=None, **base_kwargs)
        missing = left_out(model, base, **base_kwargs)
        adapted = load_fitting(model, args)
        ids = list(range(min(_FEW_TOKENS, len(tokenizer))))
        expected = next_token_log_probs(adapted.eval(), ids)
        with adapted.disable_adapter():
            change = divergence(expected, next_token_log_probs(adapted, ids))
        tell("2/3 Merging and writing")
        merged = merge(adapted)
        dtype = merged.dtype
        with writing_into(args.output_dir):
            with without_generation_config(merged):
                merged.save_pretrained(folder)
            save_generation_config(merged, tokenizer, folder)
            tokenizer.save_pretrained(folder)
            if prompt_format is not None:
                prompt_format.save(folder)
        tell("3/3 Comparing with the base model and the adapter")
        del model, adapted, merged  # there may be memory for only one
        loaded = load_model(str(folder), dtype=dtype, device_map=None, trust_remote_code=args.trust_remote_code)
        nats = divergence(expected, next_token_log_probs(loaded.eval(), ids))
        # In half precision the weights round the adapter a little
        is_far = nats > _MOST_LOST * change
        if is_far and nats > (1e-5 if dtype == torch.float32 else 1e-2):
            raise ValueError(
                f"The merged model differs from the base model with the adapter by {nats:.2g} nats per token, and the "
                f"adapter itself changes only {change:.2g}. Load the adapter with PEFT instead, or merge in another "
                "`dtype`."
            )
        card = merged_card(
            loaded,
            tokenizer,
            folder=folder.absolute(),
            base=base,
            adapter_name=args.model,
            adapter=adapter,
            adapter_card=load_card(args.model, args.model_revision),
            prompt_format=prompt_format,
            change=change,
            difference=nats,
            num_tokens=len(ids),
        )
        card.save(folder / "README.md")
    except BaseException:  # no partial model. The folder was empty
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"The model is in {args.output_dir}.")
    if is_far and dtype != torch.float32:
        print(
            f"Warning: in {str(dtype).removeprefix('torch.')}, it differs from the base model with the adapter by "
            f"{nats:.2g} nats per token, and the adapter itself changes only {change:.2g}. A part of the adapter "
            "may be lost. Merge again with `--dtype float32`, or load the adapter with PEFT."
        )
    if missing:
        print(
            f"Warning: it is only the language model, without {len(missing):,} tensors of {base!r}: "
            f"{name_parts(missing)}. For the whole model, load the base model and the adapter with PEFT."
        )
    print(next_command("eval", "--model", args.output_dir, "--output_dir", "EVALUATION"))


@contextmanager
def writing_into(output_dir: str) -> Iterator[None]:
    """Turns what the libraries say of a full disk into a sentence."""
    from ..training.checkpoints import why_not_written

    try:
        yield
    except Exception as error:
        if (reason := why_not_written(error)) is None:
            raise
        raise OSError(
            f"Cannot write the model to {output_dir!r} ({reason}). Free disk space or fix the permissions, and merge "
            "again."
        ) from error


def check_output_dir(args: MergeArguments) -> Path:
    """The output folder. Refuses one that cannot be used."""
    folder = Path(args.output_dir)
    if folder.exists() and folder.resolve() == Path(args.model).resolve():
        raise ValueError(f"{args.output_dir!r} is the adapter's own folder. Choose another `output_dir`.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{args.output_dir!r} is a file. Choose another `output_dir`.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{args.output_dir!r} is not empty, and a model there would be overwritten. Choose another `output_dir`."
        )
    return folder


def find_adapter(args: MergeArguments) -> "PeftConfig":
    """The adapter's configuration. Refuses an adapter that cannot be merged."""
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    from ..models.adapter_loading import check_adapter

    path, revision = args.model, args.model_revision
    try:
        found = find_adapter_config_file(path, revision=revision)
    except OSError:  # neither a folder nor an id
        found = None
    if found is None:
        raise ValueError(
            f"{path!r} is not an adapter: there is no adapter_config.json. Name the folder of `lightreasoner train`, "
            "or the Hub id of an adapter. A model without an adapter needs no merging."
        )
    adapter = PeftConfig.from_pretrained(path, revision=revision)
    check_adapter(adapter, "model")
    if adapter.peft_type in _UNMERGEABLE_TYPES:
        reason = adapter.peft_type.value
    elif getattr(adapter, "layer_replication", None):
        reason = "LoRA with `layer_replication`"
    else:
        return adapter
    raise ValueError(
        f"An adapter of this type ({reason}) cannot be merged into the weights of its base model. Load it with PEFT "
        "instead, or train an adapter of another type, such as LoRA."
    )


def check_base(base: str, adapter: "PeftConfig", args: MergeArguments, base_kwargs: dict) -> None:
    """Refuse a base model that cannot be found, or into whose weights the adapter cannot be merged."""
    from transformers.utils.peft_utils import find_adapter_config_file

    from ..models.loading import load_config

    try:
        config = load_config(base, "base model", **base_kwargs)
    except ValueError as error:
        if args.base_model_name_or_path is not None:
            raise
        raise ValueError(
            f"{error} The adapter's config names this base model. If it has moved, give its path with "
            "`--base_model_name_or_path`."
        ) from error
    if find_adapter_config_file(base, revision=base_kwargs.get("revision")) is not None:
        raise ValueError(
            f"The base model {base!r} is itself an adapter. Merge it first, and name the result with "
            "`--base_model_name_or_path`."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base model {base!r} is quantized, so merging into its weights would round the adapter away. Name "
            "the same model in full precision with `--base_model_name_or_path`."
        )
    names = find_tied(config, adapter, args.trust_remote_code)
    if names:
        raise ValueError(
            f"The adapter changes {' and '.join(names)}, and the base model ties its input and output embeddings. "
            "Merging would change both, or untie them. Load the adapter with PEFT instead, or train one without them "
            "in `target_modules` and `modules_to_save`."
        )


def find_tied(config: "PretrainedConfig", adapter: "PeftConfig", trust_remote_code: bool) -> list[str]:
    """Names of the tied embeddings that the adapter changes as modules."""
    import torch
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers import AutoModelForCausalLM

    if not getattr(config, "tie_word_embeddings", False):
        return []
    with torch.device("meta"):  # names only, no weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is each for each in embeddings)]
    saved = getattr(adapter, "modules_to_save", None) or []
    has_targets = getattr(adapter, "target_modules", None) is not None
    return [
        name
        for name in names
        if any(f".{name}".endswith(f".{each}") for each in saved)
        or (has_targets and check_target_module_exists(adapter, name))
    ]


def find_tokenizer(base: str, args: MergeArguments, base_kwargs: dict) -> "PreTrainedTokenizerBase":
    """The adapter's tokenizer, or else that of the base model."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    source, kwargs = args.model, {**base_kwargs, "revision": args.model_revision}
    try:
        if not get_tokenizer_config(source, revision=args.model_revision):
            source, kwargs = base, base_kwargs
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # without files transformers makes an empty one
            return tokenizer
        reason = "there is none"
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
    raise ValueError(
        f"No tokenizer can be loaded from {source!r} ({reason}). Save the model's tokenizer in the adapter's folder."
    )


def check_weights(args: MergeArguments) -> None:
    """Refuse an adapter whose weights are missing or not finite, before the base model is loaded."""
    from peft import load_peft_weights
    from safetensors import SafetensorError

    try:
        weights = load_peft_weights(args.model, device="cpu", revision=args.model_revision)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights of the adapter {args.model!r}, adapter_model.safetensors, are missing or damaged. Merge "
            "another checkpoint, or download or save the file again."
        ) from error
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"The adapter's weights contain NaN or infinity, first in {broken[0]!r}. Merge an earlier checkpoint, or "
            "train it again."
        )


def load_fitting(model: "PreTrainedModel", args: MergeArguments) -> "PeftModel":
    """Load the adapter onto the model. Refuses one that does not fit, or that changes a shared weight."""
    from ..models.adapter_loading import load_adapter

    try:
        adapted = load_adapter(model, args.model, revision=args.model_revision)
    except ValueError as error:
        raise ValueError(f"{error} Name it with `--base_model_name_or_path`.") from error
    names: dict[int, list[str]] = {}
    for name, parameter in adapted.get_base_model().named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        adapted_names = [name for name in shared if ".base_layer." in name and ".token_adapter." not in name]
        if len(shared) > 1 and adapted_names:  # trained tokens stay tied
            where = " and ".join(name.replace(".base_layer.", ".") for name in shared[:2])
            raise ValueError(
                f"The adapter changes a weight that the base model uses in several places ({where}). Merging it into "
                "one would change the others. Load the adapter with PEFT instead."
            )
    return adapted


def merge(adapted: "PeftModel") -> "PreTrainedModel":
    """Merge the adapter into the weights of its model."""
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        if not isinstance(error, NotImplementedError | ValueError) and "lora_bias" not in str(error):
            raise  # such as memory that has run out
        reason = str(error).rstrip(".")
        raise ValueError(f"PEFT cannot merge the adapter: {reason}. Load it with PEFT instead.") from error
