"""Audit of a raw dataset before training: `run_audit` checks lists, metadata and images."""

from covidjax.audit.run import run_audit

__all__ = ['run_audit']
