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
from ..config_help import help_from_docstring
from ..steps.prompt_format import read_template


@dataclass
@help_from_docstring
class ContrastiveSamplingConfig:
    r"""
    Configuration class for the [`ContrastiveStepSampler`]. The defaults are the paper's (arXiv 2510.07962) where it
    gives them.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the output

        output_dir (`str`):
            Folder for the Dataset. Rows are saved as they are sampled, and an interrupted run resumes from this
            folder.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the sampled steps in `output_dir`. Otherwise they are kept, and a run resumes only with
            the same models, settings and prompts.

        > Parameters that control the prompts

        num_prompts (`int`, *optional*):
            Number of prompts to sample, from the start of the dataset. If `None`, all of them. Must be set for a
            streamed dataset.

        > Parameters that control the models

        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights of models given by id or path: `"auto"` (the checkpoint's own, but float32 for
            float16 on a CPU), `"bfloat16"`, `"float16"` or `"float32"`.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the expert is given
            by id or path. The `revision` value is also used when loading its tokenizer.
        amateur_model_init_kwargs (`dict[str, Any]`, *optional*):
            As `model_init_kwargs`, for the amateur.
        amateur_chat_template (`str`, *optional*):
            Chat template of an amateur whose tokenizer differs from the expert's: Jinja text, a file that holds it, or
            `"plain"` for the bare text of the messages, each followed by an empty line. If `None`, the amateur's own
            template is used.
        amateur_skipped_layers (`list[int]`, *optional*):
            Indices, from 0, of the decoder layers that the amateur skips.
        amateur_num_skipped_layers (`int`, *optional*):
            Number of decoder layers in the middle of the model that the amateur skips, instead of
            `amateur_skipped_layers`. Of L layers, n are skipped from index (L - n) // 2 on: 3 of 28 are 12, 13 and 14.
        amateur_system_prompt (`str`, *optional*):
            System message of the amateur's prompt. An empty text leaves it out. If `None`, it is the expert's.
        amateur_prompt_template (`str`, *optional*):
            Prompt template of the amateur: text that contains {question}, or a file that holds such text. If `None`,
            it is the expert's.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code.

        > Parameters that control the contrast

        alpha (`float`, *optional*, defaults to `0.2`):
            Plausibility threshold in (0, 1]: a token is plausible if its expert probability is at least `alpha` times
            that of the expert's most probable token. Only plausible tokens are in a label.
        beta (`float`, *optional*, defaults to `0.4`):
            Informativeness threshold in nats: a step is kept if the expert's distribution diverges from the amateur's
            by at least this much.
        contrast_strength (`float`, *optional*, defaults to `1.0`):
            Exponent gamma of the contrast in the label, from 0 to 100. The label is pi_E^lambda (pi_E / pi_A)^gamma
            over the plausible tokens, normalized. pi_E and pi_A are the probabilities that expert and amateur give a
            token. The paper uses 1. At 0 the amateur only selects the steps.
        expert_anchor (`float`, *optional*, defaults to `0.0`):
            Exponent lambda of the expert's own probability in the label (see `contrast_strength`), from 0 to 100. The
            paper uses 0. At 1 the label starts from the expert's distribution, as in contrastive decoding with a
            `contrast_strength` of 0.5.
        label_expert (`str`, *optional*, defaults to `"live"`):
            For an expert with an adapter, the model to contrast with the amateur. `"live"`: the expert with its
            adapter. `"base"`: the expert without its adapter, so that in later rounds the labels stay those of the
            original expert.
        include_first_step (`bool`, *optional*, defaults to `False`):
            Whether the first token of a completion can be a kept step. The published scripts skip it, and with a plain
            prompt its label costs accuracy.

        > Parameters that control the generation

        max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum number of tokens to generate per completion. Ignored for datasets with a `completion` column.
        max_prompt_length (`int`, *optional*):
            Maximum number of tokens per prompt. Longer prompts are skipped and counted, never truncated. If `None`,
            only prompts that leave no room in the models' context are skipped.
        per_device_batch_size (`int`, *optional*):
            Number of prompts processed together. If `None`, as many as the memory of a CUDA GPU
            allows, 1,024 at most, and on other devices as many as 1 GiB holds, between 16 and 64. It is halved when
            memory runs out.

        > Parameters that control the generation by vLLM

        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM generates the completions. The expert must be given by id or path.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: vLLM runs on this machine, together with the models, and needs the `vllm` package.
            `"server"`: completions come from a running server (`vllm serve`), local or remote.
        vllm_server_base_url (`str`, *optional*, defaults to `"http://localhost:8000"`):
            Base URL of the vLLM server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Number of seconds to wait for the vLLM server to be up.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Fraction of the GPU's memory that vLLM uses in mode `"colocate"`, including its copy of the expert.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    num_prompts: int | None = None
    dtype: str = field(default="auto", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    model_init_kwargs: dict[str, Any] | str | None = None
    amateur_model_init_kwargs: dict[str, Any] | str | None = None
    amateur_chat_template: str | None = None
    amateur_skipped_layers: list[int] | None = None
    amateur_num_skipped_layers: int | None = None
    amateur_system_prompt: str | None = None
    amateur_prompt_template: str | None = None
    trust_remote_code: bool = False
    alpha: float = 0.2
    beta: float = 0.4
    contrast_strength: float = 1.0
    expert_anchor: float = 0.0
    label_expert: str = field(default="live", metadata={"choices": ["live", "base"]})
    include_first_step: bool = False
    max_new_tokens: int = 128
    max_prompt_length: int | None = None
    per_device_batch_size: int | None = None
    use_vllm: bool = False
    vllm_mode: str = field(default="colocate", metadata={"choices": ["colocate", "server"]})
    vllm_server_base_url: str = "http://localhost:8000"
    vllm_server_timeout: float = 240.0
    vllm_gpu_memory_utilization: float = 0.3

    def __post_init__(self):
        check_init_kwargs(self, ("model_init_kwargs", "amateur_model_init_kwargs"))
        check_amateur_settings(self)
        check_choices(self, ("dtype", "label_expert", "vllm_mode"))
        check_output_dir(self)
        check_flags(self, ("overwrite_output_dir", "trust_remote_code", "include_first_step", "use_vllm"))
        check_numbers(self, ("alpha", "beta", "vllm_server_timeout", "vllm_gpu_memory_utilization"))
        self.amateur_prompt_template = read_template(self.amateur_prompt_template, "amateur_prompt_template")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"`alpha` must be in (0, 1], got {self.alpha}. The paper uses 0.2.")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(
                f"`beta` must be a finite number of nats, 0 or more, got {self.beta}. The paper uses 0.4."
            )
        check_label_settings(self)
        check_vllm_settings(self)
        check_whole_numbers(
            self, ("max_new_tokens",), optional=("num_prompts", "max_prompt_length", "per_device_batch_size")
        )
