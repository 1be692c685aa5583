"""Real faults on the real daemon: `python -m tests.faults --report` makes each and says what became of the promise."""
