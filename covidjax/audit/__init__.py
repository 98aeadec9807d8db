"""Can this dataset be trusted, before a model is trained on it: `run_audit` checks lists, metadata and images."""

from covidjax.audit.run import run_audit

__all__ = ['run_audit']
