"""`python -m jobd` is `jobd`."""

from __future__ import annotations

import sys

from jobd.cli.daemon.main import main

if __name__ == "__main__":
    sys.exit(main())
