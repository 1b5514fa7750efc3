"""Settings of `ContrastiveStepSampler`."""

from dataclasses import dataclass, field
from typing import Any

from ..config_checks import (
    check_amateur_settings,
    check_choices,
    check_flags,
    check_init_kwargs,
    check_label_settings,
    check_numbers,
    check_output_dir,
    check_vllm_settings,
    check_whole_numbers,
)
from ..steps.prompt_format import read_template


@dataclass
class ContrastiveSamplingConfig:
    r"""
    Configuration class for the [`ContrastiveStepSampler`]. Defaults are the paper's (arXiv 2510.07962) where it has
    one.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the output

        output_dir (`str`):
            Folder for the Dataset. Rows are written there as they are made. A run that was broken off goes on there.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete sampled steps that `output_dir` already holds. Otherwise they are kept, and only a run
            with the same models, settings and prompts may go on.

        > Parameters that control the models

        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights of models given by id or path: `"auto"` (the checkpoint's own), `"bfloat16"`,
            `"float16"` or `"float32"`.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the expert is given
            by id or path. The `revision` value is also used when loading its tokenizer.
        amateur_model_init_kwargs (`dict[str, Any]`, *optional*):
            The same for the amateur.
        amateur_chat_template (`str`, *optional*):
            Chat template of an amateur with another tokenizer than the expert's: Jinja text, a file with it, or
            `"plain"` for the messages' bare text, an empty line behind each. If `None`, the amateur's own.
        amateur_skipped_layers (`list[int]`, *optional*):
            Numbers, from 0, of the amateur's decoder layers that its passes leave out.
        amateur_system_prompt (`str`, *optional*):
            System message behind which the amateur reads the completion, empty for none. If `None`, the expert's.
        amateur_prompt_template (`str`, *optional*):
            Text with {question} in it, or a file with such text, in which the amateur reads the question. If `None`,
            the expert's.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code.

        > Parameters that control the contrast

        alpha (`float`, *optional*, defaults to `0.2`):
            Plausibility threshold in (0, 1]: a token can be in a label if the expert holds it at least `alpha` times
            as probable as its favourite.
        beta (`float`, *optional*, defaults to `0.4`):
            Informativeness threshold in nats: a step is kept if the expert's distribution diverges from the amateur's
            by at least this much.
        contrast_strength (`float`, *optional*, defaults to `1.0`):
            gamma of the label pi_E^lambda (pi_E / pi_A)^gamma, from 0 to 100; the paper's is 1. At 0 the amateur
            chooses the steps alone, and the label is pi_E^lambda over the plausible tokens.
        expert_anchor (`float`, *optional*, defaults to `0.0`):
            lambda of the label, from 0 to 100; the paper's is 0. At 1 the label goes on from the expert, as
            contrastive decoding does with a `contrast_strength` of 0.5.
        label_expert (`str`, *optional*, defaults to `"live"`):
            Of an expert with an adapter, what is contrasted with the amateur: `"live"`: the expert as it answers.
            `"base"`: the expert without its adapter, as for a later round, whose labels then stay those of the first.
        include_first_step (`bool`, *optional*, defaults to `False`):
            Whether the first token of a completion can be a kept step. The published scripts skip it, and with a plain
            prompt its label costs accuracy.

        > Parameters that control the generation

        max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest completion to generate. Unused for datasets with a `completion` column.
        max_prompt_length (`int`, *optional*):
            Prompts of more tokens than this are skipped and counted; none is ever cut. If `None`, only prompts that
            leave no room in the models' context are skipped.
        per_device_batch_size (`int`, *optional*):
            Number of prompts processed together. If `None`, as many as the memory of a CUDA GPU
            allows, 1,024 at most, and 16 on other devices. It is halved when memory runs out.

        > Parameters that control the generation by vLLM

        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM generates the completions. The expert must be given by id or path.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: vLLM runs on this machine, beside the models, and needs the `vllm` package here. `"server"`:
            completions come from a server (`vllm serve`) that runs already, here or elsewhere.
        vllm_server_base_url (`str`, *optional*, defaults to `"http://localhost:8000"`):
            Base URL of the vLLM server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the vLLM server to be up.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that vLLM takes in mode `"colocate"`, its copy of the expert included.
    """

    output_dir: str = field(
        metadata={
            "help": "Folder for the Dataset. Rows are written there as they are made. A run that was broken off goes "
            "on there."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Whether to delete sampled steps that `output_dir` already holds. Otherwise they are kept, and "
            "only a run with the same models, settings and prompts may go on."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type of the weights of models given by id or path: 'auto' (the checkpoint's own), "
            "'bfloat16', 'float16' or 'float32'.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the expert is given by "
            "id or path. The `revision` value is also used when loading its tokenizer."
        },
    )
    amateur_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The same for the amateur."},
    )
    amateur_chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template of an amateur with another tokenizer than the expert's: Jinja text, a file with "
            "it, or 'plain' for the messages' bare text, an empty line behind each. If `None`, the amateur's own."
        },
    )
    amateur_skipped_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers, from 0, of the amateur's decoder layers that its passes leave out."},
    )
    amateur_system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message behind which the amateur reads the completion, empty for none. If `None`, the "
            "expert's."
        },
    )
    amateur_prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text with {question} in it, or a file with such text, in which the amateur reads the question. "
            "If `None`, the expert's."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether to allow loading models and tokenizers that ship custom Python code."},
    )
    alpha: float = field(
        default=0.2,
        metadata={
            "help": "Plausibility threshold in (0, 1]: a token can be in a label if the expert holds it at least "
            "`alpha` times as probable as its favourite."
        },
    )
    beta: float = field(
        default=0.4,
        metadata={
            "help": "Informativeness threshold in nats: a step is kept if the expert's distribution diverges from the "
            "amateur's by at least this much."
        },
    )
    contrast_strength: float = field(
        default=1.0,
        metadata={
            "help": "gamma of the label pi_E^lambda (pi_E / pi_A)^gamma, from 0 to 100; the paper's is 1. At 0 the "
            "amateur chooses the steps alone, and the label is pi_E^lambda over the plausible tokens."
        },
    )
    expert_anchor: float = field(
        default=0.0,
        metadata={
            "help": "lambda of the label, from 0 to 100; the paper's is 0. At 1 the label goes on from the expert, as "
            "contrastive decoding does with a `contrast_strength` of 0.5."
        },
    )
    label_expert: str = field(
        default="live",
        metadata={
            "help": "Of an expert with an adapter, what is contrasted with the amateur: 'live': the expert as it "
            "answers. 'base': the expert without its adapter, as for a later round, whose labels then stay those of "
            "the first.",
            "choices": ["live", "base"],
        },
    )
    include_first_step: bool = field(
        default=False,
        metadata={
            "help": "Whether the first token of a completion can be a kept step. The published scripts skip it, and "
            "with a plain prompt its label costs accuracy."
        },
    )
    max_new_tokens: int = field(
        default=128,
        metadata={"help": "Longest completion to generate. Unused for datasets with a `completion` column."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of more tokens than this are skipped and counted; none is ever cut. If `None`, only "
            "prompts that leave no room in the models' context are skipped."
        },
    )
    per_device_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of prompts processed together. If `None`, as many as the memory of "
            "a CUDA GPU allows, 1,024 at most, and 16 on other devices. It is halved when memory runs out."
        },
    )
    use_vllm: bool = field(
        default=False,
        metadata={"help": "Whether vLLM generates the completions. The expert must be given by id or path."},
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "'colocate': vLLM runs on this machine, beside the models, and needs the `vllm` package here. "
            "'server': completions come from a server (`vllm serve`) that runs already, here or elsewhere.",
            "choices": ["colocate", "server"],
        },
    )
    vllm_server_base_url: str = field(
        default="http://localhost:8000",
        metadata={"help": "Base URL of the vLLM server."},
    )
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={"help": "Seconds to wait for the vLLM server to be up."},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={
            "help": "Share of the GPU's memory that vLLM takes in mode 'colocate', its copy of the expert included."
        },
    )

    def __post_init__(self):
        check_init_kwargs(self, ("model_init_kwargs", "amateur_model_init_kwargs"))
        check_amateur_settings(self)
        check_choices(self, ("dtype", "label_expert", "vllm_mode"))
        check_output_dir(self)
        check_flags(self, ("overwrite_output_dir", "trust_remote_code", "include_first_step", "use_vllm"))
        check_numbers(self, ("alpha", "beta", "vllm_server_timeout", "vllm_gpu_memory_utilization"))
        if self.amateur_prompt_template is not None:
            self.amateur_prompt_template = read_template(self.amateur_prompt_template, "amateur_prompt_template")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"`alpha` must be in (0, 1], got {self.alpha}. The paper uses 0.2.")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(
                f"`beta` must be a finite number of nats, 0 or more, got {self.beta}. The paper uses 0.4."
            )
        check_label_settings(self)
        check_vllm_settings(self)
        check_whole_numbers(self, ("max_new_tokens",), optional=("max_prompt_length", "per_device_batch_size"))
