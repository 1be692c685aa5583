"""jobd demo: a throw-away daemon, real workers on real files, one of them killed; ends with proof of what happened.

Only the command line: the story is demo_play.py's, the judgement demo_verdict.py's, the processes demo_stage.py's.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import click


@click.command()
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Copy the results into this directory.")
@click.option("--seed", type=int, default=1, show_default=True, help="The source files follow from this number.")
def demo(keep: Path | None, seed: int) -> int:
    """Show a recovery: real workers, one is killed at work.

    Starts a daemon and three workers in a temporary directory, lets them convert some thirty files, kills one worker
    with SIGKILL in the middle of a job, and shows how its job is noticed, given to another worker and finished.
    Exit 0 only if all of that was seen and every result is right. Nothing is left behind.
    """
    from jobd.cli.demo.checks import judge
    from jobd.cli.demo.demo_screen import screen
    from jobd.cli.demo.main import play
    from jobd.cli.demo.processes import Stage

    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    with Stage() as stage:
        with screen() as out:
            story = play(stage, out, seed)
        return judge(stage, story, keep)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
