"""The annotation service: what people say about answers, kept without loss and given on as data."""
