"""The operators' room: pages on the admin port, for people with a browser."""
