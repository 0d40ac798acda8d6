"""The cards of the sources, a folder each, with the weights of those that were trained here."""
