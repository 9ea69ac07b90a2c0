"""A stage is a dataset on disk: its columns and their checks, its shards and manifest, and the job that writes it."""
