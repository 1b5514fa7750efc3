"""What is in the cache is loaded at once where there is no network, not after each file was asked for six times."""

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

_SECONDS = 300  # for which an answer holds
_answer: tuple[float, bool] | None = None  # when it was given, and whether the Hub was there


def from_cache_if_unreachable(load: Callable[..., T]) -> Callable[..., T]:
    """Let a function whose first argument can be the id of a model look into the cache alone, if the Hub is away."""

    @wraps(load)
    def loaded(model: Any, *args: Any, **kwargs: Any) -> T:
        with cache_if_unreachable(model):
            return load(model, *args, **kwargs)

    return loaded


@contextmanager
def cache_if_unreachable(*models: Any) -> Iterator[None]:
    """Within it the cache alone is looked into, if one of the models is named by an id and the Hub is away."""
    is_id = any(isinstance(model, str) and not os.path.exists(model) for model in models)
    if not is_id or is_offline_mode() or _is_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False  # whoever uploads later asks anew


def _is_reachable() -> bool:
    global _answer
    if _answer is None or time.monotonic() - _answer[0] > _SECONDS:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            _answer = (time.monotonic(), True)
        except Exception as error:  # what its HTTP client raises, now this one, now that
            logger.warning(
                f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split())}): models and datasets are "
                "loaded from the cache."
            )
            _answer = (time.monotonic(), False)
    return _answer[1]
