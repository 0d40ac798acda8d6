"""Search with KerasTuner, where trials share what is frozen."""
