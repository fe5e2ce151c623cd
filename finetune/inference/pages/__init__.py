"""HTML pages without any file beside them: their frame and parts, and the report of an evaluation."""
