"""From a tfds directory on disk to uint8 batches on the devices."""
