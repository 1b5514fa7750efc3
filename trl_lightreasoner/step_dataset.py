"""The Dataset of kept steps: its columns, what it remembers of its making, and its files.

One row is one trajectory. A folder written by [`StepWriter`] looks like a dataset repository on the Hub, so that
`load_dataset(folder)` reads it anywhere.

| column | type | meaning |
|---|---|---|
| prompt, completion | as given; text | for people |
| prompt_ids, completion_ids | list of int32 | what the models saw; EOS kept |
| kl_divergence | list of float32 | D_KL(pi_E, pi_A) at every completion token |
| step_positions | list of int32, ascending | t of each kept step: its context is prompt_ids + completion_ids[:t] |
| label_ids | list of list of int32 | support of v_C at each kept step, most probable first |
| label_probs | list of list of float32 | v_C there, sums to 1 |
| sampling_metadata | text | JSON: models, revisions, settings and versions; the same in every row |

`sampling_metadata` is a column because that is what survives everything: Parquet, the Hub, streaming, concatenation.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value


STEP_FEATURES = {
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(Value("int32")),
    "kl_divergence": List(Value("float32")),
    "step_positions": List(Value("int32")),
    "label_ids": List(List(Value("int32"))),
    "label_probs": List(List(Value("float32"))),
    "sampling_metadata": Value("string"),
}
# What training needs of a row
STEP_COLUMNS = ("prompt_ids", "completion_ids", "step_positions", "label_ids", "label_probs")

_MAX_FILE_BYTES = 500 * 2**20
_ROW = "_row"  # place of a row in the input, while rows are written in the order they are made


def sampling_metadata(dataset: Dataset) -> dict[str, Any] | None:
    """
    Models, revisions, settings and versions that a Dataset of steps was made with, or `None` if it does not say.

    Example:

    ```python
    >>> sampling_metadata(dataset)["settings"]["beta"]
    0.4

    ```
    """
    if "sampling_metadata" not in dataset.column_names or len(dataset) == 0:
        return None
    return json.loads(dataset[0]["sampling_metadata"])


def count_steps(dataset: Dataset) -> int:
    """Number of kept steps of a Dataset."""
    return sum(map(len, dataset["step_positions"]))


def kl_quantiles(dataset: Dataset, quantiles: list[float]) -> list[float]:
    """Quantiles of D_KL(pi_E || pi_A) in nats over every step of a Dataset, kept or not."""
    divergence = pc.list_flatten(dataset.data["kl_divergence"])
    return pc.quantile(divergence, q=quantiles).to_pylist()


class StepWriter:
    """
    Writes rows to Parquet files under a folder as they are made and gives them back in the order of the input.

    While sampling goes on, each batch is a file under `output_dir/shards`, complete or not there at all. At the end
    they become `output_dir/data/train-*.parquet`. Memory holds one batch.

    Args:
        output_dir (`str`): The folder; made if it is missing.
        dataset ([`~datasets.Dataset`]): The input, whose columns are carried along.
        overwrite (`bool`): Whether a dataset that is there already may be deleted.

    Raises:
        `ValueError`: If the folder is a file or holds a dataset already, or an input column has the name of one of
            ours.
    """

    def __init__(self, output_dir: str, dataset: Dataset, overwrite: bool = False):
        taken = [name for name in (*STEP_FEATURES, _ROW) if name in dataset.column_names]
        if taken:
            raise ValueError(
                f"The input already has columns named {taken}, which sampling writes. Rename or remove them first."
            )
        self.folder = Path(output_dir)
        self.shards = self.folder / "shards"
        self.data = self.folder / "data"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{output_dir!r} is a file. Choose another `output_dir`.")
        if (self.shards.exists() or self.data.exists()) and not overwrite:
            raise ValueError(
                f"{output_dir!r} already holds sampled steps. Choose another `output_dir`, or set "
                "`overwrite_output_dir=True` to delete them."
            )
        self.input = dataset.with_format("arrow")
        completion = {} if "completion" in dataset.column_names else {"completion": Value("string")}
        self.features = Features({**dataset.features, **completion, **STEP_FEATURES})
        self.schema = Features({**self.features, _ROW: Value("int64")}).arrow_schema
        self.num_shards = 0

    def open(self, metadata: dict[str, Any]) -> None:
        """Start the folder afresh; `metadata` is what [`sampling_metadata`] is to return."""
        self.metadata = json.dumps(metadata)
        for folder in (self.shards, self.data):
            shutil.rmtree(folder, ignore_errors=True)
        self.shards.mkdir(parents=True)

    def write(self, indices: list[int], columns: dict[str, list]) -> None:
        """Write the rows `indices` of the input, with the new `columns` beside their own."""
        table = self.input[indices]
        columns = {**columns, "sampling_metadata": [self.metadata] * len(indices), _ROW: indices}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, self.schema.field(name).type))
        table = table.select(self.schema.names).cast(self.schema)
        path = self.shards / f"{self.num_shards:06d}.parquet"
        with open(f"{path}.tmp", "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        self.num_shards += 1

    def finish(self) -> Dataset:
        """Put the rows in the order of the input and return them, memory-mapped."""
        if self.num_shards == 0:
            return Dataset.from_dict({name: [] for name in self.features}, features=self.features)
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            made = Dataset.from_parquet(
                [str(path) for path in sorted(self.shards.glob("*.parquet"))], cache_dir=cache, keep_in_memory=False
            )
            made = made.select(np.argsort(made.data[_ROW].to_numpy(), kind="stable")).remove_columns(_ROW)
            num_files = 1 + made.data.nbytes // _MAX_FILE_BYTES
            self.data.mkdir()
            for i in range(num_files):
                path = self.data / f"train-{i:05d}-of-{num_files:05d}.parquet"
                made.shard(num_files, i, contiguous=True).to_parquet(path)
        shutil.rmtree(self.shards)
        return Dataset.from_parquet([str(path) for path in sorted(self.data.glob("*.parquet"))])
