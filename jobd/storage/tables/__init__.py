"""The tables behind the journal: what is written to them, in slices."""
