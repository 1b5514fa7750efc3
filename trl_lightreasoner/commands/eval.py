"""`lightreasoner eval`: measure a model on benchmarks or your own questions, and compare it with a baseline."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..config_help import help_from_docstring
from ..evaluation.evaluation_config import EvaluationConfig
from .arguments import ArgumentParser, quantization_of
from .next_command import next_command
from .running_on import announce, dtype_of, prompts_at_a_time


if TYPE_CHECKING:
    from ..evaluation.evaluation import Evaluation


EXAMPLE = r"""example:
  lightreasoner eval --model adapter --baseline Qwen/Qwen2.5-Math-1.5B \
      --benchmarks gsm8k,math500 --output_dir evaluation"""


@dataclass
@help_from_docstring
class EvaluationArguments:
    """
    Models of `lightreasoner eval`.

    Parameters:
        model (`str`):
            Hub id or path of a model or an adapter.
        baseline (`str`, *optional*):
            Hub id or path of the model to compare it with, problem by problem. For an adapter, usually its base model.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to load both models in 4 bits.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to load both models in 8 bits.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            Quantization type of models in 4 bits: `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Whether to use nested quantization for models in 4 bits.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to add the accuracies to the model card on the Hub.
        hub_model_id (`str`, *optional*):
            Repository of that card, as owner/name. If not set, it is `model`.
        hub_token (`str`, *optional*):
            Token for the upload. If not set, it is the one from `hf auth login`.
    """

    model: str
    baseline: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["nf4", "fp4"]})
    use_bnb_nested_quant: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`load_in_4bit` and `load_in_8bit` cannot be combined.")


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([EvaluationArguments, EvaluationConfig], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(script_args: EvaluationArguments, args: EvaluationConfig) -> None:
    import datasets

    from ..evaluation.evaluation import evaluate
    from ..hub.sharing import open_repo, push_evaluation_to_hub
    from ..models.loading import hub_kwargs
    from ..models.provenance import hub_id
    from ..processes import Processes
    from ..steps.prompt_format import load_prompt_format

    repo_id = script_args.hub_model_id or hub_id(script_args.model) or ""
    if script_args.push_to_hub and not repo_id:
        raise ValueError(
            f"{script_args.model!r} is a folder. Name the repository of its model card with `--hub_model_id`."
        )
    if script_args.push_to_hub and Processes().is_main:  # fail now if the user may not write
        repo_id = open_repo(repo_id, token=script_args.hub_token)
    datasets.disable_progress_bars()  # those of files. The bar of the answers remains
    quantization = quantization_of(script_args, args.dtype)
    kwargs = {
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),  # type: ignore[dict-item]  # already parsed
    }
    own = kwargs.pop("dtype", args.dtype)
    dtype = dtype_of(script_args.model, own, is_quantized=quantization is not None, **kwargs)
    style = args.prompt_format(load_prompt_format(script_args.model, **hub_kwargs(kwargs))).prompt_style
    announce(
        f"model in {dtype}",
        prompts_at_a_time(args.per_device_batch_size),
        "questions in the chat template" if style == "chat" else "questions as plain text",
    )
    evaluation = evaluate(script_args.model, args, script_args.baseline, quantization_config=quantization)
    if not Processes().is_main:
        return
    print(f"\n{evaluation.table()}\n")
    for remark in remarks(evaluation, args):
        print(remark)
    print(f"Percent, +- one standard error. Answers and results.json are in {args.output_dir}.")
    if script_args.push_to_hub:
        push_evaluation_to_hub(evaluation, repo_id, script_args.hub_token)
        print(f"The accuracies are in the model card of {repo_id} on the Hub.")
    if Path(script_args.model, "adapter_config.json").is_file():
        print(next_command("merge", "--model", script_args.model, "--output_dir", "MODEL"))
    elif Path(script_args.model).is_dir() and script_args.baseline is not None:
        print(f"Next: {shlex.join(['hf', 'upload', 'OWNER/NAME', script_args.model])}")


def remarks(evaluation: "Evaluation", args: EvaluationConfig) -> Iterator[str]:
    """Sentences about answers that were cut off or could not be graded."""
    scores = evaluation.results["benchmarks"].values()
    for role in ("model", "baseline"):
        of_role = [score[role] | score for score in scores if role in score]
        num_answers, num_cut, num_undecided = (
            sum(score[name] for score in of_role) for name in ("num_problems", "num_cut", "num_undecided")
        )
        if num_cut:
            yield (
                f"{num_cut:,} of {num_answers:,} answers of the {role} did not end within {args.max_new_tokens:,} "
                "tokens or the model's context. They were graded as they stand."
            )
        if num_undecided:
            yield (
                f"{num_undecided:,} of {num_answers:,} answers of the {role} could not be graded and count as wrong. "
                f"The column `failure` of {Path(args.output_dir, role)} says why."
            )
