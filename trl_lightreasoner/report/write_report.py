"""`write_report`: one or two Datasets of kept steps, and a training, as one HTML page, PNG figures and CSV files."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, logging

from ..models.token_text import TokenTexts, spell_out
from ..sampling.pair_check import check_steps
from ..sampling.pair_verdict import say_several
from ..steps.dataset import last_parts, name_samplings
from ..steps.whole_files import whole_file
from ..steps.writer import check_folder
from .figure_data import save_figure_data
from .model_reading import add_probabilities, add_trained, find_tokenizer
from .page import make_page
from .pictures import save_pictures
from .row_answers import grade_rows
from .row_index import index_rows, place_rows, rows_data
from .search import page_index, save_index
from .shown_steps import ReportedDataset, choose_rows, load_trajectories
from .statistics import StepStatistics, all_made_with, made_with
from .training_curves import load_curves
from .trials import SearchResult


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel


logger = logging.get_logger(__name__)


def write_report(
    dataset: Dataset | dict[str, Dataset],
    output_dir: str,
    training_dir: str | None = None,
    expert: "str | PreTrainedModel | PeftModel | None" = None,
    amateur: "str | PreTrainedModel | PeftModel | None" = None,
    model: "str | PreTrainedModel | PeftModel | None" = None,
    load_models: bool = True,
    num_trajectories: int = 24,
    seed: int = 0,
    answer_column: str | None = None,
    search: SearchResult | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    amateur_processing_class: PreTrainedTokenizerBase | None = None,
) -> Path:
    """
    Write report.html, the numbers behind it as CSV, and its figures as PNG, if matplotlib is installed.

    Numbers cover all rows, and every row can be opened. Rows of more than 2 MB in total are in `rows-000.js` and so on
    next to the page. The tokenizer is the expert's. A Dataset holds v_C, but not pi_E and pi_A. The models compute
    these at the kept steps of the drawn trajectories, if they are available and reproduce v_C.

    Args:
        dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`): Rows from [`ContrastiveStepSampler`], or two such
            Datasets by name, to compare side by side.
        output_dir (`str`): Folder for the files, created if missing.
        training_dir (`str`, *optional*): `output_dir` of a training, to show its curves.
        expert, amateur (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): Ids or paths of
            the models, or the models. By default they are those that each Dataset names, if they are on this machine.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): The trained model, or its
            adapter, to show its probabilities at the kept steps with those of expert and amateur. By default it is the
            one in `training_dir`, if any.
        load_models (`bool`, *optional*, defaults to `True`): Whether to load expert, amateur and the model in
            `training_dir`.
        num_trajectories (`int`, *optional*, defaults to `24`): Number of trajectories to show of each Dataset.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw of those trajectories.
        answer_column (`str`, *optional*): Column with the reference answers, to mark rows as right or wrong. By
            default it is `answer`, if there is such a column.
        search ([`SearchResult`], *optional*): The trials of a search, to show as well.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer of every
            expert and of the trained model. By default each is loaded from the model's folder or repository.
        amateur_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The amateur's, likewise.

    Returns:
        `Path`: report.html.

    Raises:
        `ValueError`: If there are more than two Datasets, one of them does not hold valid kept steps, `training_dir`
            is not the output of a training, or a named model cannot be used.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_lightreasoner import write_report

    >>> write_report(load_dataset("steps", split="train"), "report", training_dir="adapter")  # doctest: +SKIP
    PosixPath('report/report.html')

    ```
    """
    datasets = dataset if isinstance(dataset, dict) else {"dataset": dataset}
    datasets = {spell_out(name): each for name, each in datasets.items()}
    if not 1 <= len(datasets) <= 2:
        raise ValueError(f"A report shows one dataset or two side by side, got {len(datasets)}.")
    if num_trajectories < 1:
        raise ValueError(f"`num_trajectories` must be a whole number, 1 or more, got {num_trajectories}.")
    check_folder(output_dir)
    curves = None if training_dir is None else load_curves(training_dir)
    statistics = [StepStatistics(each, _called(name, datasets)) for name, each in datasets.items()]
    rows, paired = choose_rows(statistics, num_trajectories, seed)
    reported = []
    for (name, each), numbers, chosen in zip(datasets.items(), statistics, rows, strict=True):
        metadata, samplings, several = made_with(each), all_made_with(each), name_samplings(each)
        notes: list[str] = []
        tokenizer: PreTrainedTokenizerBase | str | None = processing_class
        if tokenizer is None:
            tokenizer = _find_tokenizer(metadata, samplings, expert)
        trajectories = load_trajectories(each, chosen)
        if isinstance(tokenizer, str):
            notes.append(f"Tokens are shown by number: {tokenizer}. Name the expert with --expert.")
            tokenizer = None
        reason: str | None = "loading the models is turned off"
        remedy = "A dataset does not hold these. To compute them, name the two models with --expert and --amateur."
        if several:
            reason, remedy = f"the rows come from {len(several)} samplings", "Write a report of each."
        elif load_models:
            reason = add_probabilities(trajectories, metadata, expert, amateur, tokenizer, amateur_processing_class)
        if reason is not None and any(trajectory.steps for trajectory in trajectories):
            notes.append(
                f"Only the label is shown, without the probabilities of expert and amateur: {reason}. {remedy}"
            )
        trained = model or (_find_trained(training_dir) if load_models else None)
        if trained is not None:
            try:
                if tokenizer is None:
                    raise ValueError("The trained model cannot be read: the expert's tokenizer is not available.")
                add_trained(trajectories, metadata, trained, expert, tokenizer, processing_class, model is None)
            except ValueError as error:
                if model is not None:
                    raise
                notes.append(f"{error} Name it with --model.")
        try:
            answers = grade_rows(each, tokenizer, answer_column)
        except ImportError as error:
            answers = None
            notes.append(f"The correctness of the rows' answers is not shown. {error}")
        notes = [_without_paths(note, metadata) for note in notes]
        check = check_steps(each, tokenizer) if _can_be_judged(numbers, samplings) else None
        texts, index = TokenTexts(tokenizer), index_rows(each, answers)
        if several and check is None:
            notes.append(say_several(several))
        reported.append(ReportedDataset(name, samplings, numbers, texts, trajectories, notes, index, check))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    index_of_page = page_index(reported)
    files = (rows_data(each, of.texts) for each, of in zip(datasets.values(), reported, strict=True))
    rows_inside = place_rows(chain.from_iterable(files), folder, index_of_page["key"])
    path = folder / "report.html"
    page = make_page(reported, curves, paired, search, index_of_page, rows_inside)
    save_figure_data(reported, curves, folder, search)
    save_index(reported, folder)
    try:
        save_pictures(reported, curves, folder, search)
    except ImportError as error:
        logger.warning(f"{error} The page shows the figures without it.")
    with whole_file(path) as temporary:  # last, as the mark of a whole report
        temporary.write_text(page, encoding="utf-8")
    return path


def _find_tokenizer(
    metadata: dict[str, Any],
    samplings: list[dict[str, Any]],
    expert: "str | PreTrainedModel | PeftModel | None",
) -> PreTrainedTokenizerBase | str:
    """The tokenizer of the expert of all rows, or why there is none."""
    if expert is None and len({made.get("expert", {}).get("model") for made in samplings}) > 1:
        return "the rows come from several experts"
    return find_tokenizer(metadata, expert)


def _can_be_judged(numbers: StepStatistics, samplings: list[dict[str, Any]]) -> bool:
    """Whether the steps tell how well a pair fits."""
    # An amateur with another tokenizer leaves some steps unread
    is_known = numbers.num_known == numbers.num_steps or (
        bool(samplings) and all("amateur_reading" in made for made in samplings)
    )
    # With answers of a trained model, labels of the expert say little about the pair
    return is_known and all(made["settings"].get("label_expert") != "base" for made in samplings)


def _find_trained(training_dir: str | None) -> str | None:
    """The output folder of a training, if it holds a model or an adapter."""
    files = ("adapter_config.json", "config.json")
    return training_dir if training_dir and any(Path(training_dir, file).is_file() for file in files) else None


def _without_paths(note: str, metadata: dict[str, Any]) -> str:
    """A sentence for the page, which may be shown to others, without the folders of this machine."""
    for role in ("expert", "amateur"):
        for name in (metadata.get(role) or {}).values():
            if isinstance(name, str) and "/" in name:
                note = note.replace(name, last_parts(name))
    return spell_out(note)


def _called(name: str, datasets: dict[str, Dataset]) -> str:
    return f"dataset {name!r}" if len(datasets) > 1 else "dataset"
