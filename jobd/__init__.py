"""jobd: one daemon that owns all job state. docs/architecture.md is the way into the code."""

__version__ = "0.1.0"
