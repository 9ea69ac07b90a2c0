"""Structured output: a document read strictly, graded against a schema, compared with a reference, rewarded."""
