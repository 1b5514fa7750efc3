"""Arguments that `lightreasoner sample` and `check` share: two models, and prompts."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config_checks import check_template_kwargs
from ..config_help import help_from_docstring
from ..steps.prompt_format import PromptFormat, has_messages, make_prompts, name_prompts, read_template
from ..steps.switches import put_switches
from .arguments import quantization_of
from .running_on import announce, dtype_of, in_bits, prompts_at_a_time
from .terminal import hide_file_bars


if TYPE_CHECKING:
    from datasets import Dataset

    from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
    from ..sampling.contrastive_step_sampler import ContrastiveStepSampler


@dataclass
@help_from_docstring
class PairArguments:
    """
    Models and prompts of `lightreasoner sample` and `lightreasoner check`.

    Parameters:
        expert (`str`):
            Hub id or path of the stronger model, which will be fine-tuned.
        amateur (`str`, *optional*):
            Hub id or path of the weaker model, which may have any vocabulary. If `None`, the amateur is the expert
            without a tenth of its layers, or as `amateur_num_skipped_layers`, `amateur_skipped_layers`,
            `amateur_system_prompt` and `amateur_prompt_template` say.
        dataset_name (`str`):
            Dataset of prompts: on the Hub, a folder, or a file (JSON lines, Parquet, CSV).
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to use, such as `"train[:1000]"`.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompts, as text or as lists of messages.
        prompt_style (`str`, *optional*):
            How to prompt with text in `prompt_column`. `"chat"`: as a user message, in the expert's chat template.
            `"raw"`: as plain text, in `prompt_template`. If `None`, the text is used as it is.
        conversational (`bool`, *optional*, defaults to `False`):
            Short for `prompt_style` `"chat"`.
        system_prompt (`str`, *optional*):
            System message before each prompt. Implies `conversational`.
        prompt_template (`str`, *optional*):
            Prompt template: text that contains {question}, or a file that holds such text. If `None`, it is the prompt
            alone for `"chat"`, and for `"raw"` it is `"Question: {question}"` followed by a line `"Answer:"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for the chat template, such as `'{"enable_thinking": false}'`. For text it
            implies `conversational`. If `None`, they are those of a column 'chat_template_kwargs', if there is one.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to load the expert in 4 bits.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to load the expert in 8 bits.
        amateur_load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to load the amateur in 4 bits.
        amateur_load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to load the amateur in 8 bits.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            Quantization type of models in 4 bits: `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Whether to use nested quantization for models in 4 bits.
    """

    expert: str
    dataset_name: str
    amateur: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    prompt_column: str = "prompt"
    prompt_style: str | None = field(default=None, metadata={"choices": ["chat", "raw"]})
    conversational: bool = False
    system_prompt: str | None = None
    prompt_template: str | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    amateur_load_in_4bit: bool = False
    amateur_load_in_8bit: bool = False
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["nf4", "fp4"]})
    use_bnb_nested_quant: bool = False

    def __post_init__(self):
        for prefix in ("", "amateur_"):
            if getattr(self, f"{prefix}load_in_4bit") and getattr(self, f"{prefix}load_in_8bit"):
                raise ValueError(f"`{prefix}load_in_4bit` and `{prefix}load_in_8bit` cannot be combined.")
        if self.prompt_style == "raw" and (self.conversational or self.system_prompt):
            raise ValueError("`prompt_style='raw'` cannot be combined with `conversational` or `system_prompt`.")
        check_template_kwargs(self)
        if self.conversational or self.system_prompt is not None:
            self.prompt_style = "chat"
        self.prompt_template = read_template(self.prompt_template)


def load_prompts(args: PairArguments) -> "tuple[Dataset, PromptFormat | None]":
    """Load the prompts that `args` names, in a column `prompt`, and their format if they were text."""
    from ..steps.splits import load_split

    hide_file_bars()
    return as_prompts(load_split(args.dataset_name, args.dataset_config, args.dataset_split), args)


def make_sampler(args: PairArguments, sampling_args: "ContrastiveSamplingConfig") -> "ContrastiveStepSampler":
    """Make a sampler of the two models that `args` names, with the quantization set there."""
    from ..sampling.contrastive_step_sampler import ContrastiveStepSampler

    return ContrastiveStepSampler(
        args.expert,
        args.amateur,
        sampling_args,
        quantization_config=quantization_of(args, sampling_args.dtype),
        amateur_quantization_config=quantization_of(args, sampling_args.dtype, "amateur_"),
    )


def announce_pair(args: PairArguments, sampler: "ContrastiveStepSampler", prompts: "Dataset") -> None:
    """Print what sampling runs on."""
    sampling_args = sampler.args
    kwargs = {
        "trust_remote_code": sampling_args.trust_remote_code,
        **(sampling_args.model_init_kwargs or {}),
    }
    bits = in_bits(args)
    own = kwargs.pop("dtype", sampling_args.dtype)
    form = "prompts in the expert's chat template"
    if not has_messages(prompts):
        ignored = sampler.processing_class.chat_template is not None
        form = "prompts as plain text" + (" (`--conversational` puts them in the chat template)" if ignored else "")
    announce(
        f"expert in {dtype_of(args.expert, own, 'expert', bool(bits), **kwargs)}{bits}",
        prompts_at_a_time(sampling_args.per_device_batch_size),
        form,
    )


def as_prompts(dataset: "Dataset", args: PairArguments) -> "tuple[Dataset, PromptFormat | None]":
    """The dataset with the `prompt` column that `args` asks for, and the format of its prompts if they were text."""
    dataset = name_prompts(dataset, args.prompt_column)
    style, template = args.prompt_style, args.prompt_template
    switches: Any = args.chat_template_kwargs or {}
    if has_messages(dataset):
        if style is None and template is None:
            return put_switches(dataset, switches), None
        raise ValueError("The prompts are messages already. Put the system prompt into them, or give them as text.")
    if style is None and not switches:
        prompt_format = PromptFormat("raw", template or "{question}")
    else:
        prompt_format = PromptFormat(style or "chat", template, args.system_prompt or "", switches)
    return make_prompts(dataset, prompt_format), prompt_format
