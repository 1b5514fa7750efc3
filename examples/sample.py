# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lightreasoner"]
# ///
"""
Sample a Dataset of kept steps. The same as `lightreasoner sample`, for `accelerate launch`, whose processes share the
prompts.

```bash
accelerate launch examples/sample.py \
    --expert Qwen/Qwen2.5-Math-1.5B \
    --amateur Qwen/Qwen2.5-0.5B \
    --dataset_name openai/gsm8k --dataset_config main --dataset_split "train[:1000]" \
    --prompt_column question --system_prompt "Please reason step by step." \
    --output_dir steps
```
"""

import sys

from trl_lightreasoner.commands.cli import run
from trl_lightreasoner.commands.sample import main, make_parser


if __name__ == "__main__":
    sys.exit(run("sample.py", make_parser, main, sys.argv[1:]))
