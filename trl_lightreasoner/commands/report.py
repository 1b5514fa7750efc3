"""`lightreasoner report`: show kept steps as an HTML page, one or two datasets, with the curves of a training."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..config_checks import check_whole_numbers
from ..config_help import help_from_docstring
from .arguments import ArgumentParser
from .next_command import next_command
from .running_on import announce, tell
from .terminal import hide_file_bars


EXAMPLE = r"""example:
  lightreasoner report steps --training_dir adapter --output_dir report"""


@dataclass
@help_from_docstring
class ReportArguments:
    """
    Settings of `lightreasoner report`.

    Parameters:
        dataset_name (`list[str]`):
            One or two datasets of kept steps: on the Hub, a folder, or a file (JSON lines, Parquet). The flag itself
            may be omitted.
        output_dir (`str`, *optional*, defaults to `"report"`):
            Folder for report.html, the PNG figures and the CSV files.
        training_dir (`str`, *optional*):
            Output folder of a training, to show its loss, entropy, agreement and divergences.
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to use, such as `"train[:1000]"`.
        expert (`str`, *optional*):
            Hub id or path of the expert. If not set, it is the one named in the dataset.
        amateur (`str`, *optional*):
            Hub id or path of the amateur. If not set, it is the one named in the dataset.
        model (`str`, *optional*):
            Hub id or path of the trained model or adapter. If not set, it is the one in `training_dir`.
        load_models (`bool`, *optional*, defaults to `True`):
            Whether to load the expert, the amateur and the model in `training_dir`, if they are on this machine, to
            show their probabilities at the kept steps.
        num_trajectories (`int`, *optional*, defaults to `24`):
            Number of trajectories to show of each dataset. All statistics cover every row.
        seed (`int`, *optional*, defaults to `0`):
            Random seed for choosing the trajectories.
        answer_column (`str`, *optional*):
            Column that holds the correct answers, to mark rows as right or wrong. If not set, it is `answer` if there
            is one.
    """

    dataset_name: list[str]
    output_dir: str = "report"
    training_dir: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    expert: str | None = None
    amateur: str | None = None
    model: str | None = None
    load_models: bool = True
    num_trajectories: int = 24
    seed: int = 0
    answer_column: str | None = None

    def __post_init__(self):
        if not 1 <= len(self.dataset_name) <= 2:
            raise ValueError(f"A report shows one dataset or two side by side, got {len(self.dataset_name)}.")
        if len(set(self.dataset_name)) < len(self.dataset_name):
            raise ValueError("The two datasets are the same. Name two different ones, or only one.")
        check_whole_numbers(self, ("num_trajectories",))


class _ReportParser(ArgumentParser):
    def sentence(self, message: str) -> str:
        if "dataset_name" in message:
            return "A dataset is missing. It comes first: `lightreasoner report DATASET --output_dir DIR`."
        return super().sentence(message)


def make_parser(prog: str | None = None) -> ArgumentParser:
    prog = prog or "lightreasoner report"
    usage = f"{prog} DATASET [DATASET2] [--flag VALUE ...] [--config FILE.yaml]"
    hint = "The datasets come first: `lightreasoner report DATASET --output_dir DIR`."
    return _ReportParser(
        [ReportArguments], first="dataset_name", hint=hint, prog=prog, usage=usage, description=__doc__, epilog=EXAMPLE
    )


def main(args: ReportArguments) -> None:
    from ..report.statistics import made_with
    from ..report.write_report import write_report
    from ..steps.splits import load_split
    from ..steps.writer import check_folder

    hide_file_bars()
    check_folder(args.output_dir)
    names = name_datasets(args.dataset_name)
    datasets = {
        name: load_split(source, args.dataset_config, args.dataset_split)
        for name, source in zip(names, args.dataset_name, strict=True)
    }
    announce()
    tell(f"Reading {' and '.join(f'{len(each):,} rows of {name}' for name, each in datasets.items())}")
    path = write_report(
        datasets,
        args.output_dir,
        training_dir=args.training_dir,
        expert=args.expert,
        amateur=args.amateur,
        model=args.model,
        load_models=args.load_models,
        num_trajectories=args.num_trajectories,
        seed=args.seed,
        answer_column=args.answer_column,
    )
    print(f"The report is in {path}. Open it in a browser.")
    expert = args.expert or made_with(datasets[names[0]]).get("expert", {}).get("model")
    if args.training_dir is not None:
        baseline = ["--baseline", expert] if isinstance(expert, str) else []
        print(next_command("eval", "--model", args.training_dir, *baseline, "--output_dir", "EVALUATION"))
    elif isinstance(expert, str):
        flags = ["--expert", expert, "--dataset_name", args.dataset_name[0]]
        print(next_command("train", *flags, "--output_dir", "ADAPTER"))


def name_datasets(sources: list[str]) -> list[str]:
    """
    Names for the datasets: the last two parts of an id or a path, or more if these are equal.

    Example:

    ```python
    >>> name_datasets(["runs/a/dataset", "runs/b/dataset"])
    ['a/dataset', 'b/dataset']

    ```
    """
    parts = [Path(os.path.abspath(source) if os.path.exists(source) else source).parts for source in sources]
    for count in range(2, max(2, *map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names
