"""`forensics regions evaluate`: a threshold from validation, metrics on a test file that is read afterwards."""
