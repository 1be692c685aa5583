"""Planted bugs: known bugs that no mutation operator can express, one at a time, and the tests that must find them.

`python -m tests.proof.planted` runs them all. Each bug replaces one function of jobd in the test process, so the
sources never change. `bugs` holds the bugs, `registry` applies one, `plugin` does so in a pytest process.
"""
