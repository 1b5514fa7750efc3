"""
Every command and every block of Python in README.md and docs/ is run, page by page, in the order of the page.

A page runs in a folder of its own, which holds small stand-ins under the names that the pages use: a model id on the
Hub is then a path, and nothing is asked of the network. What a page says cannot be run here is marked in its source,
with the reason, in the line before the block:

    <!-- not run: needs a GPU -->

Of such a block the flags are still parsed by the commands themselves, and Python is compiled and its imports are made.
"""

import argparse
import ast
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import datasets
import pytest
from accelerate.commands.launch import launch_command_parser

from trl_lightreasoner.commands import cli, demo
from trl_lightreasoner.demo.bundled_pair import KIND_SHARES, PAIR
from trl_lightreasoner.demo.task import make_problems
from trl_lightreasoner.models.loading import load_tokenizer
from trl_lightreasoner.training import lightreasoner_config

from .evaluation.test_sets import FILES, write


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]

# The bundled pair, under the names of the models
EXPERTS = ["Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "EXPERT"]
AMATEURS = ["Qwen/Qwen2.5-0.5B", "AMATEUR"]
NUM_PROMPTS = 8
# What else is made smaller
SUBSTITUTIONS = {
    "train[:1000]": f"train[:{NUM_PROMPTS}]",
    "train[:50]": f"train[:{NUM_PROMPTS}]",
    "test[:200]": "test[:2]",
    "range(1000)": "range(10)",
    "test_size=50": "test_size=2",
    "95%": "50%",
    "$seed": "1",
    "$rate": "5e-4",
    "CONDITION": "base",
    "packing=True": "packing=True, use_cpu=True",
    'output_dir="run-python",': 'output_dir="run-python", max_steps=2, eval_max_new_tokens=4, system_prompt="",',
    'output_dir="tuned-python",': 'output_dir="tuned-python", num_trials=1, num_prompts=2, max_steps=1, '
    'eval_max_new_tokens=4, system_prompt="",',
    'output_dir="evaluation"': 'output_dir="evaluation", data_dir="benchmark_files", max_new_tokens=4, num_workers=1',
}
LIMITS = {
    "run": ["--max_steps", "2", "--eval_max_new_tokens", "4", "--system_prompt", ""],
    "tune": [
        *("--num_trials", "1", "--num_prompts", "2", "--max_steps", "1"),
        *("--eval_max_new_tokens", "4", "--system_prompt", ""),
    ],
    "train": ["--max_steps", "2", "--logging_steps", "1", "--use_cpu"],
    "eval": ["--max_samples", "1", "--max_new_tokens", "4", "--data_dir", "benchmark_files", "--num_workers", "1"],
}
# What "..." stands for in a command
ELLIPSES = {
    "sample": ["--expert", "EXPERT", "--amateur", "AMATEUR", "--dataset_name", "PROMPTS"],
    # As the page that resumes has trained before
    "train": ["--model_name_or_path", "EXPERT", "--dataset_name", "steps", "--output_dir", "adapter"]
    + ["--lora_dropout", "0", "--lora_target_modules", "q_proj", "v_proj"],
}
# What a page makes, or takes from the pages before it
FOLDERS = ["steps-0.2", "steps-0.4", "steps", "adapter", "evaluation"]
# Scripts that are a command under another name, and a function of the shell that is one
COMMANDS = {"examples/sample.py": "sample", "examples/train.py": "train"}
ALIASES = {"measure": "lightreasoner"}


@dataclass
class Block:
    language: str
    code: str
    line: int
    reason: str | None  # for not being run


def read_blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"(?:^ *<!-- not run: ([^>]+) -->\n)?^( *)```(bash|python)\n(.*?)^ *```$"
    return [
        Block(match[3], textwrap.dedent(match[4]), text.count("\n", 0, match.start(4)) + 1, match[1])
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


PAGES_WITH_BLOCKS = [page for page in PAGES if read_blocks(page)]


def test_every_page_is_in_the_navigation():
    def pages(items) -> list[str]:
        if isinstance(items, str):
            return [items]
        return [page for item in items for entry in item.values() for page in pages(entry)]

    navigation = pages(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    assert sorted(f"docs/{page}" for page in navigation) == PAGES[1:]


def test_a_block_that_is_not_run_says_why():
    reasons = [block.reason for page in PAGES for block in read_blocks(page)]
    assert None in reasons and set(reasons) != {None}
    assert all(reason is None or reason.strip() for reason in reasons)


def test_docstrings_are_translated_for_the_site():
    griffe = pytest.importorskip("griffe")
    pytest.importorskip("latex2mathml")
    site_extensions = tool("site_extensions")
    grouped = (
        "Parameters:\n    > Parameters that control the output\n\n    a (`str` or [`~b.C`], *optional*):\n        D."
    )
    translated = site_extensions["translate"](grouped)
    assert translated == "Parameters: Parameters that control the output\n    a (str | C):\n        D."
    _, section = griffe.Docstring(f"Settings.\n\n{translated}").parse("google")
    assert (section.title, section.value[0].name) == ("Parameters that control the output", "a")
    assert site_extensions["translate"]("    a (`T` of shape `(N, V)`, *optional*): B (see c): d.") == (
        "    a (T of shape (N, V)): B (see c): d."
    )
    assert site_extensions["math_fence"]("v_C", "math", "math", {}, None).count("<msub>") == 1


def tool(name: str) -> dict:
    """The functions of a script in tools/."""
    return runpy.run_path(str(ROOT / "tools" / f"{name}.py"))


def test_mathematics_in_a_line_becomes_mathml():
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("latex2mathml")
    pytest.importorskip("griffe")
    extension = tool("site_extensions")["makeExtension"]()
    html = markdown.markdown("The expert $`\\pi_E`$ costs `5` $, not $6.", extensions=[extension])
    assert html.count("<math") == 1 and html.count("<msub>") == 1
    assert html.endswith("</math> costs <code>5</code> $, not $6.</p>")


def test_an_empty_header_of_a_table_is_a_plain_cell():
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("latex2mathml")
    pytest.importorskip("griffe")
    extension = tool("site_extensions")["makeExtension"]()
    html = markdown.markdown("| | a | $`b`$ |\n|---|---|---|\n| c | 1 | 2 |", extensions=["tables", extension])
    assert html.count("<th>") == 2 and html.count("<td>") == 4


def test_a_note_of_a_docstring_becomes_an_admonition():
    pytest.importorskip("griffe")
    pytest.importorskip("latex2mathml")
    note = "Text.\n\n> [!NOTE]\n> These differ:\n> - `a`: 1\n>   or 2\n"
    translated = tool("site_extensions")["translate"](note)
    assert translated == "Text.\n\n!!! note\n\n    These differ:\n\n    - `a`: 1\n      or 2\n"


def test_no_sentence_of_the_pages_is_too_long():
    find_long_sentences = tool("sentence_lengths")["find_long_sentences"]
    found = {page: find_long_sentences((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
    assert {page: sentences for page, sentences in found.items() if sentences} == {}


def test_a_long_sentence_is_found_in_paragraphs_and_lists_alone():
    find_long_sentences = tool("sentence_lengths")["find_long_sentences"]
    long, short = "word " * 5 + "and 1, 2, 3, 4 go.", "word " * 4 + "end."
    text = f"# {long}\n\n{short} {short}\n\n{long}\n\n- {short}\n- {long}\n\n| {long} |\n\n```text\n{long}\n```\n"
    assert [(line, count) for line, count, _ in find_long_sentences(text, limit=6)] == [(5, 7), (8, 7)]


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)):
        assert (ROOT / target).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", (ROOT / target).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_the_readme_of_a_release_needs_no_other_file():
    functions = tool("absolute_links")
    text = functions["make_links_absolute"]((ROOT / "README.md").read_text(encoding="utf-8"), "https://a.org/b", "v1")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "https://a.org/b/raw/v1/docs/report.png" in links and "https://a.org/b/blob/v1/LICENSE" in links
    assert all(link.startswith("https://") for link in links)
    project = functions["add_urls"]((ROOT / "pyproject.toml").read_text(encoding="utf-8"), "https://a.org/b", "v1")
    assert {"Repository", "Paper"} <= set(tomllib.loads(project)["project"]["urls"])


def test_broken_links_and_notes_of_the_site_are_found(tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">A</h1><a href="api/b.html#there">1</a><a href="#top">2</a><a href="https://c.org/d">3</a>'
        '<a href="api/b.html#gone">4</a><a href="e.html">5</a><code>[!x]</code>'
    )
    (tmp_path / "api" / "b.html").write_text('<p id="there">> [!NOTE]</p><a href="../index.html">6</a>')
    assert tool("check_site")["check_site"](tmp_path) == [
        "api/b.html: a note is left as text: '[!'",
        "index.html: api/b.html#gone leads to no place in its page",
        "index.html: e.html leads to no file",
    ]


# Stand-ins


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """What the pages before have made: a Dataset of kept steps and an adapter."""
    folder = tmp_path_factory.mktemp("earlier")
    pair = ["--expert", str(PAIR / "expert"), "--amateur", str(PAIR / "amateur")]
    write(folder / "prompts.jsonl", problems())
    prompts = ["--dataset_name", str(folder / "prompts.jsonl"), "--prompt_column", "question", "--conversational"]
    assert cli.main(["sample", *pair, *prompts, "--beta", "0.1", "--output_dir", str(folder / "steps")]) == 0
    steps = ["--dataset_name", str(folder / "steps"), "--output_dir", str(folder / "adapter")]
    assert cli.main(["train", "--model_name_or_path", pair[1], *steps, *LIMITS["train"]]) == 0
    for name in ("steps-0.2", "steps-0.4"):
        shutil.copytree(folder / "steps", folder / name)
    write(folder / "cd_samples.jsonl", published(folder / "steps"))
    return folder


def published(steps: Path) -> list[dict]:
    """The kept steps as the published scripts write them down."""
    tokenizer = load_tokenizer(str(PAIR / "expert"))
    return [
        {
            "prompt_id": row["prompt"][-1]["content"],
            "prefix": tokenizer.decode(row["completion_ids"][:t]),
            "tokens": tokenizer.convert_ids_to_tokens(ids),
            "token_ids": ids,
            "weights": probs,
            "kl_divergence": row["kl_divergence"][t],
        }
        for row in datasets.load_dataset("parquet", data_dir=str(steps / "data"), split="train")
        for t, ids, probs in zip(row["step_positions"], row["label_ids"], row["label_probs"], strict=True)
    ]


def problems() -> list[dict]:
    made = make_problems(NUM_PROMPTS, seed=0, split="train", kind_shares=KIND_SHARES)
    return [{"question": problem["question"], "answer": f"#### {problem['answer']}"} for problem in made]


@pytest.fixture
def page_folder(tmp_path, monkeypatch, earlier) -> Path:
    """The folder in which a page runs."""
    for names, role in ((EXPERTS, "expert"), (AMATEURS, "amateur")):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(PAIR / role)
    gsm8k = tmp_path / "openai" / "gsm8k"
    write(gsm8k / "train.jsonl", problems())
    write(gsm8k / "test.jsonl", problems())
    splits = "".join(f"\n  - split: {split}\n    path: {split}.jsonl" for split in ("train", "test"))
    (gsm8k / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:{splits}\n---\n")
    prompts = [{"prompt": [{"role": "user", "content": problem["question"]}]} for problem in problems()]
    write(tmp_path / "PROMPTS" / "train.jsonl", prompts)
    write(tmp_path / "demonstrations.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    for name, rows in FILES.items():
        write(tmp_path / "benchmark_files" / f"{name}.jsonl", rows)
    shutil.copy(earlier / "cd_samples.jsonl", tmp_path)
    for name in ("examples", "benchmarks", "trl_lightreasoner"):
        (tmp_path / name).symlink_to(ROOT / name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, number in (("NUM_UNLABELLED", NUM_PROMPTS), ("NUM_TEST", 3), ("NUM_UPDATES", 10)):
        monkeypatch.setattr(demo, name, number)
    monkeypatch.setattr(lightreasoner_config, "_DEFAULT_UPDATES", 2)
    return tmp_path


# Running


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS)
def test_the_blocks_of_a_page_run(page, page_folder, earlier, monkeypatch):
    if "quantization" in page:
        pytest.importorskip("bitsandbytes")
    if "evaluate" in (text := (ROOT / page).read_text()) or "lightreasoner eval" in text or "grading" in page:
        pytest.importorskip("math_verify")
    if "lightreasoner tune" in text:
        pytest.importorskip("optuna")
    if "report" not in page:  # they take most of the time of a short run
        monkeypatch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])
    rows = [{"prompt": [{"role": "user", "content": problem["question"]}]} for problem in problems()]
    namespace = {"__name__": "page", "prompts": datasets.Dataset.from_list(rows)}
    if "dataset" in text:
        namespace["dataset"] = datasets.load_dataset(
            "parquet", data_dir=str(earlier / "steps" / "data"), split="train"
        )
    for block in read_blocks(page):
        code = block.code
        for old, new in SUBSTITUTIONS.items():
            code = code.replace(old, new)
        for name in FOLDERS:
            if makes(code, name):  # anew, where a page shows two ways to make it
                shutil.rmtree(name, ignore_errors=True)
            elif re.search(rf"(?<![\w/]){name}\b", code) and not Path(name).exists() and (earlier / name).exists():
                shutil.copytree(earlier / name, name)
        with monkeypatch.context() as patch:
            if block.language == "python":
                run_python(code, f"{page}:{block.line}", namespace, block.reason)
            else:
                for words in split_commands(code):
                    run_command(words, block.reason, patch)


def makes(code: str, folder: str) -> bool:
    """Whether the first that a block does with a folder is to write it."""
    first = re.search(rf"(\S*?[ =]?)(?<![\w/]){folder}\b", code)
    return first is not None and "output_dir" in first[1]


def run_python(code: str, place: str, namespace: dict, reason: str | None) -> None:
    compiled = compile("\n" * int(place.rpartition(":")[2]) + code, place, "exec")
    if reason is None:
        exec(compiled, namespace)
        return
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                getattr(import_module(node.module), alias.name)


def split_commands(code: str) -> list[list[str]]:
    """The commands of a block as words, without functions, loops and variables around them."""
    code = re.sub(r"^\w+\(\) \{.*?^\}", "", code, flags=re.MULTILINE | re.DOTALL)
    code = re.sub(r"(^| )# ?.*$", "", code.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(code, posix=True, punctuation_chars=";\n&")
    lexer.commenters, lexer.whitespace, lexer.whitespace_split = "", " \t\r", True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";\n&"):
            commands.append([])
        else:
            commands[-1].append(word)
    for words in commands:
        while words and (words[0] in ("do", "done") or re.match(r"[A-Z_]+=", words[0])):
            del words[0]
        if words[:1] == ["for"]:
            words.clear()
    return [words for words in commands if words]


def run_command(words: list[str], reason: str | None, monkeypatch) -> None:
    words = [ALIASES.get(words[0], words[0]), *words[1:]]
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])  # refuses what accelerate would
        assert launch.config_file is None or Path(launch.config_file).is_file()
        script = ["-m", launch.training_script] if launch.module else [launch.training_script]
        words = ["python", *script, *launch.training_script_args]
    if words[:3] == ["python", "-m", "trl_lightreasoner"]:
        words = ["lightreasoner", *words[3:]]
    if words[0] == "python" and words[1] in COMMANDS:
        words = ["lightreasoner", COMMANDS[words[1]], *words[2:]]

    if words[0] == "lightreasoner":
        command, *flags = words[1:]
        if "..." in flags:
            flags.remove("...")
            flags = [*ELLIPSES[command], *flags]
        if reason is not None:
            monkeypatch.setattr(cli, "_run", parse_only)
            assert cli.main([command, *flags]) == 0
        else:
            status = cli.main([command, *flags, *LIMITS.get(command, [])])
            # Of so few prompts `check` cannot say yes
            assert status == (1 if command == "check" else 0), shlex.join(words)
    elif words[0] == "python" and words[1].endswith(".py"):
        run_script(words[1], [word for word in words[2:] if word != "..."], reason, monkeypatch)
    elif words[0] == "make":
        recipe = re.search(rf"^{words[1]}:.*\n((?:\t.*\n?)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert recipe is not None, words
        for line in re.findall(r"^\t\$\(BIN\)/(lightreasoner .*)", recipe[1], re.MULTILINE):
            run_command(shlex.split(line), reason, monkeypatch)
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {extra for word in words for extra in ",".join(re.findall(r"\[(.*)\]", word)).split(",") if extra}
        assert extras <= set(project["optional-dependencies"]), words
    else:
        assert reason is not None, f"{shlex.join(words)}: neither run nor marked"


def parse_only(prog: str, make_parser: Callable, command: Callable, argv: list[str]) -> int:
    make_parser(prog).parse(argv)
    return 0


class Parsed(Exception):
    """The flags of a script were understood."""


def run_script(path: str, flags: list[str], reason: str | None, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [path, *flags])
    monkeypatch.syspath_prepend(str(Path(path).parent))
    if reason is None:
        runpy.run_path(path, run_name="__main__")
        return

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        runpy.run_path(path, run_name="__main__")
