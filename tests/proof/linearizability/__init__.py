"""Linearizability: some order of the calls explains the responses that concurrent clients received under faults.

`python -m tests.proof.linearizability --histories 500` records histories and checks them against model.py.
"""
