"""Linearizability: some order of the calls explains what concurrent clients saw of a job under faults.

`python -m tests.proof.linearizability --histories 500` records histories and checks them against model.py.
"""
