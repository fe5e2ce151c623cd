"""Inspection reports: rows of a table become records with a written report, and a written report becomes fields again.

The reader is format `reports` of `finetune.data.readers`; storing, splitting and training are those of every data set.
"""
