"""From any source to rows of the contract: problems, pairs, structured rows, the builders of datasets."""
