"""The rows of events: how they are packed, read and shortened."""
