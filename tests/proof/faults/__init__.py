"""Real faults on the real daemon. `python -m tests.proof.faults --report` runs all of them."""
