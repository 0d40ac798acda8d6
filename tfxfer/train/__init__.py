"""Training: recipes, the loop over their stages, the time limit."""
