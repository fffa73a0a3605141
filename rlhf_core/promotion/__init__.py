"""When a candidate may become the champion: the comparison, its statistics, guard-rails and scorecard."""
