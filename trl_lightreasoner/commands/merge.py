"""`lightreasoner merge`: merge an adapter into its base model, for a plain model that needs no PEFT."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..config_help import help_from_docstring
from .arguments import ArgumentParser
from .next_command import next_command
from .running_on import announce, dtype_of, tell


if TYPE_CHECKING:
    from peft import PeftConfig


_FEW_TOKENS = 64  # number of tokens to compare two models with
# Largest divergence of the merged model from base model and adapter, as a share of what the adapter changes
_MOST_LOST = 0.1


EXAMPLE = r"""example:
  lightreasoner merge --model adapter --output_dir model"""


@dataclass
@help_from_docstring
class MergeArguments:
    """
    Settings of `lightreasoner merge`.

    Parameters:
        model (`str`):
            Hub id or path of the adapter.
        output_dir (`str`):
            Folder for the model, new or empty.
        base_model_name_or_path (`str`, *optional*):
            Hub id or path of the base model in full precision. If not set, it is the one named in the adapter's
            config.
        model_revision (`str`, *optional*):
            Branch, tag or commit id of the adapter. The revision of the base model is the one named in the adapter's
            config.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type for merging and saving the weights: `"auto"` (the base model's own), `"bfloat16"`,
            `"float16"` or `"float32"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code.
    """

    model: str
    output_dir: str
    base_model_name_or_path: str | None = None
    model_revision: str | None = None
    dtype: str = field(default="auto", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    trust_remote_code: bool = False


def make_parser(prog: str | None = None) -> ArgumentParser:
    return ArgumentParser([MergeArguments], prog=prog, description=__doc__, epilog=EXAMPLE)


def main(args: MergeArguments) -> None:
    """
    Merge an adapter into its base model, and save the result with tokenizer, generation config and card.

    Args:
        args ([`MergeArguments`]): What to merge, and where to write it.

    Raises:
        `ValueError`: If the folder is not empty, there is no such adapter or base model, or no plain model in full
            precision gives the same predictions. Nothing is written then.

    Example:

    ```python
    >>> from trl_lightreasoner.commands.merge import MergeArguments, main

    >>> main(MergeArguments("adapter", "model"))  # doctest: +SKIP
    The model is in model.

    ```
    """
    from ..models.hub_access import cache_if_unreachable

    folder = check_output_dir(args)
    from ..models.merging import find_adapter  # slow to import, so a wrong folder is refused first

    with cache_if_unreachable(args.model):
        adapter = find_adapter(args.model, args.model_revision)
    base = args.base_model_name_or_path or adapter.base_model_name_or_path
    if not base:
        raise ValueError("The adapter's config names no base model. Name it with `--base_model_name_or_path`.")
    with cache_if_unreachable(args.model, base):
        write_merged(base, adapter, args, folder)


def write_merged(base: str, adapter: "PeftConfig", args: MergeArguments, folder: Path) -> None:
    """Write the merged model to the folder. After an error the folder is removed."""
    import torch

    from ..generation.greedy import save_generation_config, without_generation_config
    from ..hub.merged_card import load_card, merged_card
    from ..models.forward import divergence, next_token_log_probs
    from ..models.loading import left_out, load_model, name_parts
    from ..models.merging import check_base, check_weights, find_tokenizer, load_fitting, merge
    from ..steps.prompt_format import load_prompt_format

    base_kwargs = {"trust_remote_code": args.trust_remote_code}
    if base == adapter.base_model_name_or_path:
        base_kwargs["revision"] = adapter.revision
    check_base(base, adapter, **base_kwargs)
    tokenizer = find_tokenizer(args.model, args.model_revision, base, base_kwargs)
    check_weights(args.model, args.model_revision)
    prompt_format = load_prompt_format(args.model, revision=args.model_revision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Cannot write to {args.output_dir!r} ({error.strerror}). Choose another `output_dir`, or fix the "
            "permissions."
        ) from error
    dtype = dtype_of(base, args.dtype, "base model", device_map=None, **base_kwargs)
    announce(f"merged in {dtype}", cpu=True)
    try:
        tell("1/3 Loading the base model and the adapter")
        # On the CPU, whose memory may be larger than the GPU's
        model = load_model(base, dtype=args.dtype, device_map=None, **base_kwargs)
        missing = left_out(model, base, **base_kwargs)
        adapted = load_fitting(model, args.model, args.model_revision)
        ids = list(range(min(_FEW_TOKENS, len(tokenizer))))
        expected = next_token_log_probs(adapted.eval(), ids)
        if expected.isnan().any():  # nothing could be compared with it
            raise ValueError(
                f"In {str(model.dtype).removeprefix('torch.')}, the base model with the adapter gives NaN. Merge in "
                "another `dtype`, such as bfloat16 or float32, or check the base model's weights."
            )
        with adapted.disable_adapter():
            change = divergence(expected, next_token_log_probs(adapted, ids))
        tell("2/3 Merging and writing")
        merged = merge(adapted)
        dtype = merged.dtype
        with writing_into(args.output_dir):
            with without_generation_config(merged):
                merged.save_pretrained(folder)
            save_generation_config(merged, tokenizer, folder)
            tokenizer.save_pretrained(folder)
            if prompt_format is not None:
                prompt_format.save(folder)
        tell("3/3 Comparing with the base model and the adapter")
        del model, adapted, merged  # there may be memory for only one
        loaded = load_model(str(folder), dtype=dtype, device_map=None, trust_remote_code=args.trust_remote_code)
        nats = divergence(expected, next_token_log_probs(loaded.eval(), ids))
        # In half precision the weights round the adapter a little
        is_far = nats > _MOST_LOST * change
        if is_far and nats > (1e-5 if dtype == torch.float32 else 1e-2):
            raise ValueError(
                f"The merged model differs from the base model with the adapter by {nats:.2g} nats per token, and the "
                f"adapter itself changes only {change:.2g}. Load the adapter with PEFT instead, or merge in another "
                "`dtype`."
            )
        card = merged_card(
            loaded,
            tokenizer,
            folder=folder.absolute(),
            base=base,
            adapter_name=args.model,
            adapter=adapter,
            adapter_card=load_card(args.model, args.model_revision),
            prompt_format=prompt_format,
            change=change,
            difference=nats,
            num_tokens=len(ids),
        )
        card.save(folder / "README.md")
    except BaseException:  # no partial model. The folder was empty
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"The model is in {args.output_dir}.")
    if is_far and dtype != torch.float32:
        print(
            f"Warning: in {str(dtype).removeprefix('torch.')}, it differs from the base model with the adapter by "
            f"{nats:.2g} nats per token, and the adapter itself changes only {change:.2g}. A part of the adapter "
            "may be lost. Merge again with `--dtype float32`, or load the adapter with PEFT."
        )
    if missing:
        print(
            f"Warning: it is only the language model, without {len(missing):,} tensors of {base!r}: "
            f"{name_parts(missing)}. For the whole model, load the base model and the adapter with PEFT."
        )
    print(next_command("eval", "--model", args.output_dir, "--output_dir", "EVALUATION"))


@contextmanager
def writing_into(output_dir: str) -> Iterator[None]:
    """Turns what the libraries say of a full disk into a sentence."""
    from ..training.checkpoints import why_not_written

    try:
        yield
    except Exception as error:
        if (reason := why_not_written(error)) is None:
            raise
        raise OSError(
            f"Cannot write the model to {output_dir!r} ({reason}). Free disk space or fix the permissions, and merge "
            "again."
        ) from error


def check_output_dir(args: MergeArguments) -> Path:
    """The output folder. Refuses one that cannot be used."""
    folder = Path(args.output_dir)
    if folder.exists() and folder.resolve() == Path(args.model).resolve():
        raise ValueError(f"{args.output_dir!r} is the adapter's own folder. Choose another `output_dir`.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{args.output_dir!r} is a file. Choose another `output_dir`.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{args.output_dir!r} is not empty, and a model there would be overwritten. Choose another `output_dir`."
        )
    return folder
