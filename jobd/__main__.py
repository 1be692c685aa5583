"""`python -m jobd` is `jobd`."""

from __future__ import annotations

import sys

from jobd.cli.daemon import main

if __name__ == "__main__":
    sys.exit(main())
