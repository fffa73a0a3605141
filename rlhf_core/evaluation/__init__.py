"""How models are compared: statistics, text metrics, plots and the report."""
