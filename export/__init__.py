"""Turn checkpoints into a bundle, and a bundle's members into engines."""
