"""What runs inside every rank: the only package that imports the training stack."""
