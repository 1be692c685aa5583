"""Several nodes on one journal: one leads, the others follow it and take over."""
