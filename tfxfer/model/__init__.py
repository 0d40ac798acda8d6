"""The model: preprocessing in the graph, backbone with blocks, head; freezing and its audit."""
