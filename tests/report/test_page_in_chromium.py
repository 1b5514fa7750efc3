"""The report at work in a real browser: it is looked at, clicked and typed into."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features

from trl_lightreasoner import write_report
from trl_lightreasoner.steps.dataset import STEP_FEATURES

from ..chromium import Chromium, find_chromium


pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium or Chrome on the PATH")

FIRST, SECOND = "document.querySelectorAll('[data-step]')[0]", "document.querySelectorAll('[data-step]')[1]"


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_lightreasoner.report.write_report.save_pictures", lambda *args: [])
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory, steps):
    path = write_report(steps, str(tmp_path_factory.mktemp("report")))
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    browser.open(path)
    yield browser
    browser.close()


@pytest.fixture
def fresh(page):
    """The page with no step opened and the focus nowhere."""
    page.press("Escape")
    page.run("document.activeElement.blur()")
    return page


@pytest.fixture(autouse=True)
def nothing_is_asked_for_or_complained_of(request):
    yield
    if "page" in request.fixturenames:
        page = request.getfixturevalue("page")
        assert page.errors == []
        assert all(address.startswith(("file://", "data:")) for address in page.requests)


def test_a_click_shows_expert_amateur_and_label_side_by_side(fresh, steps):
    row = next(row for row in steps if row["step_positions"])
    assert "Row" not in fresh.text("#panel")
    fresh.click("[data-step]")
    text = fresh.text("#panel")
    assert f"step {row['step_positions'][0]}" in text
    assert all(title in text for title in ("Expert π", "Amateur π", "Label v", "All others"))
    rows = fresh.run("document.querySelectorAll('#panel tbody tr').length")
    assert rows == len(row["label_ids"][0]) + 1
    first = fresh.run("[...document.querySelectorAll('#panel tbody tr:first-child td')].map(cell => cell.innerText)")
    assert len(first) == 3
    assert float(first[2].strip("\u00a0%\n")) == pytest.approx(100 * row["label_probs"][0][0], abs=0.06)
    assert fresh.run(f"{FIRST}.getAttribute('aria-expanded')") == "true"
    assert "was taken" in fresh.run("document.getElementById('status').textContent")


def test_another_click_and_escape_close_it(fresh):
    fresh.click("[data-step]")
    fresh.click("[data-step]")
    assert "Row" not in fresh.text("#panel")
    fresh.click("[data-step]")
    fresh.press("Escape")
    assert "Row" not in fresh.text("#panel")
    assert fresh.run(f"document.activeElement === {FIRST}")
    fresh.click("[data-step]")
    fresh.click("#panel .close")
    assert fresh.run(f"{FIRST}.getAttribute('aria-expanded')") == "false"


@pytest.mark.parametrize("key", ["Enter", " "])
def test_a_key_opens_a_step(key, fresh):
    fresh.run(f"{FIRST}.focus()")
    fresh.press(key)
    assert "Row" in fresh.text("#panel")


def test_arrow_keys_go_from_step_to_step_and_an_open_panel_follows(fresh):
    fresh.run(f"{FIRST}.focus()")
    fresh.press("ArrowLeft")
    assert fresh.run(f"document.activeElement === {FIRST}")
    fresh.press("ArrowRight")
    assert fresh.run(f"document.activeElement === {SECOND}")
    assert "Row" not in fresh.text("#panel")
    fresh.press("Enter")
    before = fresh.text("#panel")
    fresh.press("ArrowLeft")
    assert fresh.run(f"document.activeElement === {FIRST}")
    assert fresh.text("#panel") != before and "Row" in fresh.text("#panel")


def test_the_last_step_is_found_where_it_was_folded_away(fresh):
    assert not fresh.run("document.querySelector('.more').open")
    fresh.run(f"{FIRST}.focus()")
    fresh.press("End")
    assert fresh.run("document.querySelector('.more').open")
    assert fresh.run("document.activeElement === [...document.querySelectorAll('[data-step]')].at(-1)")
    fresh.press("Home")
    assert fresh.run(f"document.activeElement === {FIRST}")


def test_the_buttons_of_the_panel_go_on(fresh):
    fresh.click("[data-step]")
    fresh.click("#panel .tools button:last-child")
    assert fresh.run(f"{SECOND}.getAttribute('aria-expanded')") == "true"
    fresh.click("#panel .tools button:first-child")
    assert fresh.run(f"{FIRST}.getAttribute('aria-expanded')") == "true"


def test_the_tab_key_stops_once_a_trajectory_and_shows_where(fresh):
    stops = fresh.run(
        "[...document.querySelectorAll('.text')].map(text => text.querySelectorAll('[tabindex=\"0\"]').length)"
    )
    assert set(stops) <= {0, 1} and sum(stops) == sum(stop > 0 for stop in stops) > 0
    fresh.run(f"{FIRST}.focus({{focusVisible: true}})")
    assert fresh.run(f"getComputedStyle({FIRST}).outlineStyle") == "solid"
    assert fresh.run(f"{FIRST}.getAttribute('aria-label')").startswith("Step ")


def test_the_page_can_neither_ask_for_anything_nor_run_another_script(steps, tmp_path):
    path = write_report(steps, str(tmp_path / "out"), load_models=False)
    text = path.read_text(encoding="utf-8")
    extra = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x'>"
    path.write_text(text.replace("</footer>", f"{extra}</footer>"), encoding="utf-8")
    browser = Chromium(tmp_path / "profile")
    try:
        browser.open(path)
        assert browser.run("document.title") != "run"
        assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
        assert any("Content Security Policy" in error for error in browser.errors)
    finally:
        browser.close()


@pytest.mark.parametrize(("width", "dark"), [(320, False), (320, True), (1280, True)])
def test_two_datasets_fit_a_phone_and_the_dark(width, dark, steps, tmp_path):
    path = write_report({"first": steps, "a-second_name" * 6: steps.select(range(5))}, str(tmp_path / "out"))
    browser = Chromium(tmp_path / "profile", width=width, height=640, dark=dark)
    try:
        browser.open(path)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        brightness = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).reduce((a, b) => a + +b, 0)"
        assert (browser.run(brightness) < 300) == dark
        browser.click("[data-step]")
        inside = browser.run(
            "(() => { const box = document.getElementById('panel').getBoundingClientRect();"
            "return box.left >= 0 && box.right <= innerWidth && box.top < innerHeight && box.height > 50 })()"
        )
        assert inside
        if width == 320:  # the token that was chosen is not under the panel
            top = "document.getElementById('panel').getBoundingClientRect().top"
            assert browser.run(f"{FIRST}.getBoundingClientRect().bottom <= {top}")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.errors == []
    finally:
        browser.close()


def test_ten_thousand_trajectories_open_in_two_seconds(tmp_path):
    rng = np.random.default_rng(0)
    metadata = json.dumps({"settings": {"alpha": 0.2, "beta": 0.4}})

    def rows():
        for i in range(10_000):
            yield {
                "prompt_ids": [i, 1],
                "completion_ids": rng.integers(0, 100, 60).tolist(),
                "kl_divergence": rng.exponential(0.1, 60).tolist(),
                "step_positions": [7, 30],
                "label_ids": [[1, 2], [3]],
                "label_probs": [[0.75, 0.25], [1.0]],
                "sampling_metadata": metadata,
            }

    features = Features(STEP_FEATURES)
    dataset = Dataset.from_generator(rows, features=features, cache_dir=str(tmp_path / "cache"))
    path = write_report(dataset, str(tmp_path / "out"))
    assert path.stat().st_size < 2**21
    browser = Chromium(tmp_path / "profile")
    try:
        assert browser.open(path) < 2
        assert "24 of the 10,000 rows with a kept step, drawn at random" in browser.text("#trajectories")
        assert "600,000" in browser.text("#overview")
    finally:
        browser.close()


# The search


def comes_true(browser: Chromium, expression: str) -> bool:
    """Whether a JavaScript expression is true within five seconds."""
    return browser.run(
        "new Promise(done => { const end = Date.now() + 5000; (function look() {"
        f"if ({expression}) done(true);"
        "else if (Date.now() > end) done(false); else setTimeout(look, 20) })() })"
    )


def opens(browser: Chromium, title: str) -> bool:
    """Whether the panel comes to show a step, which may lie in a file."""
    return comes_true(browser, f"document.getElementById('panel').innerText.includes({json.dumps(title)})")


def ask(browser: Chromium, **query: str) -> None:
    """Fill in the form of the search, and leave the rest of it empty."""
    browser.run(
        f"(() => {{ const form = document.getElementById('filters'), query = {json.dumps(query)};"
        "for (const field of form.querySelectorAll('[name]')) if (field.name !== 'data')"
        " field.value = query[field.name] ?? (field.name === 'list' ? 'steps' : '');"
        "form.dispatchEvent(new Event('input')) })()"
    )


def test_the_search_counts_and_lists_what_it_found(fresh, steps):
    kept = [(i, t) for i, row in enumerate(steps) for t in row["step_positions"]]
    ask(fresh)
    assert fresh.text("#count").startswith(f"{len(kept)} kept steps of {len(kept)}, in ")
    late = [place for place in kept if place[1] >= 5]
    ask(fresh, **{"from": "5"})
    cells = fresh.run(
        "[...document.querySelectorAll('#results tbody tr')]"
        ".map(row => [+row.cells[0].innerText, +row.cells[1].innerText])"
    )
    assert list(map(tuple, cells)) == late
    ask(fresh, list="rows")
    assert fresh.text("#count") == f"{len(steps)} rows of {len(steps)}"
    fresh.click("#filters [type=reset]")
    assert fresh.run("document.querySelector('[name=list]').value") == "steps"


def test_a_column_title_sorts_by_its_column(fresh, steps):
    ask(fresh)
    nats = sorted(row["kl_divergence"][t] for row in steps for t in row["step_positions"])
    for order in (nats, nats[::-1]):
        fresh.run("document.querySelector('[data-column=nats] button').click()")
        shown = fresh.run("[...document.querySelectorAll('#results tbody tr')].map(row => +row.cells[4].innerText)")
        assert shown == pytest.approx(order, rel=5e-3)
    assert fresh.run("document.activeElement.parentElement.getAttribute('aria-sort')") == "descending"
    fresh.run("document.querySelector('[data-column=row] button').click()")


def test_any_step_opens_by_its_number_and_the_address_names_it(fresh, steps):
    row = next(i for i, row in enumerate(steps) if 0 < len(row["step_positions"]) < len(row["completion_ids"]))
    step = next(t for t in range(len(steps[row]["completion_ids"])) if t not in steps[row]["step_positions"])
    fresh.run(f"document.querySelector('#goto [name=row]').value = {row}")
    fresh.run(f"document.querySelector('#goto [name=step]').value = {step}")
    fresh.click("#goto button")
    assert opens(fresh, f"Row {row}, step {step}")
    assert "was not kept" in fresh.text("#panel") and "was taken" in fresh.text("#panel")
    assert fresh.run("location.hash") == f"#row-{row}-step-{step}"
    kept = steps[row]["step_positions"][0]
    fresh.run(f"location.hash = 'row-{row}-step-{kept}'")
    assert opens(fresh, f"Row {row}, step {kept}")
    assert "Expert π" in fresh.text("#panel")
    fresh.press("Escape")
    assert fresh.run("location.hash") == ""


def test_a_row_that_is_not_there_is_said_to_be(fresh, steps):
    fresh.run(f"location.hash = 'row-{len(steps)}-step-0'")
    assert opens(fresh, f"There is no row {len(steps)}.")
    fresh.run("location.hash = 'row-0-step-999'")
    assert opens(fresh, "Row 0 has 12 steps, 0 to 11.")


def test_the_field_of_the_panel_opens_a_neighbour(fresh):
    fresh.run("location.hash = 'row-0-step-3'")
    assert opens(fresh, "Row 0, step 3")
    fresh.run("document.querySelector('#panel [type=number]').focus()")
    fresh.press("ArrowUp")
    assert opens(fresh, "Row 0, step 4")
    assert comes_true(fresh, "document.activeElement === document.querySelector('#panel [type=number]')")


def test_rows_beside_the_page_are_loaded_when_they_are_asked_for(steps, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_lightreasoner.report.row_index.MAX_CHARACTERS", 0)
    path = write_report({"a": steps, "b": steps}, str(tmp_path / "out"), load_models=False)
    browser = Chromium(tmp_path / "profile")
    try:
        browser.open(path)
        assert len(browser.requests) == 1
        browser.run("location.hash = 'dataset-2-row-2-step-1'")
        assert opens(browser, "Row 2, step 1")
        assert [address.rpartition("/")[2] for address in browser.requests[1:]] == ["rows-001.js"]
        assert browser.errors == []
        (path.parent / "rows-000.js").write_text((path.parent / "rows-000.js").read_text().replace('"', '"x', 1))
        browser.run("location.hash = 'row-2-step-1'")
        assert opens(browser, "rows-000.js belongs to another report.")
        (path.parent / "rows-000.js").unlink()
        browser.run("location.hash = 'row-2-step-2'")
        assert opens(browser, "This row is in rows-000.js, which must lie beside this page.")
    finally:
        browser.close()


def test_a_link_opens_its_step_when_the_page_is_opened(steps, tmp_path):
    path = write_report(steps, str(tmp_path / "out"), load_models=False)
    browser = Chromium(tmp_path / "profile")
    try:
        browser.open(path, "#row-3-step-2")
        assert opens(browser, "Row 3, step 2")
        assert comes_true(browser, "document.activeElement.id === 'viewer'")
    finally:
        browser.close()


def test_hostile_text_of_a_row_is_text(steps, tokenizer, tmp_path):
    hostile = "<img src=x onerror=\"document.title='run'\"></script>"
    dataset = steps.remove_columns("prompt").add_column("prompt", [hostile] * len(steps))
    browser = Chromium(tmp_path / "profile")
    try:
        browser.open(write_report(dataset, str(tmp_path / "out"), load_models=False))
        browser.run("location.hash = 'row-1-step-0'")
        assert opens(browser, "Row 1, step 0")
        assert hostile in browser.text("#viewer")
        assert browser.run("document.images.length") == 0 and browser.run("document.title") != "run"
    finally:
        browser.close()
