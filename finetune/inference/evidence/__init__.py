"""Evidence of heads on the vision tower: found, put into words and pictures, explained, given to training."""
