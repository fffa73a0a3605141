"""Is the data fit to train on: Great Expectations suites as code, over columns derived from the rows."""
