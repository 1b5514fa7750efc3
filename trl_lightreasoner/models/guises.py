"""Use one loaded model as two: with and without its adapter, or with all and with some of its layers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .adapter_loading import count_saved_embeddings, load_adapter_config
from .loading import hub_kwargs
from .weights import comes_off, get_base_model


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel


@contextmanager
def skip_layers(model: torch.nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """
    A context in which some decoder layers of a model return their input unchanged.

    The layers are still computed. So the others keep their index, by which they find their mask and cache, and the
    other outputs of a layer are still returned.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        layers (`Sequence[int]`): Indices of layers, from 0.

    Raises:
        `ValueError`: If the model's layers cannot be identified.

    Example:

    ```python
    >>> with skip_layers(model, [1]), torch.no_grad():  # doctest: +SKIP
    ...     logits = model(input_ids).logits
    ```
    """
    handles = []
    try:
        every = decoder_layers(model) if layers else []
        handles = [every[i].register_forward_hook(_give_back_input, with_kwargs=True) for i in layers]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give_back_input(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return hidden_states if isinstance(output, torch.Tensor) else (hidden_states, *output[1:])


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """
    The layers of a model's decoder, in order.

    Raises:
        `ValueError`: If the decoder does not have exactly one list of as many modules as the config says.
    """
    base = get_base_model(model)
    count = base.config.get_text_config().num_hidden_layers
    lists = [each for each in base.get_decoder().children() if isinstance(each, torch.nn.ModuleList)]
    lists = [each for each in lists if len(each) == count]
    if len(lists) != 1:
        raise ValueError(
            f"The layers of `{type(base).__name__}` cannot be identified among its modules, so none can be skipped. "
            "Choose another amateur."
        )
    return lists[0]


@contextmanager
def switch_adapter(model: "PeftModel", on: bool) -> Iterator[None]:
    """A context in which a model's adapter is on or off. On exit it is switched the other way."""
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    _turn(model, on)
    try:
        yield
    finally:
        _turn(model, not on)
        for parameter in model.parameters():  # PEFT changes this as it switches
            if parameter.requires_grad != (id(parameter) in trainable):
                parameter.requires_grad_(not parameter.requires_grad)


def _turn(model: "PeftModel", on: bool) -> None:
    if on:
        model.base_model.enable_adapter_layers()
    else:
        model.base_model.disable_adapter_layers()


def which_is_adapter(
    expert: Any, amateur: Any, expert_kwargs: dict[str, Any], amateur_kwargs: dict[str, Any]
) -> str | None:
    """
    Which of the two is an adapter of the other, so that one loaded model can serve as both: `"expert"`, `"amateur"` or
    `None`. Both must be named by id or path and loaded alike. The keyword arguments are as for
    [`~trl_lightreasoner.models.loading.load_model`].
    """
    if not (isinstance(expert, str) and isinstance(amateur, str)):
        return None
    repositories = [hub_kwargs(kwargs) for kwargs in (expert_kwargs, amateur_kwargs)]
    configs = [
        load_adapter_config(model, role, **repository)
        for model, role, repository in zip((expert, amateur), ("expert", "amateur"), repositories, strict=True)
    ]
    if (configs[0] is None) == (configs[1] is None):
        return None
    adapter, base = (0, 1) if configs[0] is not None else (1, 0)
    config, name = configs[adapter], (expert, amateur)[adapter]
    assert config is not None
    # An adapter that changes the base model's weights or embeddings needs two models
    if not comes_off(config) or count_saved_embeddings(name, **repositories[adapter]):
        return None
    revisions = (config.revision or "main", repositories[base].get("revision") or "main")
    alike = _settings(expert_kwargs) == _settings(amateur_kwargs) and revisions[0] == revisions[1]
    if alike and is_same_model(config.base_model_name_or_path, (expert, amateur)[base]):
        return ("expert", "amateur")[adapter]
    return None


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `load_model` that do not say where to find the model, as comparable values."""
    elsewhere = hub_kwargs(kwargs)
    values = {name: value for name, value in kwargs.items() if name not in elsewhere}
    return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}


def is_same_model(one: str, other: str) -> bool:
    """Whether two ids or paths name the same model."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))
