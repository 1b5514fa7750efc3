"""Load an adapter onto its base model, and refuse one that would differ from what was trained."""

import re
import warnings
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from .base_model import warn_of_another_base
from .hub_access import find_file, from_cache_if_unreachable


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftConfig, PeftModel


_FORWARD_TYPES = ("aLoRA", "POLY", "SHADOW", "XLORA")
_SAVED_EMBEDDINGS = re.compile(
    r"\.(embed_tokens|embed_in|embed_out|lm_head|word_embeddings|wte)\.(token_adapter\.)?(base_layer\.)?weight$"
)
# Second names under which PEFT saves trained embeddings and tokens of a resized vocabulary
_SECOND_NAMES = (".modules_to_save.weight", ".token_adapter.trainable_tokens_delta")
_MAX_NAMED = 3  # number of tensors named in a message


@from_cache_if_unreachable
def load_adapter_config(model: str, name: str = "model", **kwargs: Any) -> "PeftConfig | None":
    """The configuration of a PEFT adapter, or `None` if `model` is not one. `kwargs` as for [`hub_kwargs`]."""
    kwargs.pop("trust_remote_code", None)  # an adapter has no code of its own
    try:
        if find_adapter_config_file(model, **kwargs) is None:
            return None
    except OSError:  # no folder and no id: loading it as a model says so
        return None
    from peft import PeftConfig

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


def check_adapter(config: "PeftConfig", name: str) -> None:
    """Refuse adapters of virtual tokens, those that need PEFT's forward, and those that change with every loading."""
    # Virtual tokens shift the positions at which logits are read, and generation with the base model ignores them
    if config.is_prompt_learning:
        raise ValueError(
            f"The {name} is an adapter of virtual tokens (`{config.peft_type.value}`), which is not supported. Use an "
            "adapter that changes the weights, such as LoRA."
        )
    kind = "aLoRA" if getattr(config, "alora_invocation_tokens", None) else config.peft_type.value
    if kind in _FORWARD_TYPES:
        raise ValueError(
            f"The {name} is an adapter that acts through PEFT's own forward ({kind}), which generation and scoring do "
            "not call. Use one that changes the weights, such as LoRA."
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith("pissa_niter"):
        raise ValueError(
            f"The {name} is an adapter with `init_lora_weights={init!r}`, whose random decomposition changes with "
            "every loading, so it never matches the training. Use `init_lora_weights='pissa'`, or convert the adapter "
            "with PEFT's `path_initial_model_for_weight_conversion`."
        )


def load_adapter(model: PreTrainedModel, adapter: str, is_trainable: bool = False, **kwargs: Any) -> "PeftModel":
    """
    Load an adapter onto a model, and check that every tensor fits. Warns of another base model than in training.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model. It is resized to as many embeddings as the adapter
            holds, and stays so.
        adapter (`str`): Id or path.
        is_trainable (`bool`): Whether the adapter will be trained further.
        kwargs: As for [`hub_kwargs`].

    Raises:
        `ValueError`: If tensors are missing, unexpected or of another shape. The message names them.
    """
    from peft import PeftModel, PeftType

    kwargs.pop("trust_remote_code", None)  # an adapter has no code of its own
    repository = {**kwargs}
    saved = _saved_embeddings(adapter, **repository)
    rows, base_rows = next(iter(saved.values()), None), model.get_input_embeddings().weight.shape[0]
    if rows not in (None, base_rows):  # the size that it was trained on
        is_tied = model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None)
        if rows > base_rows and not is_tied and len(saved) == 1:  # PEFT saves those of one layer if it is a target
            raise ValueError(
                f"The adapter {adapter!r} holds {rows:,} embeddings of {next(iter(saved))!r} alone, and its base "
                f"model {model.config._name_or_path!r} has {base_rows:,}, so the others that were added are lost. "
                "Save the base model with all its embeddings, and train the adapter on that one."
            )
        model.resize_token_embeddings(rows, mean_resizing=False)
    else:
        warn_of_another_base(adapter, model, **kwargs)
    kwargs |= {"is_trainable": is_trainable, "torch_device": "cpu"}
    misfits: dict[str, set[str]] = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter, **kwargs)
        # PEFT ignores unexpected weights, and reports them only here. AdaLoRA would be pruned again
        if not getattr(adapted.active_peft_config, "rank_pattern", None) or adapted.peft_type != PeftType.ADALORA:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
            result = adapted.load_adapter(adapter, "default", key_mapping=key_mapping, **kwargs)
            misfits["unexpected"] = unknown_tensors(result.unexpected_keys, adapted)
    except UserWarning as warning:
        misfits["missing"] = set(re.findall(r"'(\S+)'", str(warning)))
    except RuntimeError as error:
        misfits["of another shape"] = set(re.findall(r"size mismatch for (\S+):", str(error)))
        if not misfits["of another shape"]:
            raise
    except IndexError:
        misfits["beyond the vocabulary"] = {"trainable_token_indices"}
    if any(misfits.values()):
        raise ValueError(
            f"The adapter {adapter!r} does not fit its base model {model.config._name_or_path!r}: "
            f"{name_tensors(misfits)}. It must be the model that the adapter was trained on."
        )
    if (generation_config := load_generation_config(adapter, **repository)) is not None:
        adapted.get_base_model().generation_config = generation_config
    return adapted


def unknown_tensors(names: list[str], adapted: "PeftModel") -> set[str]:
    """Those of the unexpected tensors of an adapter that the model does not have under another name."""
    modules = dict(adapted.named_modules())
    return {name for name in names if not (name.endswith(_SECOND_NAMES) and name.rpartition(".")[0] in modules)}


def count_saved_embeddings(adapter: str, **kwargs: Any) -> int | None:
    """Number of embeddings that an adapter holds, if its model's vocabulary was resized. `kwargs` as above."""
    return next(iter(_saved_embeddings(adapter, **kwargs).values()), None)


def _saved_embeddings(adapter: str, **kwargs: Any) -> dict[str, int]:
    """Number of embeddings that an adapter holds of each layer, such as `{"embed_tokens": 152}`."""
    path = find_file(adapter, "adapter_model.safetensors", **kwargs)
    if path is None:
        return {}
    with safe_open(path, framework="pt") as file:
        found = [_SAVED_EMBEDDINGS.search(name) for name in file.keys()]  # noqa: SIM118
        return {each[1]: file.get_slice(each.string).get_shape()[0] for each in found if each}


@from_cache_if_unreachable
def load_generation_config(model: str, **kwargs: Any) -> GenerationConfig | None:
    """Load the generation_config.json of a model or an adapter. `kwargs` as for [`hub_kwargs`]."""
    kwargs.pop("trust_remote_code", None)  # it has no code
    try:
        return GenerationConfig.from_pretrained(model, **kwargs)
    except OSError:
        return None


def name_tensors(misfits: dict[str, set[str]]) -> str:
    """A phrase for the tensors that do not fit, grouped by reason, with some names of each group."""

    def listed(names: list[str]) -> str:
        more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
        return ", ".join(names[:_MAX_NAMED]) + more

    return "; ".join(f"{how}: {listed(sorted(names))}" for how, names in misfits.items() if names)
