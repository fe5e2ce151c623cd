"""Inspection reports about images: written by the model, and the page that shows them."""
