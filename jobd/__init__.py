"""jobd: one daemon that owns all job state. Start with docs/architecture.md."""

__version__ = "0.1.0"
