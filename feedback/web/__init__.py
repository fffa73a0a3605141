"""The pages: annotators', adjudicators' and managers', and what guards them."""
