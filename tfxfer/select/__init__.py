"""Whether transfer helped: baselines and the verdict."""
