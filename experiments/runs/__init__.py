"""Train the cells of a table: configs, settings and seeds."""
