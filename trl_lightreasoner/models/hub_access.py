"""Without a network, load from the cache at once, instead of after six requests for every file."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from huggingface_hub import constants, get_session, is_offline_mode


logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS = 300  # validity of an answer
_answer: tuple[float, bool] | None = None  # time of the answer, and whether the Hub was reachable


def from_cache_if_unreachable(load: Callable[..., T]) -> Callable[..., T]:
    """Let a function whose first argument can be a model id use the cache alone if the Hub cannot be reached."""

    @wraps(load)
    def loaded(model: Any, *args: Any, **kwargs: Any) -> T:
        with cache_if_unreachable(model):
            return load(model, *args, **kwargs)

    return loaded


def find_file(model: str, name: str, **kwargs: Any) -> str | None:
    """Path of a file of a model, or `None` if there is none. `kwargs` say how to find the model on the Hub."""
    from transformers.utils import cached_file

    kwargs.pop("trust_remote_code", None)  # a single file has no code
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(model, name, **kwargs, **quietly)


@contextmanager
def cache_if_unreachable(*models: Any) -> Iterator[None]:
    """A context that uses the cache alone if one of the models is given by id and the Hub cannot be reached."""
    is_id = any(isinstance(model, str) and not os.path.exists(model) for model in models)
    if not is_id or is_offline_mode() or _is_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False  # a later upload asks again


def _is_reachable() -> bool:
    global _answer
    if _answer is None or time.monotonic() - _answer[0] > _SECONDS:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            _answer = (time.monotonic(), True)
        except Exception as error:  # its HTTP clients raise different errors
            logger.warning(
                f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split())}): models and datasets are "
                "loaded from the cache."
            )
            _answer = (time.monotonic(), False)
    return _answer[1]
