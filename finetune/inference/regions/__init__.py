"""Candidate regions: a probability for each, answers behind the verdicts, and the page that shows them."""
