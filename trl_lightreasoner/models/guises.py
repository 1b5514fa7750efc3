"""One model in memory that is read as two: with its adapter and without, with all of its layers and with some."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .adapter_loading import count_saved_embeddings, load_adapter_config
from .loading import hub_kwargs
from .weights import get_base_model, lies_beside


if TYPE_CHECKING:  # slow to import, and a run without an adapter does without
    from peft import PeftModel


@contextmanager
def skip_layers(model: torch.nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """
    A model whose decoder layers of these numbers give back what they are given, as long as it lasts.

    They are computed all the same: the others keep their number, by which they find their mask and their cache, and
    whatever else a layer returns is there.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        layers (`Sequence[int]`): Numbers of layers, from 0.

    Raises:
        `ValueError`: If the model's layers cannot be told.

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
    The layers of a model's decoder, in their order.

    Raises:
        `ValueError`: If there is not one list of as many modules as its config says.
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
    """A model with its adapter on or off, as long as it lasts; behind it, it is the other way round."""
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    _turn(model, on)
    try:
        yield
    finally:
        _turn(model, not on)
        for parameter in model.parameters():  # which PEFT marks as it goes
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
    `"expert"` or `"amateur"` if that one is an adapter beside the weights of the other, both named by id or path and
    loaded alike, so that one model in memory is both; otherwise `None`. The keyword arguments are as for
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
    # Where the base model's weights or embeddings are changed, there are two models
    if not lies_beside(config) or config.bias != "none" or count_saved_embeddings(name, **repositories[adapter]):
        return None
    revisions = (config.revision or "main", repositories[base].get("revision") or "main")
    alike = _settings(expert_kwargs) == _settings(amateur_kwargs) and revisions[0] == revisions[1]
    if alike and is_same_model(config.base_model_name_or_path, (expert, amateur)[base]):
        return ("expert", "amateur")[adapter]
    return None


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `load_model`, those that do not say where it is found, comparable."""
    elsewhere = hub_kwargs(kwargs)
    values = {name: value for name, value in kwargs.items() if name not in elsewhere}
    return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}


def is_same_model(one: str, other: str) -> bool:
    """Whether two ids or paths name the same model."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))
