"""Frozen features: cutting a model, running the frozen part once, closed-form and convex heads."""
