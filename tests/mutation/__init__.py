"""Mutation testing of the pure rooms: one small change at a time, and some test has to notice it.

`python -m tests.mutation` runs it; survivors.md argues for every change that no test notices.
"""
