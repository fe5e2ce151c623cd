"""Makes stored data sets from any sources; start at `prepare.prepare`. Without torch."""
