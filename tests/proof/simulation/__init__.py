"""Simulation: the real actor, rules, cleanup and clock in virtual time, with faults, everything from one seed.

`python -m tests.proof.simulation --seeds 1000` runs it. Nothing here may depend on chance, real time or hash order.
"""
