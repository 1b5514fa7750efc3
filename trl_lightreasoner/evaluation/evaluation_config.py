"""Settings of `evaluate`."""

from dataclasses import dataclass, field
from typing import Any

from ..config_checks import (
    check_choices,
    check_flags,
    check_init_kwargs,
    check_numbers,
    check_output_dir,
    check_template_kwargs,
    check_vllm_settings,
    check_whole_numbers,
)
from ..config_help import help_from_docstring
from ..steps.prompt_format import STYLES, SYSTEM_PROMPT, PromptFormat, read_template
from .sets import BENCHMARKS, name_benchmarks


@dataclass
@help_from_docstring
class EvaluationConfig:
    r"""
    Configuration class for [`evaluate`]. The defaults are those of Qwen2.5-Math's evaluation: zero-shot, greedy, 2,048
    tokens.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the output

        output_dir (`str`):
            Folder for the answers and results.json. Answers are saved as they are generated, and an interrupted run
            resumes from this folder.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the answers in `output_dir`. Otherwise they are kept, and a run resumes only with the
            same models, settings and problems.

        > Parameters that control the problems

        benchmarks (`list[str]`, *optional*):
            Benchmarks to answer, separated by spaces or commas: gsm8k, math500, math, svamp, asdiv, minerva_math,
            olympiadbench, mmlu_stem, or a file with the columns question and answer. If `None`, all benchmarks except
            math, which includes math500.
        data_dir (`str`, *optional*):
            Folder that holds the benchmarks' files: NAME.jsonl, benchmarks/NAME.jsonl or NAME/test.jsonl. If `None`,
            they are loaded from the Hub.
        max_samples (`int`, *optional*):
            Number of problems to use of each benchmark, from its start. If `None`, all of them.

        > Parameters that control the prompts

        prompt_style (`str`, *optional*):
            `"chat"`: each problem is a user message in the tokenizer's chat template. `"raw"`: plain text, for base
            models, and only the first answer of a completion is graded. If `None`, it is the format in the model's
            prompt_format.json, and without that file `"chat"`.
        system_prompt (`str`, *optional*):
            System message for the style `"chat"`. An empty text leaves it out. If `None`, it is the one that the model
            was trained with, or else that of Qwen2.5-Math: Please reason step by step, and put your final answer
            within \boxed{}.
        prompt_template (`str`, *optional*):
            Prompt template: text that contains {question}, or a file that holds such text. If `None`, it is the one
            that the model was trained with. Without one it is the problem alone for `"chat"`, and for `"raw"` it is
            `"Question: {question}"` followed by a line `"Answer:"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for the chat template, such as `'{"enable_thinking": false}'`. An empty dict
            leaves them out. If `None`, they are those that the model was trained with.

        > Parameters that control the models

        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights of models given by id or path: `"auto"` (the checkpoint's own, but float32 for
            float16 on a CPU), `"bfloat16"`, `"float16"` or `"float32"`.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the model is given
            by id or path. The `revision` value is also used when loading its tokenizer.
        baseline_model_init_kwargs (`dict[str, Any]`, *optional*):
            As `model_init_kwargs`, for the baseline.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code.

        > Parameters that control the generation

        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens to generate per answer. Longer answers are cut off, counted, and graded as they
            stand.
        per_device_batch_size (`int`, *optional*):
            Number of problems whose answers are generated together. If `None`, as many as the memory of a CUDA GPU
            allows, 1,024 at most, and on other devices as many as 1 GiB holds, between 16 and 64. It is halved when
            memory runs out.

        > Parameters that control the generation by vLLM

        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM generates the answers. Models must be given by id or path.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: vLLM runs on this machine, together with the model, and needs the `vllm` package. `"server"`:
            answers come from a running server (`vllm serve`), local or remote.
        vllm_server_base_url (`str`, *optional*, defaults to `"http://localhost:8000"`):
            Base URL of the vLLM server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Number of seconds to wait for the vLLM server to be up.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Fraction of the GPU's memory that vLLM uses in mode `"colocate"`, including its copy of the model.

        > Parameters that control the grading

        num_workers (`int`, *optional*):
            Number of grading processes. If `None`, the number of processors.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    benchmarks: list[str] | None = None
    data_dir: str | None = None
    max_samples: int | None = None
    prompt_style: str | None = field(default=None, metadata={"choices": list(STYLES)})
    system_prompt: str | None = None
    prompt_template: str | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    dtype: str = field(default="auto", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    model_init_kwargs: dict[str, Any] | str | None = None
    baseline_model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    max_new_tokens: int = 2048
    per_device_batch_size: int | None = None
    use_vllm: bool = False
    vllm_mode: str = field(default="colocate", metadata={"choices": ["colocate", "server"]})
    vllm_server_base_url: str = "http://localhost:8000"
    vllm_server_timeout: float = 240.0
    vllm_gpu_memory_utilization: float = 0.3
    num_workers: int | None = None

    def __post_init__(self):
        check_init_kwargs(self, ("model_init_kwargs", "baseline_model_init_kwargs"))
        check_choices(self, ("dtype", "vllm_mode"), optional=("prompt_style",))
        check_template_kwargs(self)
        check_output_dir(self)
        check_flags(self, ("overwrite_output_dir", "trust_remote_code", "use_vllm"))
        check_numbers(self, ("vllm_server_timeout", "vllm_gpu_memory_utilization"))
        check_vllm_settings(self)
        check_whole_numbers(self, ("max_new_tokens",), ("max_samples", "per_device_batch_size", "num_workers"))
        names = [name for name in BENCHMARKS if name != "math"] if self.benchmarks is None else self.benchmarks
        self.benchmarks = name_benchmarks(names)
        if not self.benchmarks:
            raise ValueError(f"`benchmarks` names none. There are {', '.join(BENCHMARKS)}.")
        self.prompt_template = read_template(self.prompt_template)

    def prompt_format(self, trained: PromptFormat | None = None) -> PromptFormat:
        """
        The format of the prompts.

        Args:
            trained ([`PromptFormat`], *optional*): The prompt format of the model's training, if known. It fills in
                whatever these settings leave open.
        """
        style = self.prompt_style or (trained.prompt_style if trained else "chat")
        if trained is None or trained.prompt_style != style:
            trained = PromptFormat(style, system_prompt=SYSTEM_PROMPT if style == "chat" else "")
        system = trained.system_prompt if self.system_prompt is None else self.system_prompt
        switches: Any = self.chat_template_kwargs
        switches = trained.chat_template_kwargs or {} if switches is None else switches
        return PromptFormat(style, self.prompt_template or trained.prompt_template, system, switches)
