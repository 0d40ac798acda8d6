"""What users ask for, from the layers below, in order."""
