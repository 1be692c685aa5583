"""jobctl, the command line of operators and workers."""

from __future__ import annotations


def script() -> int | str:
    """Run jobctl and return its exit code, or an error if its packages are not installed."""
    try:
        from jobd.cli.ctl.main import main
    except ModuleNotFoundError as error:
        return f"jobctl needs the package {error.name}: pip install 'jobd-client[worker]'"
    return main()
