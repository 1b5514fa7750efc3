"""`python -m trl_lightreasoner` is the `lightreasoner` program, for `accelerate launch -m` and `torchrun -m`."""

import sys

from .safe_path import safe_path


if __name__ == "__main__":
    sys.path[:] = safe_path()  # before anything else is imported

    from .commands.cli import main

    sys.exit(main())
