# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lightreasoner"]
# ///
"""
Train an adapter on a Dataset of kept steps. The same as `lightreasoner train`, for `accelerate launch`.

```bash
accelerate launch examples/train.py \
    --expert Qwen/Qwen2.5-Math-1.5B \
    --dataset_name steps \
    --output_dir adapter
```

With the paper's recipe, a step a row:

```bash
accelerate launch examples/train.py --config examples/paper.yaml --dataset_name steps --output_dir adapter
```
"""

import sys

from trl_lightreasoner.commands.cli import run
from trl_lightreasoner.commands.train import main, make_parser


if __name__ == "__main__":
    sys.exit(run("train.py", make_parser, main, sys.argv[1:]))
