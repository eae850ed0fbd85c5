"""What every room shares: records, noise, geometry, objectives, the model's state."""
