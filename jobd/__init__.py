"""jobd: one daemon that owns all job state. See README.md; the walk through the code starts in web.py and rules.py."""

__version__ = "0.1.0"
