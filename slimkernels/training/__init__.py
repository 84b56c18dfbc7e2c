"""What a training run is made of: optimizer, schedule, checkpoint, meter, and the loop itself."""
