"""From a training's output folder to its curves: all numbers logged over the updates."""

import json
import math
from pathlib import Path
from typing import Any


# Logged values that are not curves: time and progress
_NO_CURVES = {"step", "epoch", "total_flos", "num_kept_steps", "num_tokens", "train_loss"}
_NO_CURVE_ENDINGS = ("_runtime", "_per_second", "_model_preparation_time")

Curve = list[tuple[int, float]]


def load_curves(folder: str) -> dict[str, dict[str, Curve]]:
    """
    Load the logged metrics of a training.

    Args:
        folder (`str`): `output_dir` of a training, or one of its checkpoints.

    Returns:
        `dict`: By name without `eval_`, such as `"loss"`, the curves of the training (`"train"`) and of the evaluation
        (`"eval"`), as pairs of update and value. Values that are not finite are left out.

    Raises:
        `ValueError`: If the folder holds no log, or it is damaged or empty.
    """
    history = _load_history(Path(folder))
    curves: dict[str, dict[str, Curve]] = {}
    for entry in history:
        for key, value in entry.items():
            if key in _NO_CURVES or key.endswith(_NO_CURVE_ENDINGS) or isinstance(value, bool):
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            kind = "eval" if key.startswith("eval_") else "train"
            curves.setdefault(key.removeprefix("eval_"), {}).setdefault(kind, []).append((entry["step"], value))
    if not curves:
        raise ValueError(f"The log of {folder!r} is empty. Train with smaller `logging_steps`.")
    return curves


def _load_history(folder: Path) -> list[dict[str, Any]]:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    checkpoints.sort(key=lambda path: -int(path.name.partition("-")[2]))
    files = [path / "trainer_state.json" for path in (folder, *checkpoints)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"{str(folder)!r} is not the output folder of a training: neither it nor a checkpoint in it holds a "
            "trainer_state.json."
        )
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        if all(isinstance(entry["step"], int) for entry in history):
            return history
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{str(file)!r} is damaged. Name another checkpoint, or remove `training_dir`.")
