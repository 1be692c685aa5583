"""Linearizability: what concurrent clients saw of a job, under faults, is what some order of their calls explains.

`python -m tests.linearizability --histories 500` gathers and judges. Nothing here knows jobd's rules: model.py has
its own.
"""
