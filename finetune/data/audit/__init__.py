"""`forensics audit`: what in a data set would teach a model the wrong thing, found before a run.

`run_audit` reads and checks, `write_audit` writes audit.json and audit.html. Runs without torch; token lengths come
from a counter that the caller hands in. Nothing is repaired.
"""

from finetune.data.audit.findings import Audit, Finding
from finetune.data.audit.run import AuditSettings, Source, run_audit
from finetune.data.audit.writing import write_audit

__all__ = ["Audit", "AuditSettings", "Finding", "Source", "run_audit", "write_audit"]
