"""One module an operator: its schema, reference, checks and samples."""
