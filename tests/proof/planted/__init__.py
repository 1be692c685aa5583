"""Planted bugs: real ones, put into a copy of the sources one at a time, to see that the tests find each of them.

`python -m tests.proof.planted` plants them all. Nothing here touches the sources themselves.
"""
