"""Settings of `run_pipeline`: what a user would set; everything else is set by the single commands."""

from dataclasses import dataclass, field

from ..config_checks import check_choices, check_flags, check_numbers, check_output_dir, check_whole_numbers
from ..evaluation.sets import BENCHMARKS
from ..steps.prompt_format import STYLES, read_template


@dataclass
class RunConfig:
    r"""
    Configuration class for [`run_pipeline`] and `lightreasoner run`. Defaults are those of the single commands.

    Parameters:
        > Parameters that control the output

        output_dir (`str`):
            Folder for everything: steps, adapter, evaluation, report and verdict.json. A run that was broken off goes
            on there.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete what a run left in `output_dir`. Otherwise it is kept, and only a run with the same
            settings may go on.

        > Parameters that control the models

        expert (`str`):
            Id or path of the stronger model, which is fine-tuned.
        amateur (`str`, *optional*):
            Id or path of the weaker model, of any vocabulary. If `None`, it is the expert itself, with
            `amateur_skipped_layers`, or behind an `amateur_system_prompt` or `amateur_prompt_template`.
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
        dtype (`str`, *optional*):
            Data type of the models' weights: `"auto"` (the checkpoint's own), `"bfloat16"`, `"float16"` or
            `"float32"`. If `None`, `"float32"` on a CPU, which is slow in half precision, and elsewhere `"auto"`.

        > Parameters that control the questions

        dataset_name (`str`):
            Questions: a dataset on the Hub, a folder, or a file (JSON lines, Parquet, CSV).
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to use.
        prompt_column (`str`, *optional*):
            Column that holds the questions, as text or as lists of messages. If `None`, it is `prompt`, or else
            `question`.
        answer_column (`str`, *optional*):
            Column that holds the answers to questions that are held back: the answer alone, or a solution with it
            behind #### or in \boxed{}. If `None`, it is `answer`, if there is one; without it nothing is held back.
        num_prompts (`int`, *optional*, defaults to `1000`):
            How many questions are sampled, from the first. Their answers are not looked at.
        num_held_out (`int`, *optional*, defaults to `500`):
            How many questions, from the last, are held back, never sampled, and answered before and after training; at
            most half of the rows. `0` holds none back.
        benchmarks (`list[str]`, *optional*):
            Benchmarks that are answered as well, as of `lightreasoner eval`, with blanks or commas between: gsm8k,
            math500, math, svamp, asdiv, minerva_math, olympiadbench, mmlu_stem.
        data_dir (`str`, *optional*):
            Folder with files of the benchmarks. If `None`, they come from the Hub.

        > Parameters that control the prompts

        prompt_style (`str`, *optional*):
            What is made of questions that are text: `"chat"`: a user's message, through the expert's chat template.
            `"raw"`: plain text, for base models. If `None`, `"chat"` if the expert has a chat template.
        system_prompt (`str`, *optional*):
            System message of the style `"chat"`, empty for none. If `None`, that of Qwen2.5-Math: Please reason step
            by step, and put your final answer within \boxed{}.
        prompt_template (`str`, *optional*):
            Text with {question} in it, or a file with such text, in which the question is put. If `None`, the question
            alone for `"chat"`, and for `"raw"` `"Question: {question}"` with a line `"Answer:"` below.

        > Parameters that control the sampling

        alpha (`float`, *optional*, defaults to `0.2`):
            Plausibility threshold in (0, 1]: a token can be in a label if the expert holds it at least `alpha` times
            as probable as its favourite.
        contrast_strength (`float`, *optional*, defaults to `1.0`):
            gamma of the label pi_E^lambda (pi_E / pi_A)^gamma, from 0 to 100; the paper's is 1. At 0 the amateur
            chooses the steps alone, and the label is pi_E^lambda over the plausible tokens.
        expert_anchor (`float`, *optional*, defaults to `0.0`):
            lambda of the label, from 0 to 100; the paper's is 0. At 1 the label goes on from the expert, as
            contrastive decoding does with a `contrast_strength` of 0.5.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest completion that is sampled.

        > Parameters that control the training

        beta (`float`, *optional*):
            Threshold in nats: steps whose divergence is below it are not trained on; those of 0.4 nats or more are
            stored. If `None`, it is 1.6 where v_C prefers another token than the expert's at a tenth of those steps or
            more, and otherwise 0.8.
        learning_rate (`float`, *optional*, defaults to `0.0001`):
            The initial learning rate for AdamW.
        max_steps (`int`, *optional*, defaults to `125`):
            Number of updates, of 8 trajectories each.
        lora_r (`int`, *optional*, defaults to `8`):
            LoRA R value.
        lora_alpha (`int`, *optional*, defaults to `16`):
            LoRA alpha.
        lora_target_modules (`list[str]`, *optional*):
            LoRA target modules. If `None`, they are those that PEFT names for the architecture, such as q_proj and
            v_proj, if v_C prefers another token than the expert's at a tenth or more of the steps of 1.6 nats or more,
            and otherwise all linear layers.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the training.

        > Parameters that control the rounds

        num_rounds (`int`, *optional*, defaults to `1`):
            How often questions are sampled and trained on. Each later round samples fresh ones with the adapter of the
            round before, and trains it further. It ends before where a round does harm, and the best round is kept.
        prompts_per_round (`int`, *optional*):
            How many fresh questions a later round samples. If `None`, `num_prompts`.
        label_expert (`str`, *optional*, defaults to `"base"`):
            What labels the answers of a later round: `"base"`: the expert as it was at first, so that no round
            amplifies what the one before has taught. `"live"`: the expert with its adapter.
        keep_earlier_steps (`bool`, *optional*, defaults to `True`):
            Whether a later round is trained on the steps of the rounds before, too.

        > Parameters that control the answers

        eval_max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest answer. One that does not end before is cut there, counted, and graded as it stands.
    """

    output_dir: str = field(
        metadata={
            "help": "Folder for everything: steps, adapter, evaluation, report and verdict.json. A run that was "
            "broken off goes on there."
        },
    )
    expert: str = field(
        metadata={"help": "Id or path of the stronger model, which is fine-tuned."},
    )
    dataset_name: str = field(
        metadata={"help": "Questions: a dataset on the Hub, a folder, or a file (JSON lines, Parquet, CSV)."},
    )
    amateur: str | None = field(
        default=None,
        metadata={
            "help": "Id or path of the weaker model, of any vocabulary. If `None`, it is the expert itself, with "
            "`amateur_skipped_layers`, or behind an `amateur_system_prompt` or `amateur_prompt_template`."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Whether to delete what a run left in `output_dir`. Otherwise it is kept, and only a run with "
            "the same settings may go on."
        },
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
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the models' weights: 'auto' (the checkpoint's own), 'bfloat16', 'float16' or "
            "'float32'. If `None`, 'float32' on a CPU, which is slow in half precision, and elsewhere 'auto'.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of the dataset."},
    )
    dataset_split: str = field(
        default="train",
        metadata={"help": "Split to use."},
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the questions, as text or as lists of messages. If `None`, it is `prompt`, "
            "or else `question`."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the answers to questions that are held back: the answer alone, or a "
            "solution with it behind #### or in \\boxed{}. If `None`, it is `answer`, if there is one; without it "
            "nothing is held back."
        },
    )
    num_prompts: int = field(
        default=1000,
        metadata={"help": "How many questions are sampled, from the first. Their answers are not looked at."},
    )
    num_held_out: int = field(
        default=500,
        metadata={
            "help": "How many questions, from the last, are held back, never sampled, and answered before and "
            "after training; at most half of the rows. `0` holds none back."
        },
    )
    benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Benchmarks that are answered as well, as of `lightreasoner eval`, with blanks or commas "
            "between: gsm8k, math500, math, svamp, asdiv, minerva_math, olympiadbench, mmlu_stem."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with files of the benchmarks. If `None`, they come from the Hub."},
    )
    prompt_style: str | None = field(
        default=None,
        metadata={
            "help": "What is made of questions that are text: 'chat': a user's message, through the expert's chat "
            "template. 'raw': plain text, for base models. If `None`, 'chat' if the expert has a chat template.",
            "choices": list(STYLES),
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message of the style 'chat', empty for none. If `None`, that of Qwen2.5-Math: Please "
            "reason step by step, and put your final answer within \\boxed{}."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text with {question} in it, or a file with such text, in which the question is put. If "
            "`None`, the question alone for 'chat', and for 'raw' 'Question: {question}' with a line 'Answer:' "
            "below."
        },
    )
    alpha: float = field(
        default=0.2,
        metadata={
            "help": "Plausibility threshold in (0, 1]: a token can be in a label if the expert holds it at least "
            "`alpha` times as probable as its favourite."
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
    max_new_tokens: int = field(
        default=128,
        metadata={"help": "Longest completion that is sampled."},
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Threshold in nats: steps whose divergence is below it are not trained on; those of 0.4 nats "
            "or more are stored. If `None`, it is 1.6 where v_C prefers another token than the expert's at a tenth "
            "of those steps or more, and otherwise 0.8."
        },
    )
    learning_rate: float = field(
        default=0.0001,
        metadata={"help": "The initial learning rate for AdamW."},
    )
    max_steps: int = field(
        default=125,
        metadata={"help": "Number of updates, of 8 trajectories each."},
    )
    lora_r: int = field(
        default=8,
        metadata={"help": "LoRA R value."},
    )
    lora_alpha: int = field(
        default=16,
        metadata={"help": "LoRA alpha."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "LoRA target modules. If `None`, they are those that PEFT names for the architecture, such as "
            "q_proj and v_proj, if v_C prefers another token than the expert's at a tenth or more of the steps of 1.6 "
            "nats or more, and otherwise all linear layers."
        },
    )
    seed: int = field(
        default=42,
        metadata={"help": "Seed of the training."},
    )
    num_rounds: int = field(
        default=1,
        metadata={
            "help": "How often questions are sampled and trained on. Each later round samples fresh ones with the "
            "adapter of the round before, and trains it further. It ends before where a round does harm, and the best "
            "round is kept."
        },
    )
    prompts_per_round: int | None = field(
        default=None,
        metadata={"help": "How many fresh questions a later round samples. If `None`, `num_prompts`."},
    )
    label_expert: str = field(
        default="base",
        metadata={
            "help": "What labels the answers of a later round: 'base': the expert as it was at first, so that no "
            "round amplifies what the one before has taught. 'live': the expert with its adapter.",
            "choices": ["base", "live"],
        },
    )
    keep_earlier_steps: bool = field(
        default=True,
        metadata={"help": "Whether a later round is trained on the steps of the rounds before, too."},
    )
    eval_max_new_tokens: int = field(
        default=512,
        metadata={
            "help": "Longest answer. One that does not end before is cut there, counted, and graded as it stands."
        },
    )

    def __post_init__(self):
        check_output_dir(self)
        if self.dtype is not None:
            check_choices(self, ("dtype",))
        check_choices(self, ("label_expert",))
        check_flags(self, ("overwrite_output_dir", "keep_earlier_steps"))
        counts = ("num_prompts", "num_rounds", "max_new_tokens", "max_steps", "lora_r", "lora_alpha")
        check_whole_numbers(self, (*counts, "eval_max_new_tokens"), optional=("prompts_per_round",))
        for name in ("num_held_out", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be a whole number, 0 or more, got {value!r}.")
        if self.amateur_prompt_template is not None:
            self.amateur_prompt_template = read_template(self.amateur_prompt_template, "amateur_prompt_template")
        if self.prompt_style is not None:
            check_choices(self, ("prompt_style",))
        if self.prompt_style == "raw" and self.system_prompt:
            raise ValueError("`prompt_style='raw'` does not go with `system_prompt`: put its text into the template.")
        if self.prompt_template is not None:
            self.prompt_template = read_template(self.prompt_template)
        # The other numbers are checked by the settings of the stages, which are made of them before anything is done
        check_numbers(self, ("alpha", "learning_rate"))
        if isinstance(self.benchmarks, str):
            self.benchmarks = [self.benchmarks]
        names = [part for name in self.benchmarks or [] for part in name.replace(",", " ").split()]
        self.benchmarks = list(dict.fromkeys(names)) or None
        for name in names:
            if name not in BENCHMARKS:
                raise ValueError(f"There is no benchmark {name!r}. There are {', '.join(BENCHMARKS)}.")

    @property
    def num_prompts_later(self) -> int:
        """How many questions each round behind the first samples."""
        return self.num_prompts if self.prompts_per_round is None else self.prompts_per_round
