"""Expert and amateur in memory: two models, or one that serves as both."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import PretrainedConfig

from ..models.adapter_loading import load_adapter, load_adapter_config
from ..models.forward import evaluating
from ..models.guises import decoder_layers, is_same_model, skip_layers, switch_adapter, which_is_adapter
from ..models.loading import hub_kwargs, load_model
from ..models.weights import check_bare, get_base_model, is_peft_model, leaves_base
from .contrastive_sampling_config import ContrastiveSamplingConfig


if TYPE_CHECKING:  # slow to import, and a run without an adapter does without
    from peft import PeftConfig


logger = get_logger(__name__)

# In which an amateur can differ from the expert, beside its weights
AMATEUR_SETTINGS = ("amateur_skipped_layers", "amateur_system_prompt", "amateur_prompt_template")
SAME_READING = (
    "The amateur is the expert itself and reads the same prompts, so they never diverge. Choose a weaker model as "
    "`amateur`. Or make one of the expert: set `amateur_num_skipped_layers` (3 of 28, for example), "
    "`amateur_skipped_layers`, `amateur_system_prompt` or `amateur_prompt_template`."
)


def name_skipped_layers(args: Any, config: PretrainedConfig, is_own: bool = False) -> Any:
    """
    Replace the number of layers that the amateur skips by their indices, and refuse layers that it does not have.

    Args:
        args ([`ContrastiveSamplingConfig`] or `RunConfig`): Settings. Without a number they are returned as they are.
        config ([`~transformers.PretrainedConfig`]): The amateur's.
        is_own (`bool`): Whether the amateur is the expert itself. It skips a tenth of its layers, rounded up, if the
            settings leave open how it differs (docs/when_it_works.md, "On real weights").

    Raises:
        `ValueError`: If a layer does not exist, or no layer would be left.
    """
    count = config.get_text_config().num_hidden_layers
    layers, number = args.amateur_skipped_layers or [], args.amateur_num_skipped_layers
    if wrong := [layer for layer in layers if layer >= count]:
        raise ValueError(
            f"`amateur_skipped_layers` must be indices of the amateur's {count} layers, from 0 to {count - 1}, "
            f"got {wrong[0]}."
        )
    if len(layers) == count:
        raise ValueError(f"`amateur_skipped_layers` names all of the amateur's {count} layers. Keep at least one.")
    is_open = is_own and number is None and all(getattr(args, name) is None for name in AMATEUR_SETTINGS)
    if is_open:
        number = -(-count // 10)
        if number == count:
            raise ValueError(
                "No amateur was given, and the expert has a single layer. Name a weaker model as `amateur`."
            )
    if number is None:
        return args
    if number >= count:
        raise ValueError(f"`amateur_num_skipped_layers` must be less than the amateur's {count} layers, got {number}.")
    first = (count - number) // 2
    skipped = [*range(first, first + number)]
    if is_open:
        logger.warning_once(
            f"No amateur was given, so it is the expert without {number} of its {count} layers (from 0: "
            f"{', '.join(map(str, skipped))}). To contrast with a weaker model, name it as `amateur`."
        )
    return replace(args, amateur_num_skipped_layers=None, amateur_skipped_layers=skipped)


def check_own_amateur(args: ContrastiveSamplingConfig, *of_amateur: Any) -> None:
    """
    Refuse settings of another model if the amateur is the expert itself.

    Args:
        args ([`ContrastiveSamplingConfig`]): Settings. of_amateur: Other arguments of the amateur that the user
            passed.

    Raises:
        `ValueError`
    """
    if any(each is not None for each in (*of_amateur, args.amateur_model_init_kwargs)):
        raise ValueError(
            "The amateur is the expert itself, which is loaded once, as the expert. Remove what is set for loading an "
            "amateur: `amateur_model_init_kwargs`, `amateur_processing_class`, `amateur_quantization_config`, or "
            "`--amateur_load_in_4bit` and `--amateur_load_in_8bit` on the command line."
        )


def _check_switchable(config: "PeftConfig", what: str) -> None:
    """Refuse an adapter without which its base model does not say what it said before."""
    if not leaves_base(config):
        raise ValueError(
            f"{what} needs an adapter that leaves the weights of its base model as they are, but this one changes "
            "them (`bias`, `init_lora_weights` or `layer_replication`), and they stay changed where it is off. Name "
            "the base model by its id or path as the amateur, or use another adapter, such as LoRA with PEFT's "
            "defaults."
        )


class ModelPair:
    """
    Expert and amateur, under the user's names until they are loaded.

    If the amateur is the expert itself, or one is an adapter on the other, one model is loaded. It serves as the
    expert, except within [`~ModelPair.as_amateur`].

    Args:
        expert, amateur (`str` or model): Ids, paths or models. An amateur of `None` is the expert itself.
        expert_kwargs, amateur_kwargs (`dict[str, Any]`): As for [`load_model`].
        skipped_layers (`Sequence[int]`): Indices of the layers that the amateur skips.
        label_expert (`str`): `"live"`, or `"base"` for labels from the expert without its adapter.

    Attributes:
        expert, amateur: What was given, and within [`~ModelPair.loaded`] the models. An expert, and an amateur made
        from it, stay loaded afterwards.
    """

    def __init__(
        self,
        expert: Any,
        amateur: Any,
        expert_kwargs: dict[str, Any],
        amateur_kwargs: dict[str, Any],
        skipped_layers: Sequence[int] = (),
        label_expert: str = "live",
    ):
        for name, model, other in (("expert", expert, amateur), ("amateur", amateur, expert)):
            if not (is_peft_model(other) and get_base_model(other) is model):  # whose adapter will be switched off
                check_bare(model, name)
        self.expert, self.amateur, self.skipped_layers = expert, amateur, skipped_layers
        self.labels_are_of_base = label_expert == "base"
        self._kwargs = (expert_kwargs, amateur_kwargs)
        self.is_one_model = amateur is None
        self._adapter = None if self.is_one_model else which_is_adapter(expert, amateur, *self._kwargs)
        # An adapter on the expert's own modules, that one of the two has on
        self._switched: Any = None
        if self.labels_are_of_base:
            self._check_base()
        peft_models = [model for model in (expert, amateur) if is_peft_model(model)]
        if len(peft_models) == 1 and get_base_model(expert) is get_base_model(amateur):
            _check_switchable(
                peft_models[0].active_peft_config, "A model that is the expert with its adapter on or off"
            )

    def _check_base(self) -> None:
        """Refuse labels from the expert without its adapter if it has none, or if the amateur is the same."""
        if isinstance(self.expert, str):
            config = load_adapter_config(self.expert, "expert", **hub_kwargs(self._kwargs[0]))
        else:
            config = self.expert.active_peft_config if is_peft_model(self.expert) else None
        if config is None:
            raise ValueError(
                "`label_expert='base'` reads the expert without its adapter, but the expert has none. Remove it, or "
                "name the adapter of an earlier round as the expert."
            )
        _check_switchable(config, "`label_expert='base'`")
        is_base = isinstance(self.amateur, str) and is_same_model(self.amateur, config.base_model_name_or_path)
        is_amateur = (
            self._adapter == "expert"
            or (isinstance(self.expert, str) and is_base and self._kwargs[0] == self._kwargs[1])
            or (not isinstance(self.expert, str) and self.amateur is get_base_model(self.expert))
        )
        if is_amateur and not self.skipped_layers:
            raise ValueError(
                "`label_expert='base'` reads the expert without its adapter, and the amateur is the same model, so "
                "they would never diverge. Choose another amateur, or `label_expert='live'`."
            )

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Both models in memory, in eval mode. On exit the expert is restored."""
        given = self.amateur
        self.expert = load_model(self.expert, **self._kwargs[0])
        trainable = {id(parameter) for parameter in self.expert.parameters() if parameter.requires_grad}
        generation_config = get_base_model(self.expert).generation_config
        if self.is_one_model:
            self.amateur = self.expert
        elif self._adapter == "amateur":
            self.amateur = load_adapter(self.expert, given, **hub_kwargs(self._kwargs[1]))
            self.expert.generation_config = generation_config  # not the adapter's
        elif self._adapter == "expert":
            self.amateur = get_base_model(self.expert)
        else:
            self.amateur = load_model(given, **self._kwargs[1])
        try:
            if self.skipped_layers:
                decoder_layers(self.amateur)  # or a refusal
            with evaluating(self.expert, self.amateur), self._as_expert():
                yield
        finally:
            self._switched = None
            if self._adapter == "amateur":
                self.expert = self.amateur.unload()
                for parameter in self.expert.parameters():  # of which PEFT has frozen all
                    parameter.requires_grad = id(parameter) in trainable
            if self._adapter is not None:
                self.amateur = given

    def _as_expert(self) -> AbstractContextManager:
        adapted = [is_peft_model(model) for model in (self.expert, self.amateur)]
        if get_base_model(self.expert) is get_base_model(self.amateur) and adapted[0] != adapted[1]:
            self._switched = self.expert if adapted[0] else self.amateur
            if adapted[1]:
                return switch_adapter(self._switched, on=False)
        return nullcontext()

    def as_labeller(self) -> AbstractContextManager:
        """Context of a pass that makes labels: the expert, without its adapter for `"base"`."""
        return switch_adapter(self.expert, on=False) if self.labels_are_of_base else nullcontext()

    @contextmanager
    def as_amateur(self) -> Iterator[None]:
        """Context of a pass of the amateur: without its skipped layers, and with or without the adapter."""
        switched: AbstractContextManager = nullcontext()
        if self._switched is not None:
            switched = switch_adapter(self._switched, on=is_peft_model(self.amateur))
        elif self.is_one_model:
            switched = self.as_labeller()
        with switched, skip_layers(self.amateur, self.skipped_layers):
            yield
