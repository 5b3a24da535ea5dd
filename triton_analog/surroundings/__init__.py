"""What other libraries put around the layers of a model, seen from a conversion. None of them is imported."""
