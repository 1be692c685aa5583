"""Create the schema of the database, and migrate older versions."""
