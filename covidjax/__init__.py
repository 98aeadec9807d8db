"""Screening of chest CT for pneumonia and COVID-19, slice by slice and scan by scan, in JAX."""

__version__ = '0.1.0'
