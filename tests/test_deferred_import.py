import importlib
import sys
from importlib.util import find_spec

import pytest

from trl_lightreasoner.deferred_import import defer_import


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """A package `late` with a submodule, which notes in its own list what was executed."""

    def make(code: str = "") -> None:
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "__init__.py").write_text(f"from . import inner\n__version__ = '7'\n{code}")
        (tmp_path / "late" / "inner.py").write_text("import late\nvalue = 3\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == "late"]:
        del sys.modules[name]


def test_a_deferred_package_is_not_executed_by_its_import(make_package):
    make_package()
    defer_import("late")
    import late

    assert find_spec("late") is not None
    assert not hasattr(late, "__wrapped__") and late.__file__  # as tools ask every module
    assert "late.inner" not in sys.modules


@pytest.mark.parametrize(
    "use",
    [
        "import late; late.inner.value",
        "from late import inner",
        "import late.inner",
        "from late.inner import value",
        "import late; late.__version__",
    ],
)
def test_a_deferred_package_is_executed_by_its_first_use(use, make_package):
    make_package()
    defer_import("late")
    exec(use, {})
    late = sys.modules["late"]
    assert (late.inner.value, late.__version__) == (3, "7")
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        late.other  # noqa: B018


def test_a_deferred_package_that_fails_is_tried_again(make_package):
    make_package("raise ImportError('no library')")
    defer_import("late")
    import late

    for _ in range(2):
        with pytest.raises(ImportError, match="no library"):
            late.other  # noqa: B018


def test_what_is_missing_or_imported_is_not_deferred(make_package):
    defer_import("late")
    with pytest.raises(ModuleNotFoundError):
        import late
    make_package()
    import late

    defer_import("late")
    assert sys.modules["late"] is late and late.inner.value == 3
