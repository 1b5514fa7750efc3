"""`lightreasoner import`: convert the published scripts' JSON lines to a Dataset of kept steps."""

from dataclasses import dataclass

from ..config_help import help_from_docstring
from .arguments import ArgumentParser
from .next_command import next_command
from .terminal import hide_file_bars


EXAMPLE = r"""example:
  lightreasoner import cd_samples.jsonl --expert Qwen/Qwen2.5-Math-1.5B --output_dir steps"""


@dataclass
@help_from_docstring
class ImportArguments:
    """
    Settings of `lightreasoner import`.

    Parameters:
        file (`str`):
            File of JSON lines that the published scripts have sampled, one step per line.
        output_dir (`str`):
            Folder for the Dataset.
        expert (`str`):
            Hub id or path of the expert that sampled the steps. Its tokenizer reads the text.
        system_prompt (`str`, *optional*, defaults to `"Please reason step by step."`):
            System message before each question. An empty text leaves it out.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete steps that `output_dir` already holds.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading tokenizers that ship custom Python code.
    """

    file: str
    output_dir: str
    expert: str
    system_prompt: str = "Please reason step by step."
    overwrite_output_dir: bool = False
    trust_remote_code: bool = False

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError(f"`output_dir` must name a folder, got {self.output_dir!r}.")


def make_parser(prog: str | None = None) -> ArgumentParser:
    prog = prog or "lightreasoner import"
    usage = f"{prog} FILE [--flag VALUE ...] [--config FILE.yaml]"
    hint = "The file comes first: `lightreasoner import FILE --output_dir DIR`."
    return ArgumentParser(
        [ImportArguments], first="file", hint=hint, prog=prog, usage=usage, description=__doc__, epilog=EXAMPLE
    )


def main(args: ImportArguments) -> None:
    from ..steps.dataset import count_steps
    from ..steps.published_steps import import_published_steps

    hide_file_bars()
    dataset = import_published_steps(
        args.file,
        args.output_dir,
        args.expert,
        system_prompt=args.system_prompt,
        overwrite_output_dir=args.overwrite_output_dir,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"{len(dataset):,} trajectories with {count_steps(dataset):,} kept steps are in {args.output_dir}.")
    flags = ["--expert", args.expert, "--dataset_name", args.output_dir]
    print(next_command("train", *flags, "--output_dir", "ADAPTER"))
