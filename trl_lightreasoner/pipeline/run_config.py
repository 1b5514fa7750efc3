"""Settings of `run_pipeline`: the common ones. All others are set with the single commands."""

from dataclasses import dataclass, field
from typing import Any

from ..config_checks import (
    check_amateur_settings,
    check_choices,
    check_flags,
    check_numbers,
    check_output_dir,
    check_template_kwargs,
    check_whole_numbers,
)
from ..config_help import help_from_docstring
from ..evaluation.sets import name_benchmarks
from ..sampling.contrastive_sampling_config import ContrastiveSamplingConfig
from ..steps.prompt_format import STYLES, read_template


@dataclass
@help_from_docstring
class RunConfig:
    r"""
    Configuration class for [`run_pipeline`] and `lightreasoner run`. The defaults are those of the single commands.

    Parameters:
        > Parameters that control the output

        output_dir (`str`):
            Folder for all output: steps, adapter, evaluation, report and verdict.json. An interrupted run resumes from
            this folder.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete what an earlier run left in `output_dir`. Otherwise the files are kept, and a run resumes
            only with the same settings.

        > Parameters that control the models

        expert (`str`):
            Hub id or path of the stronger model, which is fine-tuned.
        amateur (`str`, *optional*):
            Hub id or path of the weaker model, which may have any vocabulary. If `None`, the amateur is the expert
            without a tenth of its layers, or as `amateur_num_skipped_layers`, `amateur_skipped_layers`,
            `amateur_system_prompt` and `amateur_prompt_template` say.
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
        dtype (`str`, *optional*):
            Data type of the models' weights: `"auto"` (the checkpoint's own), `"bfloat16"`, `"float16"` or
            `"float32"`. If `None`, it is `"float32"` on a CPU, which is slow in half precision, and otherwise
            `"auto"`.

        > Parameters that control the questions

        dataset_name (`str`):
            Dataset of questions: on the Hub, a folder, or a file (JSON lines, Parquet, CSV).
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to use.
        prompt_column (`str`, *optional*):
            Column that holds the questions, as text or as lists of messages. If `None`, it is the first of `prompt`,
            `question` and `messages` that there is.
        answer_column (`str`, *optional*):
            Column that holds the answers to the held-out questions: the answer alone, or a solution that has it after
            `####` or in `\boxed{}`. If `None`, it is `answer` if there is one. Without answers no question is held
            out.
        num_prompts (`int`, *optional*, defaults to `1000`):
            Number of questions to sample, from the start of the dataset. Their answers are not used.
        num_held_out (`int`, *optional*, defaults to `500`):
            Number of questions to hold out, from the end of the dataset, at most half of them. They are never
            sampled, and they are answered before and after training. `0` holds out none.
        benchmarks (`list[str]`, *optional*):
            Benchmarks to answer as well, as `lightreasoner eval` does, separated by spaces or commas: gsm8k, math500,
            math, svamp, asdiv, minerva_math, olympiadbench, mmlu_stem, or a file with the columns question and answer.
        data_dir (`str`, *optional*):
            Folder that holds the benchmarks' files. If `None`, they are loaded from the Hub.

        > Parameters that control the prompts

        prompt_style (`str`, *optional*):
            How to prompt with questions that are text. `"chat"`: as a user message, in the expert's chat template.
            `"raw"`: as plain text, for base models. If `None`, it is `"chat"` if the expert has a chat template, and
            otherwise `"raw"`.
        system_prompt (`str`, *optional*):
            System message for the style `"chat"`. An empty text leaves it out. If `None`, it is that of Qwen2.5-Math:
            Please reason step by step, and put your final answer within \boxed{}.
        prompt_template (`str`, *optional*):
            Prompt template: text that contains {question}, or a file that holds such text. If `None`, it is the
            question alone for `"chat"`, and for `"raw"` it is `"Question: {question}"` followed by a line `"Answer:"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for the chat template, such as `'{"enable_thinking": false}'`, for all
            questions and benchmarks. If `None`, they are those of a column 'chat_template_kwargs', if there is one.

        > Parameters that control the sampling

        alpha (`float`, *optional*, defaults to `0.2`):
            Plausibility threshold in (0, 1]: a token is plausible if its expert probability is at least `alpha` times
            that of the expert's most probable token. Only plausible tokens are in a label.
        contrast_strength (`float`, *optional*, defaults to `1.0`):
            Exponent gamma of the contrast in the label, from 0 to 100. The label is pi_E^lambda (pi_E / pi_A)^gamma
            over the plausible tokens, normalized. pi_E and pi_A are the probabilities that expert and amateur give a
            token. The paper uses 1. At 0 the amateur only selects the steps.
        expert_anchor (`float`, *optional*, defaults to `0.0`):
            Exponent lambda of the expert's own probability in the label (see `contrast_strength`), from 0 to 100. The
            paper uses 0. At 1 the label starts from the expert's distribution, as in contrastive decoding with a
            `contrast_strength` of 0.5.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum number of tokens to sample per completion.

        > Parameters that control the training

        beta (`float`, *optional*):
            Divergence threshold in nats: training uses only the steps at or above it. Steps of 0.4 nats or more are
            stored. If `None`, it is 1.6 if v_C prefers a token other than the expert's at a tenth or more of the steps
            of 1.6 nats or more, and otherwise 0.8.
        learning_rate (`float`, *optional*, defaults to `0.0001`):
            The initial learning rate for AdamW.
        max_steps (`int`, *optional*, defaults to `125`):
            Number of updates, of 8 trajectories each.
        lora_r (`int`, *optional*, defaults to `8`):
            LoRA R value.
        lora_alpha (`int`, *optional*, defaults to `16`):
            LoRA alpha.
        lora_target_modules (`list[str]`, *optional*):
            LoRA target modules. If `None`, they depend on the steps of 1.6 nats or more. If v_C prefers a token other
            than the expert's at a tenth or more of them, PEFT's defaults for the architecture are used, such as q_proj
            and v_proj. Otherwise all linear layers are used.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the training.

        > Parameters that control the rounds

        num_rounds (`int`, *optional*, defaults to `1`):
            Number of rounds of sampling and training. Each later round samples new questions with the adapter of the
            previous round and trains it further. The run stops early if a round does harm, and the best round is kept.
        prompts_per_round (`int`, *optional*):
            Number of new questions that each later round samples. If `None`, it is `num_prompts`.
        label_expert (`str`, *optional*, defaults to `"base"`):
            Model that labels the completions of later rounds. `"base"`: the original expert, which keeps a round from
            amplifying what the previous one taught. `"live"`: the expert with its adapter.
        keep_earlier_steps (`bool`, *optional*, defaults to `True`):
            Whether a later round also trains on the steps of earlier rounds.

        > Parameters that control the answers

        eval_max_new_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens to generate per answer. Longer answers are cut off, counted, and graded as they
            stand.
    """

    output_dir: str
    expert: str
    dataset_name: str
    amateur: str | None = None
    overwrite_output_dir: bool = False
    amateur_chat_template: str | None = None
    amateur_skipped_layers: list[int] | None = None
    amateur_num_skipped_layers: int | None = None
    amateur_system_prompt: str | None = None
    amateur_prompt_template: str | None = None
    dtype: str | None = field(default=None, metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    dataset_config: str | None = None
    dataset_split: str = "train"
    prompt_column: str | None = None
    answer_column: str | None = None
    num_prompts: int = 1000
    num_held_out: int = 500
    benchmarks: list[str] | None = None
    data_dir: str | None = None
    prompt_style: str | None = field(default=None, metadata={"choices": list(STYLES)})
    system_prompt: str | None = None
    prompt_template: str | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    alpha: float = 0.2
    contrast_strength: float = 1.0
    expert_anchor: float = 0.0
    max_new_tokens: int = 128
    beta: float | None = None
    learning_rate: float = 0.0001
    max_steps: int = 125
    lora_r: int = 8
    lora_alpha: int = 16
    lora_target_modules: list[str] | None = None
    seed: int = 42
    num_rounds: int = 1
    prompts_per_round: int | None = None
    label_expert: str = field(default="base", metadata={"choices": ["base", "live"]})
    keep_earlier_steps: bool = True
    eval_max_new_tokens: int = 512

    def __post_init__(self):
        check_output_dir(self)
        check_choices(self, ("label_expert",), optional=("dtype", "prompt_style"))
        check_flags(self, ("overwrite_output_dir", "keep_earlier_steps"))
        counts = ("num_prompts", "num_rounds", "max_new_tokens", "max_steps", "lora_r", "lora_alpha")
        check_whole_numbers(self, (*counts, "eval_max_new_tokens"), optional=("prompts_per_round",))
        check_whole_numbers(self, ("num_held_out", "seed"), least=0)
        check_amateur_settings(self)
        self.amateur_prompt_template = read_template(self.amateur_prompt_template, "amateur_prompt_template")
        if self.prompt_style == "raw" and self.system_prompt:
            raise ValueError(
                "`prompt_style='raw'` cannot be combined with `system_prompt`: put its text into the template."
            )
        check_template_kwargs(self)
        self.prompt_template = read_template(self.prompt_template)
        # The other numbers are checked when the settings of the stages are made from them, before any work
        check_numbers(self, ("alpha", "learning_rate"))
        if isinstance(self.beta, int | float) and 0 < self.beta < ContrastiveSamplingConfig.beta:
            raise ValueError(
                f"`beta` must be 0 or at least {ContrastiveSamplingConfig.beta} nats, the sampling threshold, got "
                f"{self.beta!r}. For a lower one, set it in `sample` and `train`."
            )
        self.benchmarks = name_benchmarks(self.benchmarks or []) or None

    @property
    def num_prompts_later(self) -> int:
        """Number of questions that each round after the first samples."""
        return self.num_prompts if self.prompts_per_round is None else self.prompts_per_round
