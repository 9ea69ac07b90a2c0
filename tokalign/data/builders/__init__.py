"""The dataset builders, one file a source: a hub id or a local path in, problems of the contract out."""
