"""`python -m trl_lightreasoner` is the `lightreasoner` program, for `accelerate launch -m` and `torchrun -m`."""

import sys

from .commands.cli import main


if __name__ == "__main__":
    sys.exit(main())
