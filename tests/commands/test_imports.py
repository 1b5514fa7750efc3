"""Imports of a command without the garbage collector."""

import gc
import sys

from trl_lightreasoner.commands.imports import fast_imports


def test_imports_run_without_the_collector_and_are_left_out_of_later_collections(tmp_path, monkeypatch):
    (tmp_path / "imported_fast.py").write_text(
        "import gc\nwas_enabled, lists = gc.isenabled(), [[] for _ in range(100)]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    try:
        with fast_imports():
            import imported_fast
        assert not imported_fast.was_enabled and gc.isenabled()
        assert gc.get_freeze_count() >= frozen + 100
    finally:
        gc.unfreeze()
        sys.modules.pop("imported_fast", None)


def test_what_is_imported_already_freezes_nothing():
    frozen = gc.get_freeze_count()
    with fast_imports():
        import json  # noqa: F401
    assert gc.get_freeze_count() == frozen and gc.isenabled()


def test_a_collector_that_is_off_stays_off_and_errors_come_through():
    gc.disable()
    try:
        with fast_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    try:
        with fast_imports():
            raise ImportError("no such library")
    except ImportError as error:
        assert str(error) == "no such library" and gc.isenabled()
