"""The concept browser: a run folder as pages that one explores, studies, exports."""
