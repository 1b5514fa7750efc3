"""Expert and amateur in memory: two models, or one that is read as both."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import PretrainedConfig

from ..generation.completions import evaluating
from ..models.adapter_loading import load_adapter, load_adapter_config
from ..models.guises import decoder_layers, skip_layers, switch_adapter, which_is_adapter
from ..models.loading import hub_kwargs, load_model
from ..models.weights import get_base_model, is_peft_model
from .contrastive_sampling_config import ContrastiveSamplingConfig


# In which an amateur can differ from the expert, beside its weights
AMATEUR_SETTINGS = ("amateur_skipped_layers", "amateur_system_prompt", "amateur_prompt_template")
SAME_READING = (
    "The amateur is the expert itself, and reads what the expert reads, so that they diverge nowhere. Let them differ "
    "by an adapter that one of them has (name the base model, or the adapter, as the amateur), by "
    "`amateur_skipped_layers`, or by an `amateur_system_prompt` or `amateur_prompt_template`."
)


def check_own_amateur(args: ContrastiveSamplingConfig, *of_amateur: Any) -> None:
    """
    Refuse an expert that is to be its own amateur without a difference, or with settings of another model.

    Args:
        args ([`ContrastiveSamplingConfig`]): Settings.
        of_amateur: What the user passed for the amateur beside them.

    Raises:
        `ValueError`
    """
    if all(getattr(args, name) is None for name in AMATEUR_SETTINGS):
        raise ValueError(SAME_READING)
    if any(each is not None for each in (*of_amateur, args.amateur_model_init_kwargs)):
        raise ValueError(
            "The amateur is the expert itself, which is loaded once, as the expert: leave out "
            "`amateur_model_init_kwargs`, `amateur_processing_class` and `amateur_quantization_config`."
        )


class ModelPair:
    """
    Expert and amateur, as the user names them until they are loaded.

    Where the amateur is the expert itself, or one of the two an adapter on the other, one model is loaded. It is the
    expert, but for the passes of the amateur: these run within [`~ModelPair.as_amateur`].

    Args:
        expert, amateur (`str` or model): Ids, paths or models. An amateur of `None` is the expert itself.
        expert_kwargs, amateur_kwargs (`dict[str, Any]`): As for [`load_model`].
        skipped_layers (`Sequence[int]`): Numbers of the amateur's layers that are left out.
        label_expert (`str`): `"live"`, or `"base"` for labels of the expert without its adapter.

    Attributes:
        expert, amateur: What was given; within [`~ModelPair.loaded`] the models. An expert, and an amateur of its own,
            stay loaded behind it.
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
        self.expert, self.amateur, self.skipped_layers = expert, amateur, skipped_layers
        self.labels_are_of_base = label_expert == "base"
        self._kwargs = (expert_kwargs, amateur_kwargs)
        self.is_one_model = amateur is None
        self._adapter = None if self.is_one_model else which_is_adapter(expert, amateur, *self._kwargs)
        # An adapter on the expert's own modules, that one of the two has on
        self._switched: Any = None
        if self.labels_are_of_base:
            self._check_base()

    def _check_base(self) -> None:
        """Refuse labels of the expert without its adapter where there is none, or where that is the amateur."""
        if isinstance(self.expert, str):
            is_adapter = load_adapter_config(self.expert, "expert", **hub_kwargs(self._kwargs[0])) is not None
        else:
            is_adapter = is_peft_model(self.expert)
        if not is_adapter:
            raise ValueError(
                "`label_expert='base'` reads the expert without its adapter, and the expert has none. Leave it out, "
                "or name the adapter of an earlier round as the expert."
            )
        is_amateur = self._adapter == "expert" or (
            not isinstance(self.expert, str) and self.amateur is get_base_model(self.expert)
        )
        if is_amateur and not self.skipped_layers:
            raise ValueError(
                "`label_expert='base'` reads the expert without its adapter, and so is the amateur read: they would "
                "diverge nowhere. Choose another amateur, or `label_expert='live'`."
            )

    def check_layers(self, config: PretrainedConfig) -> None:
        """
        Refuse layers that the amateur does not have, before it is loaded.

        Raises:
            `ValueError`: If there is such a layer, or none would be left.
        """
        count = config.get_text_config().num_hidden_layers
        if wrong := [layer for layer in self.skipped_layers if layer >= count]:
            raise ValueError(
                f"`amateur_skipped_layers` must be numbers from 0 to {count - 1}, which the amateur's {count} layers "
                f"have, got {wrong[0]}."
            )
        if len(self.skipped_layers) == count:
            raise ValueError(f"`amateur_skipped_layers` names all of the amateur's {count} layers. Leave it some.")

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Both models in memory, in eval mode, and read as the expert. Behind it the expert is as it was."""
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
        """For a pass that labels are made of: the expert, without its adapter if its base model's are asked for."""
        return switch_adapter(self.expert, on=False) if self.labels_are_of_base else nullcontext()

    @contextmanager
    def as_amateur(self) -> Iterator[None]:
        """For a pass of the amateur: without the layers that it lacks, with the adapter as it has it."""
        switched: AbstractContextManager = nullcontext()
        if self._switched is not None:
            switched = switch_adapter(self._switched, on=is_peft_model(self.amateur))
        elif self.is_one_model:
            switched = self.as_labeller()
        with switched, skip_layers(self.amateur, self.skipped_layers):
            yield
