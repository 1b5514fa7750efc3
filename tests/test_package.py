import doctest
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import trl_lightreasoner

from .conftest import make_tokenizer


ROOT = Path(__file__).parents[1]
MODULES = [module.name for module in pkgutil.walk_packages(trl_lightreasoner.__path__, "trl_lightreasoner.")]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_package_imports_neither_torch_nor_transformers():
    result = run_python(
        "import sys, trl_lightreasoner; dir(trl_lightreasoner)\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules), sorted(sys.modules)"
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there():
    assert trl_lightreasoner.__all__ == sorted(trl_lightreasoner.__all__)
    for name in trl_lightreasoner.__all__:
        assert getattr(trl_lightreasoner, name).__name__ == name
        assert name in dir(trl_lightreasoner)


def test_every_public_name_is_documented():
    for name in trl_lightreasoner.__all__:
        assert (getattr(trl_lightreasoner, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Frobnicator'"):
        trl_lightreasoner.Frobnicator  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert trl_lightreasoner.__version__ == importlib.metadata.version("trl-lightreasoner")


def test_the_package_says_that_it_is_typed():
    assert (Path(trl_lightreasoner.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name):
    assert (importlib.import_module(name).__doc__ or "").strip()


# Their examples need models from the Hub
ONLINE = {
    "trl_lightreasoner.sampling.contrastive_step_sampler",
    "trl_lightreasoner.training.lightreasoner_trainer",
}


def example_globals() -> dict:
    """What an example may take for granted."""
    tokenizer = make_tokenizer()
    steps = Dataset.from_dict(
        {
            "kl_divergence": [[0.1, 0.9, 0.5, 0.2, 0.7]],
            "step_positions": [[1, 2, 4]],
            "label_ids": [[[1], [2], [3]]],
            "label_probs": [[[1.0], [1.0], [1.0]]],
            "sampling_metadata": ['{"settings": {"beta": 0.4}}'],
        }
    )
    return {"torch": torch, "tokenizer": tokenizer, "dataset": steps}


@pytest.mark.parametrize("name", sorted(set(MODULES) - ONLINE))
def test_the_examples_of_a_module_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=example_globals(), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in sorted(set(MODULES) - ONLINE)]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 10


@pytest.fixture(scope="module")
def tracked_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    texts = {}
    for name in listed.stdout.strip("\0").split("\0"):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if name != "tests/test_package.py" and b"\0" not in content:
            texts[name] = content.decode(errors="replace")
    return texts


def test_no_code_from_the_hub_runs_unasked(tracked_texts):
    # Tests may ask for it, of models that they made themselves
    files = {name for name, text in tracked_texts.items() if re.search(r"trust_remote_code\s*=\s*True", text)}
    assert {name for name in files if not name.startswith("tests/")} == set()


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bimport pickle\b|\bpickle\.(load|dump)",
        r"torch\.load\(",
        # Of one machine, whoever's it is
        r"(?<![\w.:/~-])/(home|root|Users|work|mnt)/\w",
        r"""["'(]/tmp/""",
    ],
)
def test_no_file_holds(pattern, tracked_texts):
    lines = [
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert lines == []
