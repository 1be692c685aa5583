"""Work on a store that no daemon holds."""
