"""Other job queues beside jobd on the same machine, in the same run: create, claim and complete over 16 connections.

`make bench-peers` installs them (Debian, PyPI, npm) and runs this. A script, not a test: nothing is asserted.
"""
